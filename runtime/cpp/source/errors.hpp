// Exceptions inside the library. c_interface.cpp turns them into error codes. WebAssembly is built without C++
// exceptions; there, JavaScript throws the errors.
#pragma once

#include "text.hpp"
#include "u2moe.h"

namespace u2moe::runtime {

/// An error that the caller can fix. Its message names the file or field, the value found and the value expected.
class Error : public std::runtime_error {
 public:
  Error(u2moe_error code, const std::string& message) : std::runtime_error(legible(message)), code_(code) {}
  u2moe_error code() const { return code_; }

 private:
  u2moe_error code_;
};

/// The error class of each code, so that errors can be caught by type.
template <u2moe_error kTheCode>
class ErrorOf : public Error {
 public:
  static constexpr u2moe_error kCode = kTheCode;
  explicit ErrorOf(const std::string& message) : Error(kCode, message) {}
};

using InvalidArgument = ErrorOf<U2MOE_INVALID_ARGUMENT>;
using InvalidHandle = ErrorOf<U2MOE_INVALID_HANDLE>;
using BundleError = ErrorOf<U2MOE_BUNDLE_ERROR>;
using IntegrityError = ErrorOf<U2MOE_INTEGRITY_ERROR>;
using AudioError = ErrorOf<U2MOE_AUDIO_ERROR>;
using StreamError = ErrorOf<U2MOE_STREAM_ERROR>;
using ProviderError = ErrorOf<U2MOE_PROVIDER_ERROR>;
using KernelsError = ErrorOf<U2MOE_KERNELS_ERROR>;
using LanguageModelError = ErrorOf<U2MOE_LANGUAGE_MODEL_ERROR>;
using QueueFull = ErrorOf<U2MOE_QUEUE_FULL>;
using Cancelled = ErrorOf<U2MOE_CANCELLED>;
using SignatureError = ErrorOf<U2MOE_SIGNATURE_ERROR>;
using GrammarError = ErrorOf<U2MOE_GRAMMAR_ERROR>;

#ifdef __wasm__
/// Throw a JavaScript error. It unwinds the stack without running destructors.
extern "C" [[noreturn]] __attribute__((import_module("u2moe"), import_name("fail"))) void u2moe_fail(int code, const char* message, std::size_t length);
#endif

/// Throw an error. Code that does not use onnxruntime throws only through this function.
template <class Kind>
[[noreturn]] void fail(const std::string& message) {
#ifdef __wasm__
  const std::string text = legible(message);
  u2moe_fail(Kind::kCode, text.data(), text.size());
#else
  throw Kind(message);
#endif
}

/// @throws InvalidArgument if the value is out of range; the message names the option.
inline void check_range(const char* name, double value, double least, double most) {
  if (value >= least && value <= most) return;
  fail<InvalidArgument>(std::string(name) + " must be from " + shown_number(least) + " to " + shown_number(most) + ", got " + shown_number(value));
}

}  // namespace u2moe::runtime
