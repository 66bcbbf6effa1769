// Functions of the C++ core (runtime/cpp/source) for JavaScript. runtime/cpp/wasm.sh compiles them to WebAssembly. String
// arguments are UTF-8 with a length. Returned strings are null-terminated UTF-8 and valid until the next call. JavaScript
// throws the errors; see errors.hpp.
#include "errors.hpp"
#include "json.hpp"
#include "resampler.hpp"
#include "signature.hpp"
#include "stream_state.hpp"

#define EXPORT(name) extern "C" __attribute__((export_name(#name)))

using namespace u2moe::runtime;

std::string case_results(const std::string& kind, const Json& content);  // in tests/cpp/cases.cpp

namespace {

struct Model {
  Manifest manifest;
  Vocabulary vocabulary;
  std::shared_ptr<const ContextGraph> hotwords = nullptr;  // hotwords of the bundle; null: none
  mutable PhraseGraphs grammars = {};
};

using LanguageModel = std::shared_ptr<const Fusion>;

std::string answer;
Floats resampled;

const char* told(std::string text) {
  answer = std::move(text);
  return answer.c_str();
}

std::string text_of(const Json& json) {
  if (json.is_object()) {
    std::string text = json_list(json.object(), [](const auto& each) { return json_text(each.first) + ": " + text_of(each.second); });
    text.front() = '{', text.back() = '}';
    return text;
  }
  if (json.is_array()) return json_list(json.array(), text_of);
  if (json.is_string()) return json_text(json.string());
  return json.is_null() ? "null" : json.is_boolean() ? (json.boolean() ? "true" : "false") : json_text(json.number());
}

StreamOptions options_of(const Json& json, const Model& model, const LanguageModel* given, const LanguageModel* bundled) {
  StreamOptions options(model.manifest);
  read_numbers<StreamNumbers>(json, options);
  if (json.given("chunk_size")) options.chunk_size = json["chunk_size"].integer(-1, 10000);
  if (json.given("search")) options.search = search_of(json["search"].string());
  if (json.has("endpoint")) {
    const Json& endpoint = json["endpoint"];
    options.endpoint = endpoint.is_object() || (!endpoint.is_null() && endpoint.boolean());
    if (endpoint.is_object()) {  // missing rules get the defaults of the library
      options.read(Records().completed(endpoint, "EndpointConfig"));
    }
  }
  if (json.given("grammar")) {
    std::vector<std::string> lines;
    for (const Json& each : json["grammar"].array()) lines.push_back(each.string());
    options.grammar = model.grammars.find(lines, model.vocabulary, model.manifest.blank);
  }
  if (json.given("hotwords")) {
    std::vector<Hotword> hotwords;
    for (const Json& each : json["hotwords"].array()) {
      const bool is_list = each.is_array() && !each.array().empty() && each.array().size() < 3;
      if (!is_list && !each.is_string()) each.fail("a phrase, or a list of a phrase and its weight");
      Hotword& hotword = hotwords.emplace_back(Hotword{is_list ? each[0].string() : each.string()});
      if (is_list && each.array().size() > 1) hotword.weight = each[1].number();
    }
    if (!hotwords.empty()) options.hotwords = std::make_shared<const ContextGraph>(hotwords, model.vocabulary);
  } else if (!json.has("hotwords") && options.has_beam() && !options.grammar) {
    options.hotwords = model.hotwords;
  }
  if (bundled && options.has_beam() && !options.grammar) options.language_model = *bundled;
  if (given) options.language_model = *given;
  options.written = json.given("written") && json["written"].boolean();
  return options;
}

}  // namespace

EXPORT(manifest_parse) const char* manifest_parse(const char* text, std::size_t size) {
  Json json = Json::parse({text, size}, "bundle.json");
  const Manifest manifest = Manifest::of(json);
  if (manifest.form) fail<BundleError>("bundle.json: model: static: JavaScript does not support graphs of fixed shape: open the original bundle");
  return told("{\"manifest\": " + text_of(json) + ", \"warnings\": " + json_text(manifest.warnings) + "}");
}

// Returns the prefix of the signed message, and pairs of key and signature in hexadecimal for the given keys (PEM).
EXPORT(signatures) const char* signatures(const char* content, std::size_t size, const char* keys, std::size_t keys_size) {
  std::vector<std::string> public_keys;
  const Json given = Json::parse({keys, keys_size}, "options: publicKeys");
  for (const Json& each : given.array()) public_keys.push_back(each.string());
  const Signatures found({content, size}, public_keys, kSignatureFile);
  const auto pair = [](const Signatures::Signed& each) { return json_text(std::vector<std::string>{hex_of(each.first), hex_of(each.second)}); };
  return told("{\"prefix\": " + json_text(std::string(kSignaturePrefix)) + ", \"signed\": " + json_list(found.by_demanded(), pair) + "}");
}

