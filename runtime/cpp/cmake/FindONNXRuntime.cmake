# Defines u2moe::onnxruntime, the library alone: the header that is needed comes with the kernels. ONNXRUNTIME_ROOT may be a
# release unpacked, the folder that npm's onnxruntime-node has for Linux or Windows (for MinGW, which links to a DLL itself), or
# that of Python's package:
#     -DONNXRUNTIME_ROOT="$(python3 -c 'import onnxruntime; print(onnxruntime.__path__[0])')"
# Without it the system's is taken, such as Debian's libonnxruntime-dev. One that was named is installed beside the library, under
# ONNXRUNTIME_FILE_NAME, by which programs ask for it; of the system's ONNXRUNTIME_VERSION is noted.
if(ONNXRUNTIME_ROOT)
  file(GLOB found ${ONNXRUNTIME_ROOT}/capi/libonnxruntime.so.* ${ONNXRUNTIME_ROOT}/capi/libonnxruntime.*.dylib
       ${ONNXRUNTIME_ROOT}/lib/libonnxruntime.so ${ONNXRUNTIME_ROOT}/lib/libonnxruntime.dylib ${ONNXRUNTIME_ROOT}/lib/onnxruntime.lib
       ${ONNXRUNTIME_ROOT}/libonnxruntime.so* ${ONNXRUNTIME_ROOT}/onnxruntime.dll ${ONNXRUNTIME_ROOT}/jni/${ANDROID_ABI}/libonnxruntime.so)
  list(LENGTH found num)
  if(num GREATER 0 AND NOT ONNXRUNTIME_LIBRARY)
    list(GET found 0 found)
    set(ONNXRUNTIME_LIBRARY ${found} CACHE FILEPATH "onnxruntime" FORCE)
  endif()
else()  # never the system's in the place of one that was named
  find_library(ONNXRUNTIME_LIBRARY onnxruntime)
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(ONNXRuntime REQUIRED_VARS ONNXRUNTIME_LIBRARY REASON_FAILURE_MESSAGE
  "ONNXRUNTIME_ROOT '${ONNXRUNTIME_ROOT}' has no library. Name a release or the folder of Python's package onnxruntime (old ones \
have no library for others), or apt-get install libonnxruntime-dev")

if(ONNXRuntime_FOUND AND NOT TARGET u2moe::onnxruntime)
  get_filename_component(ONNXRUNTIME_FILE ${ONNXRUNTIME_LIBRARY} REALPATH)
  get_filename_component(name ${ONNXRUNTIME_FILE} NAME)
  string(REGEX MATCH "[0-9]+[.][0-9]+[.][0-9]+" ONNXRUNTIME_VERSION ${name})
  set(library ${ONNXRUNTIME_LIBRARY})
  set(ONNXRUNTIME_FILE_NAME "")
  if(ONNXRUNTIME_ROOT)
    set(ONNXRUNTIME_FILE_NAME ${name})
    if(name MATCHES "^(libonnxruntime[.]so[.][0-9]+)")
      # Programs ask for it by its soname; Python's package has the file alone.
      set(ONNXRUNTIME_FILE_NAME ${CMAKE_MATCH_1})
      set(library ${CMAKE_BINARY_DIR}/onnxruntime/${ONNXRUNTIME_FILE_NAME})
      file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/onnxruntime)
      execute_process(COMMAND ${CMAKE_COMMAND} -E create_symlink ${ONNXRUNTIME_FILE} ${library})
    elseif(name STREQUAL "onnxruntime.lib")  # of MSVC, beside the DLL
      set(ONNXRUNTIME_FILE_NAME onnxruntime.dll)
      string(REPLACE onnxruntime.lib onnxruntime.dll ONNXRUNTIME_FILE ${ONNXRUNTIME_FILE})
    endif()
  endif()
  add_library(u2moe::onnxruntime INTERFACE IMPORTED GLOBAL)
  target_link_libraries(u2moe::onnxruntime INTERFACE ${library})
endif()
