#include "vad.hpp"

#include <algorithm>
#include <cmath>

#include "errors.hpp"
#include "settings.hpp"

namespace u2moe::runtime {
namespace {

constexpr std::size_t kContext = 64;  // samples before a window that are also input

}  // namespace

void VadOptions::check() const {
  check_range("threshold", threshold, 1e-9, 1 - 1e-9);
  check_range("end_threshold", end_threshold, 1e-9, threshold);
  check_range("min_silence", min_silence, 1e-3, 1e6);
  check_range("padding", padding, 0, min_silence / 2);
}

Vad::Vad(const std::string& content, const std::string& source, const VadOptions& options)
    : options_(options), source_(source), env_(ort::environment()) {
  options_.check();
  try {
    const auto settings = Settings(1, "onnxruntime", {}, nullptr).session_options(false);
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
    if (!is_known || outputs_.size() != 1 + shapes_.size()) throw ort::Failure("it has other inputs and outputs");
    Past past = start();
    run(std::vector<float>(kWindow).data(), past);
  } catch (const ort::Failure& error) {
    throw BundleError(source_ + ": is not silero VAD 5 or 6: " + error.what());
  }
}

Vad::Past Vad::start() const {
  Past past{std::vector<float>(kContext), {}};
  for (const ort::Shape& shape : shapes_) past.states.emplace_back(ort::count(shape));
  return past;
}

double Vad::probability(const float* window, Past& past) const {
  try {
    return run(window, past);
  } catch (const ort::Failure& error) {
    throw ProviderError(source_ + ": onnxruntime failed: " + error.what());
  }
}

double Vad::run(const float* window, Past& past) const {
  std::vector<float> row = past.context;
  row.insert(row.end(), window, window + kWindow);
  std::vector<std::int64_t> rate = {kRate};
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
  const std::vector<float> probabilities = ort::floats_of(*found[0]);
  if (probabilities.size() != 1) throw ort::Failure("it gives " + std::to_string(probabilities.size()) + " probabilities for a window");
  for (std::size_t i = 0; i < shapes_.size(); ++i) {
    past.states[i] = ort::floats_of(*found[1 + i]);
    if (past.states[i].size() != ort::count(shapes_[i])) throw ort::Failure("a state changes its size");
  }
  past.context.assign(row.end() - kContext, row.end());
  return static_cast<double>(probabilities[0]);
}

SpeechFinder::SpeechFinder(std::shared_ptr<const Vad> vad)
    : vad_(std::move(vad)), past_(vad_->start()),
      min_silent_(static_cast<std::size_t>(std::ceil(vad_->options().min_silence / (static_cast<double>(Vad::kWindow) / Vad::kRate)))),
      padding_(static_cast<std::size_t>(std::nearbyint(vad_->options().padding * Vad::kRate))) {}

std::vector<Speech> SpeechFinder::accept(const std::vector<float>& samples) {
  std::vector<Speech> found;
  held_.insert(held_.end(), samples.begin(), samples.end());
  while (held_start_ + held_.size() - heard_ >= Vad::kWindow) hear_window(found);
  return found;
}

std::vector<Speech> SpeechFinder::finish() {
  const std::size_t rest = held_start_ + held_.size() - heard_;
  std::vector<Speech> found = accept(std::vector<float>(rest ? Vad::kWindow - rest : 0));
  if (speaks_) found.push_back(part(std::min(spoken_ + padding_, heard_), true));
  return found;
}

void SpeechFinder::hear_window(std::vector<Speech>& found) {
  const bool goes_on = speaks_ && num_silent_ == 0;
  const double probability = vad_->probability(held_.data() + (heard_ - held_start_), past_);
  heard_ += Vad::kWindow;
  if (probability >= (goes_on ? vad_->options().end_threshold : vad_->options().threshold)) {
    if (!speaks_) {
      const std::size_t begin = heard_ - Vad::kWindow;
      given_ = std::max(given_, begin - std::min(begin, padding_));
      speaks_ = begins_ = true;
    }
    num_silent_ = 0;
    spoken_ = heard_;
    found.push_back(part(spoken_, false));
  } else if (++num_silent_ >= min_silent_ && speaks_) {
    found.push_back(part(spoken_ + padding_, true));
  }
  const std::size_t keep = speaks_ ? given_ : std::max(given_, heard_ - std::min(heard_, padding_));
  held_.erase(held_.begin(), held_.begin() + static_cast<std::ptrdiff_t>(keep - held_start_));
  held_start_ = keep;
}

Speech SpeechFinder::part(std::size_t end, bool ends) {
  const auto at = [this](std::size_t sample) { return held_.begin() + static_cast<std::ptrdiff_t>(sample - held_start_); };
  Speech speech{given_, {at(given_), at(end)}, begins_, ends};
  given_ = end;
  begins_ = false;
  speaks_ = !ends;
  return speech;
}

}  // namespace u2moe::runtime
