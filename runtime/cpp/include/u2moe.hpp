/// The C interface as C++17: owners, exceptions, containers. Header-only, so that programs and library may be built by different
/// compilers; u2moe.h says what everything means, and how threads may use it.
///
///     u2moe::Recognizer recognizer("bundle");
///     u2moe::Stream stream = recognizer.create_stream();
///     stream.accept_waveform(48000, samples, num_samples);  // any number of samples, as often as there are some
///     stream.input_finished();
///     for (const u2moe::Result& segment : stream.take_segments()) show(segment.text);
#ifndef U2MOE_HPP
#define U2MOE_HPP

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "u2moe.h"

namespace u2moe {

/// What went wrong; `code` says whose fault it is.
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

/// What a function of the C interface gives in its last argument.
template <class T, class Function, class... Arguments>
T given_by(Function function, Arguments... arguments) {
  T found{};
  check(function(arguments..., &found));
  return found;
}

/// Owns a handle.
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

/// Members are those of u2moe_result_view, and live as long as this. Movable.
class Result : public u2moe_result_view {
 public:
  explicit Result(u2moe_result handle) : u2moe_result_view(), handle_(handle) {
    size = sizeof(u2moe_result_view);
    check(u2moe_result_get(handle, this));
  }

  /// With the names that Python's results have.
  std::string json() const { return given_by<const char*>(u2moe_result_json, handle_.get()); }

 private:
  Handle<u2moe_result, u2moe_result_free> handle_;
};

/// A struct of options with the defaults.
template <class T, u2moe_error (*kInit)(T*, std::size_t)>
struct Options : T {
  Options() : T() { check(kInit(this, sizeof(T))); }
};

using RecognizerOptions = Options<u2moe_recognizer_options, u2moe_recognizer_options_init>;
using LanguageModelOptions = Options<u2moe_language_model_options, u2moe_language_model_options_init>;
using VadOptions = Options<u2moe_vad_options, u2moe_vad_options_init>;
using StreamOptions = Options<u2moe_stream_options, u2moe_stream_options_init>;

inline Vad open_vad(const std::string& file, const VadOptions& options = {}) {
  return Vad(given_by<u2moe_vad>(u2moe_vad_open, file.c_str(), &options));
}

/// One source of audio. Movable.
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

  /// Final results of utterances that have words, each once.
  std::vector<Result> take_segments() {
    std::vector<Result> segments;
    while (const auto result = given_by<u2moe_result>(u2moe_stream_take_segment, handle_.get())) segments.emplace_back(result);
    return segments;
  }

  /// The result so far of the current utterance.
  Result get_result() const { return Result(given_by<u2moe_result>(u2moe_stream_get_result, handle_.get())); }

  void reset() { check(u2moe_stream_reset(handle_.get())); }

 private:
  Handle<u2moe_stream, u2moe_stream_free> handle_;
};

/// A bundle, loaded. Threads may share it.
class Recognizer {
 public:
  explicit Recognizer(const std::string& folder, const RecognizerOptions& options = {})
      : handle_(given_by<u2moe_recognizer>(u2moe_recognizer_open, folder.c_str(), &options)) {}

  /// From files in memory: names and contents.
  explicit Recognizer(const std::map<std::string, std::string>& files, const RecognizerOptions& options = {}) {
    std::vector<u2moe_file> all;
    for (const auto& [name, content] : files) all.push_back({name.c_str(), content.data(), content.size()});
    handle_ = Handle<u2moe_recognizer, u2moe_recognizer_free>(given_by<u2moe_recognizer>(u2moe_recognizer_open_memory, all.data(), all.size(), &options));
  }

  int sample_rate() const { return given_by<std::int32_t>(u2moe_recognizer_sample_rate, handle_.get()); }

  /// What computes the graphs, as JSON.
  std::string describe() const { return given_by<const char*>(u2moe_recognizer_describe, handle_.get()); }

  /// Phrases to prefer and their weights; 0: the default.
  Hotwords hotwords(const std::vector<std::pair<std::string, double>>& phrases) const {
    std::vector<u2moe_hotword> all;
    for (const auto& [phrase, weight] : phrases) all.push_back({phrase.c_str(), weight});
    return Hotwords(given_by<u2moe_hotwords>(u2moe_hotwords_create, handle_.get(), all.data(), all.size()));
  }

  /// The same from lines of "phrase" or "phrase :weight".
  Hotwords parse_hotwords(const std::string& lines) const {
    return Hotwords(given_by<u2moe_hotwords>(u2moe_hotwords_parse, handle_.get(), lines.c_str()));
  }

  LanguageModel language_model(const std::string& file, const LanguageModelOptions& options = {}) const {
    return LanguageModel(given_by<u2moe_language_model>(u2moe_language_model_open, handle_.get(), file.c_str(), &options));
  }

  Stream create_stream(const StreamOptions& options = {}) const {
    return Stream(given_by<u2moe_stream>(u2moe_stream_create, handle_.get(), &options));
  }

 private:
  Handle<u2moe_recognizer, u2moe_recognizer_free> handle_;
};

}  // namespace u2moe

#endif  // U2MOE_HPP
