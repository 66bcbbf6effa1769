// Run the cases of tests/conformance: conformance(file) prints the results of one file of cases as JSON, in order.
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "manifest.hpp"
#include "u2moe.hpp"

using namespace u2moe::runtime;

std::string case_results(const std::string& kind, const Json& content);  // in cases.cpp

namespace {

Json read(const std::string& file) {
  std::ifstream stream(file, std::ios::binary);
  return Json::parse({std::istreambuf_iterator<char>(stream), {}}, file);
}

u2moe_endpoint_rule c_rule(const Json& rule) {
  if (rule.is_null()) return {0, 0, 0};
  return {rule["must_contain_nonsilence"].boolean(), rule["min_trailing_silence"].number(), rule["min_utterance_length"].number()};
}

// Set the numbers of a C struct from the fields of an object.
template <class Numbers, class Options>
void set_numbers(const Json& json, Options& options) {
  Numbers::each([&](const char* name, auto, const Range&, auto given) {
    if (json.has(name)) options.*given = static_cast<std::decay_t<decltype(options.*given)>>(json[name].number());
  });
}

}  // namespace

void conformance(const std::string& kind, const std::string& file);
void conformance(const std::string& kind, const std::string& file) { std::printf("%s\n", case_results(kind, read(file)).c_str()); }

// Recognise recordings through the public interface and print the segments of each case. Samples are at 16 kHz; a case repeats
// them.
void recognize_cases(const std::string& file, const u2moe::Recognizer& recognizer, const std::vector<float>& samples, const std::string& model,
                     const std::string& networks);
void recognize_cases(const std::string& file, const u2moe::Recognizer& recognizer, const std::vector<float>& samples, const std::string& model,
                     const std::string& networks) {
  const Json content = read(file);
  for (const Json& each : content["cases"].array()) {
    const Json& chosen = each["options"];
    u2moe::StreamOptions options;
    u2moe::Hotwords hotwords;
    u2moe::LanguageModel language_model;
    u2moe::Vad vad;
    options.chunk_size = chosen["chunk_size"].is_null() ? U2MOE_FULL_CONTEXT : chosen["chunk_size"].integer(1, 1000);
    set_numbers<StreamNumbers>(chosen, options);
    options.written = chosen.has("text_format");
    if (chosen.has("search")) options.search = chosen["search"].string().c_str();
    options.endpoint = !chosen.has("endpoint") || !chosen["endpoint"].is_null();
    if (options.endpoint && chosen.has("endpoint")) {
      const Json rules = Records().completed(chosen["endpoint"], "EndpointConfig");
      for (std::size_t i = 0; i < 3; ++i) options.rules[i] = c_rule(rules["rule" + std::to_string(i + 1)]);
      EndpointOptions own;
      own.read(rules);
      options.pause = own.pause;
      options.turn = own.turn;
    }
    const bool has_own = chosen.has("hotwords") && !chosen["hotwords"].string().empty();
    if (has_own) hotwords = recognizer.parse_hotwords(chosen["hotwords"].string());
    const bool has_none = chosen.has("language_model") && chosen["language_model"].is_null();
    if (chosen.has("language_model") && !has_none) {
      u2moe::LanguageModelOptions weights;
      set_numbers<LanguageModelNumbers>(chosen["language_model"], weights);
      language_model = recognizer.language_model(model, weights);
    }
    if (chosen.has("vad")) {
      const Json& given = chosen["vad"];
      u2moe::VadOptions when;
      set_numbers<VadNumbers>(given, when);
      vad = u2moe::open_vad(networks + "/" + given["network"].string() + ".onnx", when);
    }
    options.hotwords = chosen.has("hotwords") && !has_own ? U2MOE_NO_HOTWORDS : hotwords.get();
    options.language_model = has_none ? U2MOE_NO_LANGUAGE_MODEL : language_model.get();
    options.vad = vad.get();
    std::string lines;
    for (std::size_t i = 0; chosen.has("grammar") && i < chosen["grammar"].array().size(); ++i) lines += chosen["grammar"][i].string() + "\n";
    if (chosen.has("grammar")) options.grammar = lines.c_str();
    u2moe::Stream stream = recognizer.create_stream(options);
    for (int i = 0; i < each["repeats"].integer(1, 100); ++i) stream.accept_waveform(16000, samples.data(), samples.size());
    stream.input_finished();
    std::printf("%s\n", json_list(stream.take_segments(), [](const u2moe::Result& segment) { return segment.json(); }).c_str());
  }
}
