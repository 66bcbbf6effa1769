// Computes the cases of tests/conformance: the results of a file of cases as JSON, in order. Also compiled into
// runtime/web/core.wasm.
#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "ctc.hpp"
#include "endpoint.hpp"
#include "errors.hpp"
#include "json.hpp"
#include "recognition.hpp"
#include "resampler.hpp"

using namespace u2moe::runtime;

namespace {

template <class T>
std::vector<T> numbers(const Json& json) {
  std::vector<T> found;
  for (const Json& each : json.array()) found.push_back(static_cast<T>(each.number()));
  return found;
}

// Join rows.
std::vector<float> matrix(const Json& json) {
  std::vector<float> found;
  for (const Json& row : json.array()) {
    const std::vector<float> values = numbers<float>(row);
    found.insert(found.end(), values.begin(), values.end());
  }
  return found;
}

std::vector<Seconds> spans(const Json& json) {
  std::vector<Seconds> found;
  for (const Json& each : json.array()) found.emplace_back(each[0].number(), each[1].number());
  return found;
}

std::vector<float> samples_of(const Json& json) {
  std::vector<float> samples = numbers<float>(json["samples"]);
  for (float& sample : samples) sample /= 32768.0F;
  return samples;
}

std::string shown(const Seconds& span) { return json_text(std::vector<double>{span.first, span.second}); }

std::string object(const std::vector<std::pair<std::string, std::string>>& fields) {
  std::string text = "{";
  for (const auto& [name, value] : fields) text += (text.size() > 1 ? ", " : "") + json_text(name) + ": " + value;
  return text + "}";
}

Vocabulary vocabulary_of(const Json& shared) {
  std::string lines;
  int id = 0;
  for (const Json& symbol : shared["symbols"].array()) lines += symbol.string() + " " + std::to_string(id++) + "\n";
  return Vocabulary::parse(lines, "symbols");
}

std::shared_ptr<const Fusion> fusion_of(const Json& options, const Json& shared, const Vocabulary& vocabulary) {
  if (options.is_null()) return nullptr;
  LanguageModelOptions weights;
  weights.read(options);
  const std::string& name = options["model"].string();
  return std::make_shared<const Fusion>(Ngrams::parse(shared["models"][name].string(), name), weights, vocabulary, name);
}

std::string search(const Json& json, const Json& shared) {
  Vocabulary vocabulary = vocabulary_of(shared);
  const std::size_t width = vocabulary.size();  // width of a row
  const std::vector<float> frames = matrix(json["frames"]);
  std::shared_ptr<const ContextGraph> context;
  if (!json["hotwords"].is_null()) context = std::make_shared<const ContextGraph>(parse_hotwords(json["hotwords"].string()), vocabulary);
  std::shared_ptr<const PhraseGraph> grammar;
  if (json.given("grammar")) {
    std::vector<std::string> lines;
    for (const Json& each : json["grammar"].array()) lines.push_back(each.string());
    grammar = std::make_shared<const PhraseGraph>(lines, vocabulary, 0);
    vocabulary = grammar->vocabulary();
  }
  const double penalty = json["blank_penalty"].number();
  std::unique_ptr<CtcSearch> beams = std::make_unique<GreedySearch>(0, penalty);
  if (json["search"].string() == "ctc_prefix_beam") {
    const auto size = static_cast<std::size_t>(json["beam_size"].integer(1, 1000));
    const auto fusion = fusion_of(json["language_model"], shared, vocabulary);
    beams = std::make_unique<PrefixBeamSearch>(size, 0, context, fusion ? Fusion::states(fusion) : nullptr, penalty, grammar);
  }
  std::vector<std::vector<int>> committed;  // after each chunk: number of committed tokens, and first frame that may still change
  int num_tokens = 0;
  for (std::size_t place = 0, num = frames.size() / width; place <= num; place += 4) {
    beams->advance(frames.data() + place * width, std::min<std::size_t>(4, num - place), width);
    auto [tokens, ends] = beams->settled(vocabulary.word_starts());
    const std::vector<WordSpan> words = vocabulary.complete_words(tokens, ends);
    tokens.resize(words.empty() ? 0 : words.back().end);
    beams->commit(tokens);
    num_tokens += static_cast<int>(tokens.size());
    committed.push_back({num_tokens, beams->next_peak()});
  }
  const std::vector<int> partial = beams->hypotheses(1)[0].tokens;
  beams->finish();
  const std::vector<Hypothesis> found = beams->hypotheses();
  const std::vector<int> best = found.empty() ? std::vector<int>() : found[0].tokens;
  const auto of_each = [&](auto field) { return json_list(found, [&](const Hypothesis& each) { return json_text(field(each)); }); };
  const auto phrases = grammar ? grammar->phrases(best, true) : std::vector<std::pair<std::size_t, std::size_t>>();
  const auto word = [](const WordSpan& each) {
    return "[" + json_text(each.text) + ", " + std::to_string(each.begin) + ", " + std::to_string(each.end) + "]";
  };
  return object({{"partial", json_text(partial)},
                 {"committed", json_list(committed, [](const std::vector<int>& each) { return json_text(each); })},
                 {"tokens", of_each([](const Hypothesis& each) { return each.tokens; })},
                 {"times", of_each([](const Hypothesis& each) { return each.times; })},
                 {"scores", of_each([](const Hypothesis& each) { return std::vector<double>{each.score, each.context_score, each.language_score}; })},
                 {"probabilities", of_each([](const Hypothesis& each) { return each.probabilities; })},
                 {"text", json_text(vocabulary.text(best))},
                 {"phrases", json_list(phrases, [](const auto& each) { return "[" + std::to_string(each.first) + ", " + std::to_string(each.second) + "]"; })},
                 {"words", json_list(vocabulary.words(best), word)}});
}

std::optional<EndpointRule> rule_of(const Json& json) {
  if (json.is_null()) return std::nullopt;
  return EndpointRule{json["must_contain_nonsilence"].boolean(), json["min_trailing_silence"].number(), json["min_utterance_length"].number()};
}

EndpointRules all_rules(const Json& json) { return {rule_of(json["rule1"]), rule_of(json["rule2"]), rule_of(json["rule3"])}; }

std::string endpoint(const Json& json, const Json& shared) {
  const Vocabulary vocabulary = vocabulary_of(shared);
  const std::vector<float> frames = matrix(json["frames"]);
  Endpointer endpointer(all_rules(json["endpoint"]), json["frame_s"].number(), 0);
  const auto found = endpointer.advance(frames.data(), frames.size() / vocabulary.size(), vocabulary.size(), [](std::size_t) { return 0; });
  const auto cut = find_cut(vocabulary, numbers<int>(json["tokens"]), frames, vocabulary.size(), 0);
  return object({{"endpoint", found ? object({{"num_frames", std::to_string(found->num_frames)},
                                              {"trailing_silence", std::to_string(found->trailing_silence)}})
                                    : "null"},
                 {"cut", cut ? std::to_string(*cut) : "null"}});
}

// Return the partial results of each utterance when its second pass begins. The encoder numbers the frames; the CTC head
// returns the log-probabilities of the case for them.
std::string partials(const Json& json, const Json& shared) {
  const Vocabulary vocabulary = vocabulary_of(shared);
  const std::vector<float> frames = matrix(json["frames"]);
  Manifest m;
  m.streaming = m.has_decoder = true;
  m.output_size = 1;
  m.vocab_size = static_cast<int>(vocabulary.size());
  m.feature_size = m.num_mel_bins;
  m.subsampling_rate = 4;
  m.right_context = 6;
  m.front_end = std::make_shared<const FrontEnd>(m.sample_rate, m.frame_len(), m.shift_len(), m.num_mel_bins, 0, "povey", 20, 8000);
  StreamOptions options(m);
  options.chunk_size = json["chunk_size"].integer(1, 100);
  options.rules = all_rules(json["endpoint"]);
  Recognition recognition(m, vocabulary, options);
  recognition.accept(Floats(240 + (4 * frames.size() / vocabulary.size() + 3) * 160));
  recognition.finish();
  std::vector<Result> found;
  float number = 0;
  while (const std::optional<Request> request = recognition.next()) {
    const std::size_t num = request->input->size(), bins = static_cast<std::size_t>(m.num_mel_bins);
    Floats output;
    if (request->graph == Request::Graph::kEncoder) {
      output.resize((num / bins - 7) / 4 + 1);
      for (float& each : output) each = number++;
    } else if (request->graph == Request::Graph::kCtc) {
      for (const float each : *request->input) {
        const auto row = frames.begin() + static_cast<std::ptrdiff_t>(each) * m.vocab_size;
        output.insert(output.end(), row, row + m.vocab_size);
      }
    } else {
      found.push_back(recognition.result());
      const std::size_t width = request->sequences->longest + 1;
      recognition.give(TokenScores{Floats(request->sequences->lengths.size() * width), {}, width, {}});
      continue;
    }
    recognition.give(std::move(output));
  }
  const auto shown = [](const Result& each) {
    return "[" + json_text(each.text) + ", " + json_text(each.tokens) + ", " + std::to_string(each.num_committed) + ", " + json_text(each.committed_end) + "]";
  };
  return object({{"partials", json_list(found, shown)}});
}

std::string pauses(const Json& json, const Json&) {
  const std::vector<float> levels = numbers<float>(json["levels"]);
  const double frame_s = json["frame_s"].number();
  const std::vector<Seconds> found = find_pauses(levels, frame_s);
  std::vector<Seconds> words = spans(json["words"]);
  end_at_pauses(words, spans(json["peaks"]), found);
  const auto first = first_pause(levels, frame_s, json["pause"].number(), json["after_s"].number());
  return object({{"pauses", json_list(found, shown)}, {"words", json_list(words, shown)}, {"first", first ? shown(*first) : "null"}});
}

std::string padding(const Json& json, const Json&) {
  Manifest manifest;
  manifest.sample_rate = 16000;
  manifest.frame_length_ms = 25;
  Padding padding(json["padding_s"].number(), manifest);
  const std::vector<float> samples = samples_of(json);
  const auto split = samples.begin() + json["split"].integer(0, 100000);
  std::vector<float> heard;
  for (const std::vector<float>& part : {padding.accept({samples.begin(), split}), padding.accept({split, samples.end()}), padding.finish()}) {
    heard.insert(heard.end(), part.begin(), part.end());
  }
  const auto num_sounds = static_cast<std::ptrdiff_t>(heard.size()) - std::count(heard.begin(), heard.end(), 0.0F);
  return object({{"num_before", std::to_string(padding.num_before())}, {"num_heard", std::to_string(heard.size())}, {"num_sounds", std::to_string(num_sounds)}});
}

std::string features(const Json& json, const Json&) {
  Manifest m;
  read_numbers<FeatureNumbers>(json["features"], m);
  const Floats found = m.front_end_of(json["features"])->features(samples_of(json));
  return object({{"features", json_text(std::vector<double>(found.begin(), found.end()))}});
}

std::string resampling(const Json& json, const Json&) {
  const std::vector<float> samples = samples_of(json);
  const auto resampled = [&](std::size_t buffer) {
    Resampler resampler(json["rate"].integer(1000, 384000), 16000);
    std::vector<double> found;
    for (std::size_t begin = 0; begin <= samples.size(); begin += buffer) {
      const std::size_t num = std::min(buffer, samples.size() - begin);
      const std::vector<float> part = resampler.accept(samples.data() + begin, num);
      found.insert(found.end(), part.begin(), part.end());
    }
    const std::vector<float> rest = resampler.finish();
    found.insert(found.end(), rest.begin(), rest.end());
    return found;
  };
  if (resampled(7) != resampled(1000)) fail<AudioError>("another split produces other samples");
  return object({{"samples", json_text(resampled(7))}});
}

std::string rescoring(const Json& json, const Json&) {
  std::vector<Hypothesis> hypotheses;
  for (const Json& each : json["hypotheses"].array()) {
    hypotheses.push_back({numbers<int>(each["tokens"]), each["score"].number(), each["context_score"].number(), each["language_score"].number(),
                          numbers<int>(each["times"]), numbers<double>(each["probabilities"])});
  }
  const TokenScores scores{matrix(json["left"]), json["right"].is_null() ? Floats{} : matrix(json["right"]), json["left"].array()[0].array().size(), {}};
  StreamNumbers weights;
  read_numbers(json, weights);
  const std::vector<Ranked> found = attention_rescoring(hypotheses, scores, weights, json["rescoring_weight"].number());
  const auto of_each = [&](auto field) { return json_list(found, [&](const Ranked& each) { return json_text(field(each)); }); };
  return object({{"tokens", of_each([](const Ranked& each) { return each.hypothesis.tokens; })},
                 {"scores", of_each([](const Ranked& each) { return std::vector<double>{each.score, each.attention_score}; })},
                 {"probabilities", of_each([](const Ranked& each) { return each.probabilities; })}});
}

std::string written_case(const Json& json, const Json&) {
  const Vocabulary capitals = Vocabulary::parse("A 0\n", "capitals");
  std::vector<int> committed;  // words of the first words of the text
  const std::string text = json["text"].string();
  for (std::size_t end = text.find(' '); end != std::string::npos; end = text.find(' ', end + 1)) {
    Result partial;
    partial.text = partial.committed = text.substr(0, end);
    committed.push_back(written(std::move(partial), capitals).num_committed);
  }
  Result result;
  result.text = json["text"].string();
  std::istringstream words(json["has_words"].boolean() ? result.text : "");
  for (std::string word; words >> word;) {
    const auto place = static_cast<double>(result.words.size());
    result.words.push_back({word, place, place + 1, 1 - place / 8});
  }
  result.nbest = {{result.text, {}, 0, 0, 0, 0, {}}, {"OTHER", {}, 0, 0, 0, 0, {}}};
  result.is_final = true;
  result = written(std::move(result), capitals);
  const auto word = [](const Word& each) {
    return "[" + json_text(each.text) + ", " + json_text(each.start) + ", " + json_text(each.end) + ", " + json_text(each.confidence) + "]";
  };
  return object({{"text", json_text(result.text)},
                 {"committed", json_text(committed)},
                 {"words", json_list(result.words, word)},
                 {"nbest", json_list(result.nbest, [](const Alternative& each) { return json_text(each.text); })}});
}

}  // namespace

std::string case_results(const std::string& kind, const Json& content);
std::string case_results(const std::string& kind, const Json& content) {
  const std::map<std::string, std::string (*)(const Json&, const Json&)> kinds = {
      {"search", search}, {"endpoint", endpoint}, {"partials", partials}, {"pauses", pauses}, {"padding", padding}, {"features", features}, {"resampling", resampling}, {"rescoring", rescoring},
      {"written", written_case}};
  return json_list(content["cases"].array(), [&](const Json& each) { return kinds.at(kind)(each, content); });
}
