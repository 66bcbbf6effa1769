// What JavaScript calls of the C++ core (runtime/cpp/source), compiled to WebAssembly by build.py. Strings come as UTF-8 with a
// length, and go as UTF-8 that ends with 0 and lasts until the next call. Errors are thrown by JavaScript; see errors.hpp.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "errors.hpp"
#include "json.hpp"
#include "recognition.hpp"
#include "resampler.hpp"
#include "speech.hpp"

#define EXPORT(name) extern "C" __attribute__((export_name(#name)))

using namespace u2moe::runtime;

std::string case_results(const std::string& kind, const Json& content);  // of tests/cpp/cases.cpp

namespace {

struct Model {
  Manifest manifest;
  Vocabulary vocabulary;
};

using LanguageModel = std::shared_ptr<const Fusion>;

std::string answer;
Floats resampled;
std::vector<std::int64_t> hyps, lens;

const char* told(std::string text) {
  answer = std::move(text);
  return answer.c_str();
}

double number(const Json& json, const char* name, double otherwise) { return json.has(name) ? json[name].number() : otherwise; }

std::optional<EndpointRule> rule_of(const Json& json) {
  if (json.is_null()) return std::nullopt;
  const bool needs_speech = json.has("must_contain_nonsilence") && json["must_contain_nonsilence"].boolean();
  return EndpointRule{needs_speech, number(json, "min_trailing_silence", 0), number(json, "min_utterance_length", 0)};
}

StreamOptions options_of(const Json& json, const Model& model, const LanguageModel* language_model) {
  const auto given = [&json](const char* name) { return json.has(name) && !json[name].is_null(); };
  StreamOptions options;
  options.beam_size = 0;  // as the bundle has it
  if (given("chunk_size")) options.chunk_size = json["chunk_size"].integer(-1, 10000);
  if (given("num_left_chunks")) options.num_left_chunks = json["num_left_chunks"].integer(-1, 1000000000);
  if (given("search")) options.search = search_of(json["search"].string());
  if (given("beam_size")) options.beam_size = json["beam_size"].integer(1, 1000);
  if (given("ctc_weight")) options.ctc_weight = json["ctc_weight"].number();
  if (given("reverse_weight")) options.reverse_weight = json["reverse_weight"].number();
  if (given("padding_s")) options.padding_s = json["padding_s"].number();
  if (given("length_penalty")) options.length_penalty = json["length_penalty"].number();
  // true: as the bundle has it; an object is on top of what the library has.
  const bool is_own = given("endpoint") && !json["endpoint"].is_boolean();
  options.endpoint = is_own || (given("endpoint") && json["endpoint"].boolean());
  if (!is_own) {
    options.rules = model.manifest.rules;
    options.pause = model.manifest.pause;
  }
  for (std::size_t i = 0; is_own && i < options.rules.size(); ++i) {
    const std::string name = "rule" + std::to_string(i + 1);
    if (json["endpoint"].has(name)) options.rules[i] = rule_of(json["endpoint"][name]);
  }
  if (is_own && json["endpoint"].has("pause")) options.pause = json["endpoint"]["pause"].is_null() ? 0 : json["endpoint"]["pause"].number();
  std::vector<Hotword> hotwords;
  if (given("hotwords")) {
    for (const Json& each : json["hotwords"].array()) hotwords.push_back({each.array()[0].string(), each.array()[1].number()});
  } else if (!json.has("hotwords") && options.has_beam()) {
    hotwords = parse_hotwords(model.manifest.hotwords);
  }
  if (!hotwords.empty()) options.hotwords = std::make_shared<const ContextGraph>(hotwords, model.vocabulary);
  if (language_model) options.language_model = *language_model;
  options.written = given("written") && json["written"].boolean();
  return options;
}

}  // namespace

EXPORT(manifest_check) void manifest_check(const char* text, std::size_t size) { Manifest::of(Json::parse({text, size}, "bundle.json")); }

EXPORT(model_create) Model* model_create(const char* manifest, std::size_t manifest_size, const char* tokens, std::size_t tokens_size) {
  auto model = std::make_unique<Model>();
  model->manifest = Manifest::of(Json::parse({manifest, manifest_size}, "bundle.json"));
  model->vocabulary = Vocabulary::parse({tokens, tokens_size}, "tokens.txt");
  const std::size_t found = model->vocabulary.size();
  if (found != static_cast<std::size_t>(model->manifest.vocab_size)) {
    fail<BundleError>("tokens.txt: has " + std::to_string(found) + " symbols, expected vocab_size " + std::to_string(model->manifest.vocab_size));
  }
  return model.release();
}

EXPORT(language_model_create)
LanguageModel* language_model_create(const Model* model, const char* content, std::size_t size, const char* options, std::size_t options_size) {
  const Json json = Json::parse({options, options_size}, "language model");
  LanguageModelOptions weights;
  weights.weight = number(json, "weight", weights.weight);
  weights.word_bonus = number(json, "word_bonus", weights.word_bonus);
  weights.unknown_score = number(json, "unknown_score", weights.unknown_score);
  weights.rescoring_weight = number(json, "rescoring_weight", weights.rescoring_weight);
  if (json.has("level") && !json["level"].is_null()) weights.level = json["level"].string();
  weights.check();
  return new LanguageModel(std::make_shared<const Fusion>(Ngrams::parse({content, size}, "language model"), weights, model->vocabulary, "language model"));
}

EXPORT(language_model_free) void language_model_free(LanguageModel* model) { delete model; }

