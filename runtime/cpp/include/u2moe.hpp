/// C++17 classes for the C interface, with ownership, exceptions and containers. They are header-only, so the program and the
/// library may be built by different compilers. u2moe.h documents each function and the rules for threads.
///
///     u2moe::Recognizer recognizer("bundle");
///     u2moe::Stream stream = recognizer.create_stream();
///     stream.accept_waveform(48000, samples, num_samples);  // repeat for each buffer
///     stream.input_finished();
///     for (const u2moe::Result& segment : stream.take_segments()) show(segment.text);
#ifndef U2MOE_HPP
#define U2MOE_HPP

#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "u2moe.h"

namespace u2moe {

/// An error of the library. `code` identifies its kind.
class Error : public std::runtime_error {
 public:
  Error(u2moe_error code, const std::string& message) : std::runtime_error(message), code_(code) {}
  u2moe_error code() const { return code_; }

 private:
  u2moe_error code_;
};

inline void check(u2moe_error error) {
  if (error != U2MOE_OK) throw Error(error, u2moe_error_message());
}

/// Return the value that `function` writes to its last argument.
/// @throws Error if the function fails.
template <class T, class Function, class... Arguments>
T given_by(Function function, Arguments... arguments) {
  T found{};
  check(function(arguments..., &found));
  return found;
}

/// Owns a handle and frees it. Movable.
template <class T, u2moe_error (*kFree)(T)>
class Handle {
 public:
  Handle() = default;
  explicit Handle(T handle) : handle_(handle) {}
  Handle(Handle&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Handle() {
    if (handle_) kFree(handle_);
  }
  T get() const { return handle_; }

 private:
  T handle_ = nullptr;
};

using Hotwords = Handle<u2moe_hotwords, u2moe_hotwords_free>;
using LanguageModel = Handle<u2moe_language_model, u2moe_language_model_free>;
using Vad = Handle<u2moe_vad, u2moe_vad_free>;

/// View of a result, with the members of u2moe_result_view. The view must not outlive the result.
class ResultView : public u2moe_result_view {
 public:
  ResultView(u2moe_result handle) : u2moe_result_view(), handle_(handle) {  // NOLINT: implicit, for callbacks
    size = sizeof(u2moe_result_view);
    check(u2moe_result_get(handle, this));
  }

  /// The result as JSON, with the field names of the Python class.
  std::string json() const { return given_by<const char*>(u2moe_result_json, handle_); }

 private:
  u2moe_result handle_;
};

/// A result that owns its handle. Movable.
class Result : public ResultView {
 public:
  explicit Result(u2moe_result handle) : ResultView(handle), owned_(handle) {}

 private:
  Handle<u2moe_result, u2moe_result_free> owned_;
};

/// An options struct, constructed with the default values.
template <class T, u2moe_error (*kInit)(T*, std::size_t)>
struct Options : T {
  Options() : T() { check(kInit(this, sizeof(T))); }
};

using LanguageModelOptions = Options<u2moe_language_model_options, u2moe_language_model_options_init>;
using VadOptions = Options<u2moe_vad_options, u2moe_vad_options_init>;
using StreamOptions = Options<u2moe_stream_options, u2moe_stream_options_init>;

/// Runs `static.onnx`; see u2moe_runner. Returns 0, or another number if it failed. An exception ends the program.
using Runner = std::function<int(const std::vector<u2moe_tensor>& inputs, const std::vector<u2moe_tensor>& outputs)>;

struct RecognizerOptions : Options<u2moe_recognizer_options, u2moe_recognizer_options_init> {
  /// Set a runner. It must outlive the recogniser and all its streams and transcribers.
  void set_runner(Runner& function) {
    runner = [](void* context, const u2moe_tensor* inputs, std::size_t num_inputs, const u2moe_tensor* outputs,
                std::size_t num_outputs) noexcept -> std::int32_t {
      return (*static_cast<Runner*>(context))({inputs, inputs + num_inputs}, {outputs, outputs + num_outputs});
    };
    runner_context = &function;
  }
};

/// Set the function that receives log messages of the library and of onnxruntime; see u2moe_set_log. The function object is
/// never destroyed.
inline void set_log(std::function<void(int severity, const std::string& origin, const std::string& message)> log) {
  if (!log) return check(u2moe_set_log(nullptr, nullptr));
  using Log = decltype(log);
  const auto call = [](void* context, std::int32_t severity, const char* origin, const char* message) {
    (*static_cast<Log*>(context))(severity, origin, message);
  };
  check(u2moe_set_log(call, new Log(std::move(log))));
}

/// Compare every file of a bundle with its digest, without loading a model.
inline void verify(const std::string& folder) { check(u2moe_verify(folder.c_str())); }

inline Vad open_vad(const std::string& file, const VadOptions& options = {}) {
  return Vad(given_by<u2moe_vad>(u2moe_vad_open, file.c_str(), &options));
}

/// Recognises one audio source. Movable.
class Stream {
 public:
  explicit Stream(u2moe_stream handle) : handle_(handle) {}