EXPORT(model_create) Model* model_create(const char* manifest, std::size_t manifest_size, const char* tokens, std::size_t tokens_size) {
  auto model = std::make_unique<Model>();
  Json json = Json::parse({manifest, manifest_size}, "bundle.json");
  model->manifest = Manifest::of(json);
  model->vocabulary = Vocabulary::parse({tokens, tokens_size}, "tokens.txt", model->manifest.vocab_size);
  return model.release();
}

// Separate from `model_create`, so that callers can tell errors in the bundle's hotwords from others.
EXPORT(model_read_hotwords) void model_read_hotwords(Model* model) {
  const std::vector<Hotword> hotwords = parse_hotwords(model->manifest.hotwords);
  if (!hotwords.empty()) model->hotwords = std::make_shared<const ContextGraph>(hotwords, model->vocabulary);
}

EXPORT(language_model_create)
LanguageModel* language_model_create(const Model* model, const char* content, std::size_t size, const char* options, std::size_t options_size) {
  const Json json = Json::parse({options, options_size}, "options");
  LanguageModelOptions weights;
  weights.read(json);
  return new LanguageModel(std::make_shared<const Fusion>(Ngrams::parse({content, size}, "language model"), weights, model->vocabulary, "language model"));
}

EXPORT(language_model_free) void language_model_free(LanguageModel* model) { delete model; }

EXPORT(stream_create)
StreamState* stream_create(const Model* model, const char* options, std::size_t size, const LanguageModel* given, const LanguageModel* bundled) {
  const Json json = Json::parse({options, size}, "options");
  std::optional<VadOptions> vad;
  if (json.given("vad")) read_numbers<VadNumbers>(json["vad"], vad.emplace());
  return new StreamState(model->manifest, model->vocabulary, options_of(json, *model, given, bundled), vad);
}

EXPORT(stream_free) void stream_free(StreamState* stream) { delete stream; }

EXPORT(stream_accept) void stream_accept(StreamState* stream, int sample_rate, const float* samples, std::size_t num) {
  stream->accept(sample_rate, samples, num);
}

EXPORT(stream_finish) void stream_finish(StreamState* stream) { stream->finish(); }

// Returns the request of the next graph, or null if more samples are needed. It consists of ten numbers. Three are for all
// graphs: graph, input, length of the input. Three are for the encoder: whether to begin with initial caches, frames to keep in
// caches, required frames of left context. Four are for the decoder: tokens, number of tokens, lengths, number of lengths.
EXPORT(stream_next) const std::int32_t* stream_next(StreamState* stream) {
  static std::int32_t told_request[10];
  const std::optional<Request> request = stream->next();
  if (!request) return nullptr;
  std::int32_t* place = told_request;
  const auto tell = [&place](std::int64_t number) { *place++ = static_cast<std::int32_t>(number); };
  const auto tell_array = [&tell](const auto* items) {
    tell(items ? static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(items->data())) : 0);
    tell(items ? static_cast<std::int64_t>(items->size()) : 0);
  };
  tell(static_cast<std::int64_t>(request->graph));
  tell_array(request->input);
  for (const std::int64_t number : {std::int64_t{request->begins}, request->kept, request->required}) tell(number);
  tell_array(request->sequences ? &request->sequences->tokens : nullptr);
  tell_array(request->sequences ? &request->sequences->lengths : nullptr);
  return told_request;
}

EXPORT(stream_give) void stream_give(StreamState* stream, const float* output, std::size_t num) { stream->give(Floats(output, output + num)); }

// `scores` has the scores [rows, width] of one or two decoders, then the log-probabilities [rows, vocab] of next tokens.
EXPORT(stream_score)
void stream_score(StreamState* stream, const float* scores, std::size_t num, std::size_t rows, std::size_t width, std::size_t num_decoders) {
  const float *right = scores + rows * width, *next = scores + num_decoders * rows * width;
  stream->give(TokenScores{{scores, right}, {right, next}, width, {next, scores + num}});
}

EXPORT(stream_result) const char* stream_result(const StreamState* stream) { return told(as_json(stream->result())); }

EXPORT(stream_segment) const char* stream_segment(StreamState* stream) {
  const auto segment = stream->take_segment();
  return segment ? told(as_json(*segment)) : nullptr;
}

EXPORT(resampler_create) Resampler* resampler_create(int source_rate, int target_rate) { return new Resampler(source_rate, target_rate); }
EXPORT(resampler_free) void resampler_free(Resampler* resampler) { delete resampler; }

// Resamples audio; null ends the input. Returns the number of samples that `resampler_samples` points to.
EXPORT(resampler_accept) std::size_t resampler_accept(Resampler* resampler, const float* samples, std::size_t num) {
  resampled = samples ? resampler->accept(samples, num) : resampler->finish();
  return resampled.size();
}
EXPORT(resampler_samples) const float* resampler_samples() { return resampled.data(); }

// Returns the results of a file of tests/conformance. The published binary has this function, so that tests can run the binary.
EXPORT(case_results) const char* case_results_of(const char* kind, std::size_t kind_size, const char* content, std::size_t size) {
  return told(case_results({kind, kind_size}, Json::parse({content, size}, "cases")));
}
