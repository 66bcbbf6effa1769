# Defines u2moe::onnxruntime, only the library: the header comes with the kernels. ONNXRUNTIME_ROOT is an unpacked release, the
# folder for Linux or Windows in npm's onnxruntime-node (MinGW links directly to a DLL), or the folder of the Python package:
#     -DONNXRUNTIME_ROOT="$(python3 -c 'import onnxruntime; print(onnxruntime.__path__[0])')"
# Without it, the system's onnxruntime is used, such as Debian's libonnxruntime-dev. With it, onnxruntime is installed next to
# the library, as ONNXRUNTIME_FILE_NAME, the name that programs load. For the system's onnxruntime, ONNXRUNTIME_VERSION is
# recorded.
if(ONNXRUNTIME_ROOT)
  file(GLOB found ${ONNXRUNTIME_ROOT}/capi/libonnxruntime.so.* ${ONNXRUNTIME_ROOT}/capi/libonnxruntime.*.dylib
       ${ONNXRUNTIME_ROOT}/lib/libonnxruntime.so ${ONNXRUNTIME_ROOT}/lib/libonnxruntime.dylib ${ONNXRUNTIME_ROOT}/lib/onnxruntime.lib
       ${ONNXRUNTIME_ROOT}/libonnxruntime.so* ${ONNXRUNTIME_ROOT}/onnxruntime.dll ${ONNXRUNTIME_ROOT}/jni/${ANDROID_ABI}/libonnxruntime.so)
  list(LENGTH found num)
  if(num GREATER 0 AND NOT ONNXRUNTIME_LIBRARY)
    list(GET found 0 found)
    set(ONNXRUNTIME_LIBRARY ${found} CACHE FILEPATH "onnxruntime" FORCE)
  endif()
else()  # with ONNXRUNTIME_ROOT, never fall back to the system's
  find_library(ONNXRUNTIME_LIBRARY onnxruntime)
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(ONNXRuntime REQUIRED_VARS ONNXRUNTIME_LIBRARY REASON_FAILURE_MESSAGE
  "ONNXRUNTIME_ROOT '${ONNXRUNTIME_ROOT}' has no library. Name a release or the folder of the Python package onnxruntime (older than \
1.19 it has no library for other programs), or run apt-get install libonnxruntime-dev")

if(ONNXRuntime_FOUND AND NOT TARGET u2moe::onnxruntime)
  get_filename_component(ONNXRUNTIME_FILE ${ONNXRUNTIME_LIBRARY} REALPATH)
  get_filename_component(name ${ONNXRUNTIME_FILE} NAME)
  string(REGEX MATCH "[0-9]+[.][0-9]+[.][0-9]+" ONNXRUNTIME_VERSION ${name})
  set(library ${ONNXRUNTIME_LIBRARY})
  set(ONNXRUNTIME_FILE_NAME "")
  if(ONNXRUNTIME_ROOT)
    set(ONNXRUNTIME_FILE_NAME ${name})
    if(name MATCHES "^(libonnxruntime[.]so[.][0-9]+)")
      # Programs load it by its soname. The Python package has only the file with the full version.
      set(ONNXRUNTIME_FILE_NAME ${CMAKE_MATCH_1})
      set(library ${CMAKE_BINARY_DIR}/onnxruntime/${ONNXRUNTIME_FILE_NAME})
      file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/onnxruntime)
      execute_process(COMMAND ${CMAKE_COMMAND} -E create_symlink ${ONNXRUNTIME_FILE} ${library})
    elseif(name STREQUAL "onnxruntime.lib")  # MSVC's import library, next to the DLL
      set(ONNXRUNTIME_FILE_NAME onnxruntime.dll)
      string(REPLACE onnxruntime.lib onnxruntime.dll ONNXRUNTIME_FILE ${ONNXRUNTIME_FILE})
    endif()
  endif()
  add_library(u2moe::onnxruntime INTERFACE IMPORTED GLOBAL)
  target_link_libraries(u2moe::onnxruntime INTERFACE ${library})
endif()