  void accept_waveform(int sample_rate, const float* samples, std::size_t num) {
    check(u2moe_stream_accept_waveform(handle_.get(), sample_rate, samples, num));
  }
  void accept_waveform(int sample_rate, const std::int16_t* samples, std::size_t num) {
    check(u2moe_stream_accept_waveform_int16(handle_.get(), sample_rate, samples, num));
  }
  void input_finished() { check(u2moe_stream_input_finished(handle_.get())); }

  /// Return the final results of utterances that ended since the last call. Utterances without words are omitted.
  std::vector<Result> take_segments() {
    std::vector<Result> segments;
    while (const auto result = given_by<u2moe_result>(u2moe_stream_take_segment, handle_.get())) segments.emplace_back(result);
    return segments;
  }

  /// Partial result of the current utterance; see u2moe_stream_get_result.
  Result get_result() const { return Result(given_by<u2moe_result>(u2moe_stream_get_result, handle_.get())); }

  /// Whether take_segments has a result.
  bool is_endpoint() const { return given_by<std::int32_t>(u2moe_stream_is_endpoint, handle_.get()) != 0; }

  /// Whether the voice activity detector currently detects speech. take_speech_events returns the times at which speech began
  /// or ended, each once.
  bool is_speech() const { return given_by<std::int32_t>(u2moe_stream_is_speech, handle_.get()) != 0; }
  std::vector<u2moe_speech_event> take_speech_events() {
    std::vector<u2moe_speech_event> events;
    u2moe_speech_event event = {sizeof event, 0, 0};
    while (given_by<std::int32_t>(u2moe_stream_take_speech_event, handle_.get(), &event)) events.push_back(event);
    return events;
  }

  /// Discard everything and begin a new source.
  void reset() { check(u2moe_stream_reset(handle_.get())); }

  /// Queue samples for decode_streams, without decoding them.
  void feed(int sample_rate, const float* samples, std::size_t num) { check(u2moe_stream_feed(handle_.get(), sample_rate, samples, num)); }
  void feed(int sample_rate, const std::int16_t* samples, std::size_t num) {
    check(u2moe_stream_feed_int16(handle_.get(), sample_rate, samples, num));
  }
  void feed_finished() { check(u2moe_stream_feed_finished(handle_.get())); }
  double queued() const { return given_by<double>(u2moe_stream_queued, handle_.get()); }

  /// Make decoding stop within one chunk. Any thread may call this.
  void cancel() { check(u2moe_stream_cancel(handle_.get())); }

  /// Throw the error that ended recognition, if any.
  void check_failure() const { check(u2moe_stream_failure(handle_.get())); }
  u2moe_stream get() const { return handle_.get(); }

 private:
  Handle<u2moe_stream, u2moe_stream_free> handle_;
};

/// Recognise the queued audio of many streams in batches.
inline void decode_streams(const std::vector<Stream*>& streams) {
  std::vector<u2moe_stream> all;
  for (const Stream* stream : streams) all.push_back(stream->get());
  check(u2moe_decode_streams(all.data(), all.size()));
}

/// Functions that a transcriber calls in its thread; see u2moe_transcriber_callbacks. If a function throws, `on_error` gets
/// the message of the exception.
struct Callbacks {
  std::function<void(const ResultView&)> on_partial, on_final;
  std::function<void(u2moe_error, const std::string& message)> on_error;
  std::function<void(bool is_speech, double time)> on_speech;
};

/// Recognises one source in its own thread. Movable. The destructor cancels remaining work. A callback may destroy its own
/// transcriber.
class Transcriber {
 public:
  Transcriber(u2moe_recognizer recognizer, Callbacks callbacks, const StreamOptions& options)
      : callbacks_(std::make_shared<Shared>()) {
    static_cast<Callbacks&>(*callbacks_) = std::move(callbacks);
    u2moe_transcriber_callbacks calls;
    check(u2moe_transcriber_callbacks_init(&calls, sizeof calls));
    calls.context = callbacks_.get();
    calls.on_partial = [](void* context, u2moe_result result) { call(context, &Callbacks::on_partial, result); };
    calls.on_final = [](void* context, u2moe_result result) { call(context, &Callbacks::on_final, result); };
    calls.on_error = [](void* context, u2moe_error error, const char* message) { call(context, &Callbacks::on_error, error, message); };
    calls.on_speech = [](void* context, std::int32_t is_speech, double time) { call(context, &Callbacks::on_speech, is_speech != 0, time); };
    handle_ = Handle<u2moe_transcriber, u2moe_transcriber_free>(given_by<u2moe_transcriber>(u2moe_transcriber_create, recognizer, &options, &calls));
  }
  Transcriber(Transcriber&&) = default;
  Transcriber& operator=(Transcriber&&) = delete;  // would destroy the callbacks while the thread still calls them

