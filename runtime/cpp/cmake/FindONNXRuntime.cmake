# Defines u2moe::onnxruntime, the library alone: the header that is needed comes with the kernels. ONNXRUNTIME_ROOT may be a
# release unpacked, the folder that npm's onnxruntime-node has for Linux or Windows (for MinGW, which links to a DLL itself), or
# that of Python's package:
#     -DONNXRUNTIME_ROOT="$(python3 -c 'import onnxruntime; print(onnxruntime.__path__[0])')"
# Without it the system's is taken, such as Debian's libonnxruntime-dev. Installed with the static library, which needs it.
if(ONNXRUNTIME_ROOT)
  file(GLOB found ${ONNXRUNTIME_ROOT}/capi/libonnxruntime.so.* ${ONNXRUNTIME_ROOT}/capi/libonnxruntime.*.dylib
       ${ONNXRUNTIME_ROOT}/lib/libonnxruntime.so ${ONNXRUNTIME_ROOT}/lib/libonnxruntime.dylib ${ONNXRUNTIME_ROOT}/lib/onnxruntime.lib
       ${ONNXRUNTIME_ROOT}/libonnxruntime.so* ${ONNXRUNTIME_ROOT}/onnxruntime.dll ${ONNXRUNTIME_ROOT}/jni/${ANDROID_ABI}/libonnxruntime.so)
  list(LENGTH found num)
  if(num GREATER 0 AND NOT ONNXRUNTIME_LIBRARY)
    list(GET found 0 found)
    set(ONNXRUNTIME_LIBRARY ${found} CACHE FILEPATH "onnxruntime" FORCE)
  endif()
endif()
if(NOT ONNXRUNTIME_ROOT)  # never the system's in the place of one that was named
  find_library(ONNXRUNTIME_LIBRARY onnxruntime)
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(ONNXRuntime REQUIRED_VARS ONNXRUNTIME_LIBRARY REASON_FAILURE_MESSAGE
  "ONNXRUNTIME_ROOT '${ONNXRUNTIME_ROOT}' has no library. Name a release or the folder of Python's package onnxruntime (old ones \
have no library for others), or apt-get install libonnxruntime-dev")

if(ONNXRuntime_FOUND AND NOT TARGET u2moe::onnxruntime)
  add_library(u2moe::onnxruntime INTERFACE IMPORTED GLOBAL)
  set(library ${ONNXRUNTIME_LIBRARY})
  # Python's package has the file alone; programs ask for it by another name.
  if(ONNXRUNTIME_LIBRARY MATCHES "/capi/libonnxruntime[.]so[.]([0-9]+)")
    set(links ${CMAKE_BINARY_DIR}/onnxruntime)
    set(ONNXRUNTIME_FILE_NAME libonnxruntime.so.${CMAKE_MATCH_1})
    set(library ${links}/${ONNXRUNTIME_FILE_NAME})
    file(MAKE_DIRECTORY ${links})
    execute_process(COMMAND ${CMAKE_COMMAND} -E create_symlink ${ONNXRUNTIME_LIBRARY} ${library})
  endif()
  target_link_libraries(u2moe::onnxruntime INTERFACE ${library})
endif()
