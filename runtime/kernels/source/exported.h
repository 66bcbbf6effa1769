// Marks the functions of the library that programs call.
#pragma once

#ifdef U2MOE_KERNELS_INSIDE  // the kernels are part of another library, which exports only its own functions
#define U2MOE_EXPORT extern "C"
#elif defined(_WIN32)
#define U2MOE_EXPORT extern "C" __declspec(dllexport)
#else
#define U2MOE_EXPORT extern "C" __attribute__((visibility("default")))
#endif