  void feed(int sample_rate, const float* samples, std::size_t num) { check(u2moe_transcriber_feed(handle_.get(), sample_rate, samples, num)); }
  void feed(int sample_rate, const std::int16_t* samples, std::size_t num) {
    check(u2moe_transcriber_feed_int16(handle_.get(), sample_rate, samples, num));
  }
  double queued() const { return given_by<double>(u2moe_transcriber_queued, handle_.get()); }
  void input_finished() { check(u2moe_transcriber_input_finished(handle_.get())); }

  /// Finish the input and wait until all of it is recognised.
  void wait() { check(u2moe_transcriber_wait(handle_.get())); }
  void cancel() { check(u2moe_transcriber_cancel(handle_.get())); }

 private:
  struct Shared : Callbacks, std::enable_shared_from_this<Shared> {};

  // Call a function of `Callbacks`. No exception may leave the C callback.
  template <class Function, class... Arguments>
  static void call(void* context, Function Callbacks::*function, Arguments... arguments) noexcept {
    const auto own = static_cast<Shared*>(context)->shared_from_this();  // outlives this call if the callback destroys the transcriber
    try {
      if ((*own).*function) ((*own).*function)(arguments...);
    } catch (const std::exception& error) {
      if (own->on_error) own->on_error(U2MOE_INTERNAL_ERROR, error.what());  // another exception here ends the program
    }
  }

  std::shared_ptr<Shared> callbacks_;  // must outlive the handle
  Handle<u2moe_transcriber, u2moe_transcriber_free> handle_;
};

/// A loaded bundle. Threads may share it.
class Recognizer {
 public:
  explicit Recognizer(const std::string& folder, const RecognizerOptions& options = {})
      : handle_(given_by<u2moe_recognizer>(u2moe_recognizer_open, folder.c_str(), &options)) {}

  /// Load a bundle from memory. `files` maps file names to contents.
  explicit Recognizer(const std::map<std::string, std::string>& files, const RecognizerOptions& options = {}) {
    std::vector<u2moe_file> all;
    for (const auto& [name, content] : files) all.push_back({name.c_str(), content.data(), content.size()});
    handle_ = Handle<u2moe_recognizer, u2moe_recognizer_free>(given_by<u2moe_recognizer>(u2moe_recognizer_open_memory, all.data(), all.size(), &options));
  }

  int sample_rate() const { return given_by<std::int32_t>(u2moe_recognizer_sample_rate, handle_.get()); }

  /// Versions, kernels, providers, sizes and warnings as JSON; see u2moe_recognizer_describe.
  std::string describe() const { return given_by<const char*>(u2moe_recognizer_describe, handle_.get()); }

  /// Create hotwords from phrases and their weights. A weight of 0 stands for the default weight.
  Hotwords hotwords(const std::vector<std::pair<std::string, double>>& phrases) const {
    std::vector<u2moe_hotword> all;
    for (const auto& [phrase, weight] : phrases) all.push_back({phrase.c_str(), weight});
    return Hotwords(given_by<u2moe_hotwords>(u2moe_hotwords_create, handle_.get(), all.data(), all.size()));
  }

  /// Create hotwords from lines of the form "phrase" or "phrase :weight".
  Hotwords parse_hotwords(const std::string& lines) const {
    return Hotwords(given_by<u2moe_hotwords>(u2moe_hotwords_parse, handle_.get(), lines.c_str()));
  }

  LanguageModel language_model(const std::string& file, const LanguageModelOptions& options = {}) const {
    return LanguageModel(given_by<u2moe_language_model>(u2moe_language_model_open, handle_.get(), file.c_str(), &options));
  }

  /// Load a language model from the content of its file.
  LanguageModel language_model_of(const std::string& content, const LanguageModelOptions& options = {}) const {
    return LanguageModel(given_by<u2moe_language_model>(u2moe_language_model_open_memory, handle_.get(), content.data(), content.size(), &options));
  }

  /// Text of a token.
  std::string token(int number) const { return given_by<const char*>(u2moe_recognizer_token, handle_.get(), number); }

  Transcriber create_transcriber(Callbacks callbacks, const StreamOptions& options = {}) const {
    return Transcriber(handle_.get(), std::move(callbacks), options);
  }

  Stream create_stream(const StreamOptions& options = {}) const {
    return Stream(given_by<u2moe_stream>(u2moe_stream_create, handle_.get(), &options));
  }

 private:
  Handle<u2moe_recognizer, u2moe_recognizer_free> handle_;
};

}  // namespace u2moe

#endif  // U2MOE_HPP
