# Defines u2moe::onnxruntime. Looks for the files, because the packages that releases of onnxruntime bring name folders that
# they do not have. Installed with the library, which needs it wherever it is used.
find_path(ONNXRUNTIME_INCLUDE onnxruntime_cxx_api.h HINTS ${ONNXRUNTIME_ROOT}/include
          PATH_SUFFIXES onnxruntime onnxruntime/core/session)
find_library(ONNXRUNTIME_LIBRARY onnxruntime HINTS ${ONNXRUNTIME_ROOT}/lib)
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(ONNXRuntime REQUIRED_VARS ONNXRUNTIME_LIBRARY ONNXRUNTIME_INCLUDE
                                  REASON_FAILURE_MESSAGE "apt-get install libonnxruntime-dev, or set ONNXRUNTIME_ROOT to a release")

if(ONNXRuntime_FOUND AND NOT TARGET u2moe::onnxruntime)
  add_library(u2moe::onnxruntime INTERFACE IMPORTED GLOBAL)
  target_include_directories(u2moe::onnxruntime INTERFACE ${ONNXRUNTIME_INCLUDE})
  target_link_libraries(u2moe::onnxruntime INTERFACE ${ONNXRUNTIME_LIBRARY})
endif()
