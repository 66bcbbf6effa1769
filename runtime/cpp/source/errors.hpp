// Exceptions inside the library; c_interface.cpp turns them into error codes. In WebAssembly, which has none here, JavaScript throws.
#pragma once

#include "text.hpp"
#include "u2moe.h"

namespace u2moe::runtime {

/// Something that a caller can do something about. Messages name the file, the field, what was found and what was expected.
class Error : public std::runtime_error {
 public:
  Error(u2moe_error code, const std::string& message) : std::runtime_error(legible(message)), code_(code) {}
  u2moe_error code() const { return code_; }

 private:
  u2moe_error code_;
};

/// An error with a code of its own, so that it can be caught by its kind.
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
/// Throws a JavaScript error, which unwinds the stack without destructors.
extern "C" [[noreturn]] __attribute__((import_module("u2moe"), import_name("fail"))) void u2moe_fail(int code, const char* message, std::size_t length);
#endif

/// The only place where what needs no onnxruntime throws.
template <class Kind>
[[noreturn]] void fail(const std::string& message) {
#ifdef __wasm__
  const std::string text = legible(message);
  u2moe_fail(Kind::kCode, text.data(), text.size());
#else
  throw Kind(message);
#endif
}

/// @throws InvalidArgument names the option.
inline void check_range(const char* name, double value, double least, double most) {
  if (value >= least && value <= most) return;
  fail<InvalidArgument>(std::string(name) + " must be from " + shown_number(least) + " to " + shown_number(most) + ", got " + shown_number(value));
}

}  // namespace u2moe::runtime