EXPORT(stream_create) Recognition* stream_create(const Model* model, const char* options, std::size_t size, const LanguageModel* language_model) {
  const StreamOptions chosen = options_of(Json::parse({options, size}, "options"), *model, language_model);
  return new Recognition(model->manifest, model->vocabulary, chosen);
}

EXPORT(stream_free) void stream_free(Recognition* stream) { delete stream; }
EXPORT(stream_chunk_size) int stream_chunk_size(const Recognition* stream) { return stream->options().chunk_size; }

EXPORT(stream_accept) void stream_accept(Recognition* stream, int sample_rate, const float* samples, std::size_t num) {
  stream->check(sample_rate, samples, num);
  stream->accept(samples, num);
}

EXPORT(stream_finish) void stream_finish(Recognition* stream) { stream->finish(); }

// {graph, input, its length, frames of caches to keep; for the decoder: hypotheses, their number, their lengths}; 0: none.
EXPORT(stream_next) const std::int32_t* stream_next(Recognition* stream) {
  static std::int32_t told_request[7];
  const auto request = stream->next();
  if (!request) return nullptr;
  const auto address = [](const void* place) { return static_cast<std::int32_t>(reinterpret_cast<std::uintptr_t>(place)); };
  hyps.clear();
  lens.clear();
  std::size_t longest = 1;
  for (std::size_t i = 0; request->hypotheses && i < request->hypotheses->size(); ++i) longest = std::max(longest, (*request->hypotheses)[i].size());
  for (std::size_t i = 0; request->hypotheses && i < request->hypotheses->size(); ++i) {
    const std::vector<int>& tokens = (*request->hypotheses)[i];
    hyps.insert(hyps.end(), tokens.begin(), tokens.end());
    hyps.resize(longest * (i + 1), stream->eos());
    lens.push_back(static_cast<std::int64_t>(tokens.size()));
  }
  const std::int32_t fields[] = {static_cast<std::int32_t>(request->graph), address(request->input->data()), static_cast<std::int32_t>(request->input->size()),
                                 static_cast<std::int32_t>(request->kept), address(hyps.data()), static_cast<std::int32_t>(lens.size()), address(lens.data())};
  std::copy(std::begin(fields), std::end(fields), told_request);
  return told_request;
}

EXPORT(stream_give) void stream_give(Recognition* stream, const float* output, std::size_t num) { stream->give(Floats(output, output + num)); }

// Scores [hypotheses, width] of the first decoder, those of the second, if there is one, and of next tokens [hypotheses, vocab].
EXPORT(stream_score)
void stream_score(Recognition* stream, const float* scores, std::size_t num, std::size_t rows, std::size_t width, std::size_t num_decoders) {
  const float *right = scores + rows * width, *next = scores + num_decoders * rows * width;
  stream->give(TokenScores{{scores, right}, {right, next}, width, {next, scores + num}});
}

EXPORT(stream_result) const char* stream_result(const Recognition* stream) { return told(as_json(stream->result())); }

EXPORT(stream_segment) const char* stream_segment(Recognition* stream) {
  const auto segment = stream->take_segment();
  return segment ? told(as_json(*segment)) : nullptr;
}

EXPORT(finder_create) SpeechFinder* finder_create(const char* text, std::size_t size) {
  const Json json = Json::parse({text, size}, "options");
  VadOptions options;
  options.threshold = number(json, "threshold", options.threshold);
  options.end_threshold = number(json, "end_threshold", options.end_threshold);
  options.min_silence = number(json, "min_silence", options.min_silence);
  options.padding = number(json, "padding", options.padding);
  options.check();
  return new SpeechFinder(options);
}

EXPORT(finder_free) void finder_free(SpeechFinder* finder) { delete finder; }
EXPORT(finder_accept) void finder_accept(SpeechFinder* finder, const float* samples, std::size_t num) { finder->accept({samples, samples + num}); }
EXPORT(finder_finish) void finder_finish(SpeechFinder* finder) { finder->finish(); }
EXPORT(finder_window) const float* finder_window(const SpeechFinder* finder) { return finder->window(); }
EXPORT(finder_hear) void finder_hear(SpeechFinder* finder, double probability) { finder->hear(probability); }

// {first sample, whether speech begins, whether it ends, samples, their number}; 0: none.
EXPORT(finder_take) const std::int32_t* finder_take(SpeechFinder* finder) {
  static std::optional<Speech> speech;
  static std::int32_t told_speech[5];
  speech = finder->take();
  if (!speech) return nullptr;
  const std::int32_t fields[] = {static_cast<std::int32_t>(speech->start), speech->begins, speech->ends,
                                 static_cast<std::int32_t>(reinterpret_cast<std::uintptr_t>(speech->samples.data())),
                                 static_cast<std::int32_t>(speech->samples.size())};
  std::copy(std::begin(fields), std::end(fields), told_speech);
  return told_speech;
}

EXPORT(resampler_create) Resampler* resampler_create(int source_rate, int target_rate) { return new Resampler(source_rate, target_rate); }
EXPORT(resampler_free) void resampler_free(Resampler* resampler) { delete resampler; }

// Null samples end the input. Gives the number of samples at `resampler_samples`.
EXPORT(resampler_accept) std::size_t resampler_accept(Resampler* resampler, const float* samples, std::size_t num) {
  resampled = samples ? resampler->accept(samples, num) : resampler->finish();
  return resampled.size();
}
EXPORT(resampler_samples) const float* resampler_samples() { return resampled.data(); }

// The results of a file of tests/conformance, so that what is tested is what ships.
EXPORT(case_results) const char* case_results_of(const char* kind, std::size_t kind_size, const char* content, std::size_t size) {
  return told(case_results({kind, kind_size}, Json::parse({content, size}, "cases")));
}
