// Call the core functions that JavaScript uses with random JSON, files, audio and graph outputs: core_calls FOLDER SEED COUNT
// [SECONDS]. Anything other than a u2moe error would end the module in WebAssembly, and ends this program.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>

#include "../../runtime/web/core.cpp"

namespace {

std::mt19937 engine;

std::size_t below(std::size_t limit) { return limit ? engine() % limit : 0; }
bool one_in(std::size_t num) { return below(num) == 0; }

template <class T, std::size_t kSize>
const T& any(const T (&items)[kSize]) {
  return items[below(kSize)];
}

const char* const kOptions[] = {
    R"({"grammar": ["A [<a>]", "<a> = (a | b) a", "[unk]"], "chunk_size": 8})",
    R"({"hotwords": ["A", ["a", 2.5]], "beam_size": 4, "chunk_size": 8, "num_left_chunks": 4, "written": true})",
    R"({"search": "attention", "length_penalty": 1, "endpoint": {"rule1": null, "rule2": {"min_trailing_silence": 0.3}, "pause": 0.5, "turn": 0.1}})",
    R"({"search": "attention_rescoring", "ctc_weight": 0.5, "reverse_weight": 0.3, "padding_s": 0.3, "endpoint": true, "chunk_size": -1})",
    R"({"search": "ctc_greedy", "endpoint": {"rule1": {"must_contain_nonsilence": true, "min_utterance_length": 0.5}, "pause": null}})",
    R"({"vad": {"threshold": 0.5, "end_threshold": 0.3, "min_silence": 0.2, "padding": 0.1}, "search": "ctc_prefix_beam"})",
    R"({"weight": 0.4, "word_bonus": 0.2, "unknown_score": -4, "rescoring_weight": 1, "level": "word"})", "[]", "{}"};
const char* const kScalars[] = {"0", "-1", "1", "2", "1e9", "-1e308", "0.5", "2147483648", "1e-320", "-0", "true", "false", "null", "\"\"", "\"A\"",
                                "\"\\u0000\"", "\"\xe2\x96\x81\"", "\"\\ud83d\\ude00\"", "[]", "{}", "[[]]", "[null]", "\"attention\"", "[\"A\", 1, 2]", "-", "\""};
const char* const kKeys =
    "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAcG1sVLc+nNihZHu206Vpuh3J/t+Ivd0dxUXOhFnFwK0=\n-----END PUBLIC KEY-----\n";

std::string json(int depth = 0) {
  if (depth > 3 || one_in(2)) return any(kScalars);
  std::string text;
  const bool is_object = one_in(2);
  for (std::size_t i = below(4); i > 0; --i) {
    text += (text.empty() ? "" : ", ") + (is_object ? std::string("\"") + any({"rule1", "endpoint", "hotwords", "pause", "x"}) + "\": " : "") + json(depth + 1);
  }
  return is_object ? "{" + text + "}" : "[" + text + "]";
}

// Return a text with some values or bytes changed.
std::string changed(std::string text) {
  if (!one_in(3)) return text;
  for (std::size_t i = 1 + below(2); i > 0 && !text.empty(); --i) {
    const std::size_t place = below(text.size()), begin = text.find_first_of("[:, ", place);
    if (one_in(3) || begin == std::string::npos) {
      one_in(2) ? text.erase(place, below(9)) : text.insert(place, 1, static_cast<char>(below(256)));
    } else {
      const std::size_t end = std::min(text.find_first_of(",]}", begin + 1), text.size());
      text.replace(begin + 1, end - begin - 1, json());
    }
  }
  return text;
}

Floats numbers(std::size_t size, float scale, std::size_t oddity = 1000) {
  Floats found(size);
  for (float& each : found) each = oddity && one_in(oddity) ? any({0.0F, -1e30F, 1e30F, -std::numeric_limits<float>::infinity()}) : scale * static_cast<float>(below(1000)) / 1000;
  return found;
}

// Pass an output of the requested graph, mostly of the right size.
void give(StreamState* stream, const std::int32_t* asked, const Manifest& m) {
  const auto length = static_cast<std::size_t>(asked[2]), dim = static_cast<std::size_t>(m.output_size), mel = static_cast<std::size_t>(m.feature_size);
  const auto vocab = static_cast<std::size_t>(m.vocab_size);
  if (asked[0] == static_cast<int>(Request::Graph::kDecoder)) {
    const auto rows = static_cast<std::size_t>(asked[8]), width = static_cast<std::size_t>(asked[6]) / std::max<std::size_t>(rows, 1) + 1;
    const std::size_t decoders = m.bidirectional ? 2 : 1;
    const Floats scores = numbers(rows * (width * decoders + vocab), -5);
    stream_score(stream, scores.data(), scores.size(), rows, width, decoders);
    return;
  }
  std::size_t size = 1;
  if (asked[0] == static_cast<int>(Request::Graph::kEncoder)) {
    const std::size_t frames = length / mel, window = static_cast<std::size_t>(m.right_context) + 1;
    size = frames < window ? 0 : ((frames - window) / static_cast<std::size_t>(m.subsampling_rate) + 1) * dim;
  }
  if (asked[0] == static_cast<int>(Request::Graph::kCtc)) size = length / dim * vocab;
  const Floats output = numbers(one_in(200) ? below(3 * size + 3) : size, asked[0] == static_cast<int>(Request::Graph::kCtc) ? -9 : 1);
  stream_give(stream, output.data(), output.size());
}

void run(StreamState* stream, const Manifest& m) {
  const int rate = any({8000, 16000, 16000, 44100});
  for (std::size_t i = below(3); i > 0; --i) {
    const Floats samples = numbers(below(20000), 0.5F, one_in(20) ? 1000 : 0);
    stream_accept(stream, one_in(30) ? static_cast<int>(engine()) : rate, samples.data(), samples.size());
    for (int n = 0; n < 40; ++n) {
      const std::int32_t* const asked = stream_next(stream);
      if (!asked) break;
      give(stream, asked, m);
      stream_result(stream);
      stream_segment(stream);
    }
  }
  stream_finish(stream);
  for (int n = 0; n < 40; ++n) {
    const std::int32_t* const asked = stream_next(stream);
    if (!asked) break;
    give(stream, asked, m);
    while (stream_segment(stream)) {}
  }
  stream_result(stream);
}

struct Seeds {
  std::string manifest, tokens, arpa, compact;
};

void call(const Seeds& seeds) {
  const std::string manifest = changed(seeds.manifest), tokens = one_in(4) ? changed(seeds.tokens) : seeds.tokens;
  const std::string options = one_in(9) ? json() : changed(any(kOptions)), content = changed(one_in(2) ? seeds.arpa : seeds.compact);
  if (one_in(20)) {
    const std::string keys = changed("[" + json_text(std::string(kKeys)) + "]");
    const std::string file = changed(R"({"format": "u2moe-signature", "version": 1, "signatures": {"f4cc": "AAAA"}})");
    signatures(file.data(), file.size(), keys.data(), keys.size());
  }
  if (one_in(20)) {
    const std::unique_ptr<Resampler> resampler(resampler_create(any({0, -1, 999, 44100, 16000, 384000}), any({16000, 8000, 1000})));
    for (std::size_t i = below(4); i > 0; --i) {
      const Floats samples = numbers(below(5000), 1);
      resampler_accept(resampler.get(), samples.data(), samples.size());
    }
    resampler_accept(resampler.get(), nullptr, 0);
  }
  manifest_parse(manifest.data(), manifest.size());
  const std::unique_ptr<Model> model(model_create(manifest.data(), manifest.size(), tokens.data(), tokens.size()));
  std::unique_ptr<LanguageModel> given;
  if (one_in(3)) given.reset(language_model_create(model.get(), content.data(), content.size(), options.data(), options.size()));
  const std::unique_ptr<StreamState> stream(stream_create(model.get(), options.data(), options.size(), given.get(), nullptr));
  run(stream.get(), model->manifest);
}

std::string content_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

int main(int, char** arguments) {
  const std::string folder = arguments[1];
  const auto seed = static_cast<unsigned>(std::stoul(arguments[2])), count = static_cast<unsigned>(std::stoul(arguments[3]));
  const Seeds seeds{content_of(folder + "/bundle.json"), content_of(folder + "/tokens.txt"), content_of(folder + "/model.arpa"), content_of(folder + "/model.lm")};
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(arguments[4] ? std::stoi(arguments[4]) : 1 << 20);
  unsigned refused = 0, num = 0;
  for (; num < count && std::chrono::steady_clock::now() < end; ++num) {
    engine.seed(seed + num);
    try {
      call(seeds);
    } catch (const Error& error) {
      ++refused;
      if (std::getenv("CORE_CALLS_TELL")) std::puts(error.what());
    } catch (const std::exception& error) {
      std::fprintf(stderr, "seed %u: %s\n", seed + num, error.what());
      return 1;
    }
  }
  std::printf("%u %u\n", num, refused);
}
