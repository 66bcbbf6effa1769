# A CMake toolchain file for Zig, which brings the C and C++ libraries of every target. `make musl` uses it.
#   cmake -S . -B build --toolchain zig.cmake -DZIG=.../zig -DZIG_TARGET=aarch64-linux-musl
set(ZIG zig CACHE FILEPATH "Zig's program; that of PyPI's package ziglang lies in its folder")
set(ZIG_TARGET x86_64-linux-musl CACHE STRING "ARCHITECTURE-SYSTEM or ARCHITECTURE-SYSTEM-LIBRARY, as Zig names them")
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES ZIG ZIG_TARGET)

string(REGEX MATCH "^[^-]+" CMAKE_SYSTEM_PROCESSOR "${ZIG_TARGET}")
if(ZIG_TARGET MATCHES "macos")
  set(CMAKE_SYSTEM_NAME Darwin)
elseif(ZIG_TARGET MATCHES "windows")
  set(CMAKE_SYSTEM_NAME Windows)
else()
  set(CMAKE_SYSTEM_NAME Linux)
  set(dynamic -dynamic)  # otherwise each check of CMake links statically, and Zig compiles all of musl
endif()
set(CMAKE_CXX_COMPILER "${ZIG}" c++ -target "${ZIG_TARGET}" ${dynamic})
