// Exceptions of the library. Invalid options and hotwords are std::invalid_argument.
#pragma once

#include <stdexcept>
#include <string>

namespace u2moe {

/// Base class. All errors are thrown in the thread that made the call: the library has no threads of its own.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A bundle that is incomplete, damaged, of another version, or not a bundle; names the file, the field, what was found and
/// what was expected.
class BundleError : public Error {
 public:
  using Error::Error;
};

/// A file of a bundle differs from the digest in the manifest.
class IntegrityError : public BundleError {
 public:
  using BundleError::BundleError;
};

/// Audio that cannot be read or used; names the file or the property.
class AudioError : public Error {
 public:
  using Error::Error;
};

/// A stream was used after its end, or after a failure that has lost audio.
class StreamError : public Error {
 public:
  using Error::Error;
};

/// onnxruntime failed while it ran a graph; names the graph.
class InferenceError : public Error {
 public:
  using Error::Error;
};

}  // namespace u2moe
