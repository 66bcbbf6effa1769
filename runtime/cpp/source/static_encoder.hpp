// Inputs and caches of `static.onnx` for a chunk of one stream, as in runtime/model/static_encoder.py.
#pragma once

#include "bundle.hpp"
#include "ort.hpp"

namespace u2moe::runtime {

/// Shape of a tensor as text for messages. An empty shape stands for a tensor of another type; a negative size, for any size.
inline std::string shown(const ort::Shape& shape, const char* type = "float32") {
  if (shape.empty()) return std::string("not ") + type;
  return std::string(type) + " [" + joined(shape, ", ", [](std::int64_t size) { return size < 0 ? "any" : std::to_string(size); }) + "]";
}

/// Prepares the inputs of an encoder with fixed shapes. Caches that grow in other bundles keep only the last frames here.
class StaticEncoder {
 public:
  /// @throws BundleError if a cache's initial values are invalid, or if a cache does not have one step per block.
  explicit StaticEncoder(const Bundle& bundle) : m_(bundle.manifest()), form_(*m_.form) {
    const std::int64_t rate = m_.subsampling_rate / m_.frame_reduction;
    const auto add = [&](const std::string& name, const ort::Shape& shape) {
      const std::string where = bundle.path("bundle.json") + ": model: static: input ";
      if (num_numbers(shape) > kMostNumbers) throw BundleError(where + name + " is " + shown(shape) + ", which is too large");
      names_.push_back(name);
      shapes_[name] = shape;
    };
    shapes_["output"] = {1, form_.chunk_size, m_.output_size};
    add("chunk", {1, form_.chunk_size * m_.subsampling_rate - rate + m_.right_context + 1, m_.feature_size});
    for (const StaticForm::Rate& each : form_.rates) {
      const std::int64_t num_keys = (form_.num_left_chunks + 1) * frames(each.step);
      add(each.mask, {1, 1, 1, num_keys});
      if (!each.positions.empty()) add(each.positions, {1, num_keys, 2 * static_cast<std::int64_t>(form_.frequencies.size())});
    }
    for (const CacheLayout& cache : m_.caches) {
      const ort::Shape& own = cache.shape;
      add(cache.name, cache.time_axis < 0 ? ort::Shape{1, own[0] * own[3], own[2]} : ort::Shape{1, own[0] * own[2], left(step(cache)), own[4]});
      shapes_["r_" + cache.name] = shapes_[cache.name];
      if (cache.time_axis >= 0) {
        starts_[cache.name].resize(ort::count(shapes_[cache.name]));
        continue;
      }
      const StaticForm::History& history = form_.histories[cache.name];
      if (history.steps.size() != static_cast<std::size_t>(own[0])) {
        throw BundleError(bundle.path("bundle.json") + ": model: static: histories: expected a step per block of " +
                          cache.name);
      }
      starts_[cache.name] = array_of(bundle, history.start, shapes_[cache.name]);
    }
  }

  const std::vector<std::string>& names() const { return names_; }  ///< names of the graph's inputs, in order
  const ort::Shape& shape(const std::string& name) const { return shapes_.at(name); }  ///< shape of an input or output
  const Floats& start(const std::string& cache) const { return starts_.at(cache); }  ///< initial value of a cache

  /// Number of subsampled frames that a window of features yields. `num_outputs` converts it to a number of output frames.
  std::int64_t num_frames(const Floats& window) const {
    const std::int64_t rate = m_.subsampling_rate / m_.frame_reduction;
    return (static_cast<std::int64_t>(window.size()) / m_.feature_size - m_.right_context - 1) / rate + 1;
  }
  std::int64_t num_outputs(std::int64_t num_frames) const { return (num_frames - 1) / m_.frame_reduction + 1; }

  /// Position of a chunk after `offset` output frames. It and the chunk's length, `num_frames`, count frames after subsampling.
  std::int64_t position(std::int64_t offset, std::int64_t num_frames) const {
    const std::int64_t begin = offset * m_.frame_reduction, limit = std::int64_t{m_.max_position} * m_.frame_reduction;
    const std::int64_t base = form_.first_position * m_.frame_reduction;
    if (begin + num_frames <= limit) return begin;
    if (begin <= limit) return std::min(begin, base);
    return base + (begin - limit / num_frames * num_frames) % std::max((limit - base) / num_frames * num_frames, std::int64_t{1});
  }

