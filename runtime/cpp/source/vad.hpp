// Voice activity detection with silero VAD, as in runtime/decoding/vad.py. The user provides the network file.
#pragma once

#include "settings.hpp"
#include "stream_state.hpp"

namespace u2moe::runtime {

/// The network of silero VAD. Immutable: threads may share it.
class Vad {
 public:
  /// Samples just before a window, and the states of the network after them.
  struct Past {
    std::vector<float> context;
    std::vector<std::vector<float>> states;
  };

  /// @throws BundleError if `content` is not a model of silero VAD 5 or 6. The message begins with `source`.
  Vad(const std::string& content, const std::string& source, const VadOptions& options)
      : options_(options), source_(source), env_(ort::environment()) {
    options_.check();
    try {
      const auto settings = Settings(1, "onnxruntime", {}, nullptr).session_options({});
      session_ = ort::made<OrtSession>(ort::api().CreateSessionFromArray, env_.get(), content.data(), content.size(), settings.get());
      inputs_ = ort::input_names(*session_);
      outputs_ = ort::output_names(*session_);
      for (std::size_t i = 0; i < inputs_.size(); ++i) {
        if (inputs_[i] != "input" && inputs_[i] != "sr") shapes_.push_back(ort::input_shape(*session_, i));
      }
      std::vector<std::string> sorted = inputs_;
      std::sort(sorted.begin(), sorted.end());
      const bool is_known = sorted == std::vector<std::string>{"input", "sr", "state"} || sorted == std::vector<std::string>{"input", "state"} ||
                            sorted == std::vector<std::string>{"c", "h", "input"};
      if (!is_known || outputs_.size() != 1 + shapes_.size()) throw ort::Failure("unexpected inputs or outputs");
      Past past = start();
      run(std::vector<float>(SpeechFinder::kWindow).data(), past);
    } catch (const ort::Failure& error) {
      throw BundleError(source_ + ": is not silero VAD 5 or 6: " + error.what());
    }
  }

  const VadOptions& options() const { return options_; }

  Past start() const {
    Past past{std::vector<float>(kContext), {}};
    for (const ort::Shape& shape : shapes_) past.states.emplace_back(ort::count(shape));
    return past;
  }

  /// Return the probability that a window of `SpeechFinder::kWindow` samples is speech.
  /// @throws ProviderError if onnxruntime fails.
  float probability(const float* window, Past& past) const {
    try {
      return run(window, past);
    } catch (const ort::Failure& error) {
      throw ProviderError(source_ + ": onnxruntime failed: " + error.what());
    }
  }

 private:
  static constexpr std::size_t kContext = 64;  // samples before a window that the network also gets

  float run(const float* window, Past& past) const {
    std::vector<float> row = past.context;
    row.insert(row.end(), window, window + SpeechFinder::kWindow);
    std::vector<std::int64_t> rate = {SpeechFinder::kRate};
    ort::Values values;
    std::size_t state = 0;
    for (const std::string& name : inputs_) {
      if (name == "input") {
        values.push_back(ort::tensor(row, {1, static_cast<std::int64_t>(row.size())}));
      } else if (name == "sr") {
        values.push_back(ort::tensor(rate, {}));
      } else {
        values.push_back(ort::tensor(past.states[state], shapes_[state]));
        ++state;
      }
    }
    const ort::Values found = ort::run(*session_, inputs_, values, outputs_);
    const std::vector<float> probabilities = ort::numbers_of<float>(*found[0]);
    if (probabilities.size() != 1) throw ort::Failure("it returned " + std::to_string(probabilities.size()) + " probabilities for one window");
    for (std::size_t i = 0; i < shapes_.size(); ++i) {
      past.states[i] = ort::numbers_of<float>(*found[1 + i]);
      if (past.states[i].size() != ort::count(shapes_[i])) throw ort::Failure("a state changed its size");
    }
    past.context.assign(row.end() - kContext, row.end());
    return probabilities[0];
  }

  VadOptions options_;
  std::string source_;
  ort::Owned<OrtEnv> env_;
  ort::Owned<OrtSession> session_;
  std::vector<std::string> inputs_, outputs_;
  std::vector<ort::Shape> shapes_;  // shapes of the states
};

}  // namespace u2moe::runtime