  /// Return the inputs for a window at `position`, without the caches. The caches contain `num_cached` output frames.
  std::map<std::string, Floats> feeds(const Floats& window, std::int64_t position, std::int64_t num_cached) const {
    std::map<std::string, Floats> found = {{"chunk", window}};
    found["chunk"].resize(ort::count(shape("chunk")));
    for (const StaticForm::Rate& rate : form_.rates) {
      const std::int64_t before = left(rate.step), kept = std::min(before, (num_cached * m_.frame_reduction + rate.step - 1) / rate.step);
      const std::int64_t num = (num_frames(window) - 1) / rate.step + 1;
      for (std::int64_t place = -before; place < frames(rate.step); ++place) {
        const std::int64_t key = position + place * rate.step;
        found[rate.mask].push_back(key >= 0 && place >= -kept && place < num ? 0.0F : kMasked);
        if (!rate.positions.empty()) add_encoding(found[rate.positions], static_cast<float>(key));
      }
    }
    return found;
  }

  /// In a cache of fixed size, replace frames before the start of the stream by initial values. The chunk is at `position`.
  void begin_history(const CacheLayout& cache, std::int64_t position, float* data) const {
    if (cache.time_axis >= 0) return;
    const float* start = starts_.at(cache.name).data();
    const std::int64_t past = cache.shape[3], width = cache.shape[2];
    for (const std::int64_t step : form_.histories.at(cache.name).steps) {
      for (std::int64_t frame = -past; frame < 0; ++frame, data += width, start += width) {
        if (position + frame * step < 0) std::copy_n(start, width, data);
      }
    }
  }

  /// Set a cache to zero except for the last `num_cached` output frames. Caches without a `time_axis` are left unchanged.
  void keep_last(const CacheLayout& cache, std::int64_t num_cached, float* data) const {
    if (cache.time_axis < 0) return;
    const std::int64_t num = left(step(cache)), width = cache.shape[4], rows = cache.shape[0] * cache.shape[2];
    const std::int64_t lost = num - std::min(num, cache.num_cached(num_cached));
    for (std::int64_t row = 0; row < rows; ++row) std::fill_n(data + row * num * width, lost * width, 0.0F);
  }

  std::int64_t num_left() const { return form_.num_left_chunks * form_.chunk_size; }  ///< left context in encoder frames

 private:
  static constexpr float kMasked = -24;

  // Number of frames in a chunk or in its left context, counting every `step`-th frame after subsampling.
  std::int64_t frames(std::int64_t step) const { return (form_.chunk_size * m_.frame_reduction - 1) / step + 1; }
  std::int64_t left(std::int64_t step) const { return form_.num_left_chunks * frames(step); }
  std::int64_t step(const CacheLayout& cache) const { return std::llround(m_.frame_reduction / cache.rate); }

  void add_encoding(Floats& all, float position) const {
    const auto wave = [position](float frequency, bool is_cosine) { return is_cosine ? std::cos(position * frequency) : std::sin(position * frequency); };
    for (const bool second : {false, true}) {
      for (const float frequency : form_.frequencies) {
        all.push_back(wave(frequency, second));
        if (form_.interleaved) all.push_back(wave(frequency, true));
      }
      if (form_.interleaved) return;
    }
  }

  // Read an array of floats from a file in numpy's format: magic, version, header length, header, floats.
  static Floats array_of(const Bundle& bundle, const std::string& file, const ort::Shape& shape) {
    const std::string content = bundle.verified(file), sizes = joined(shape, ", ", [](std::int64_t size) { return std::to_string(size); });
    const std::string expected = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + sizes + "), }";
    Floats found(ort::count(shape));
    const std::size_t size = found.size() * sizeof(float), begin = content.size() < size ? 0 : content.size() - size;
    const std::string header = content.substr(std::min<std::size_t>(content.size(), 10), std::min<std::size_t>(begin, 200));
    if (content.compare(0, 6, "\x93NUMPY") != 0 || header.compare(0, expected.size(), expected) != 0) {
      throw BundleError(bundle.path(file) + ": is not a numpy array with " + expected);
    }
    std::memcpy(found.data(), content.data() + begin, size);
    return found;
  }

  Manifest m_;
  StaticForm form_;
  std::vector<std::string> names_;
  std::map<std::string, ort::Shape> shapes_;
  std::map<std::string, Floats> starts_;
};

}  // namespace u2moe::runtime
