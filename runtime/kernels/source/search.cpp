// The first pass for Python: prefix beam search with hotwords and a language model, or with a grammar. It uses the
// source files of the C++ runtime, so that both produce identical hypotheses, to the last bit. Only one thread at a
// time may use a handle. A search keeps alive the objects with which it was created.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ctc.hpp"
#include "exported.h"

namespace {

using namespace u2moe::runtime;

struct Handle {
  Handle() = default;
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  virtual ~Handle() = default;
};

template <class Content>
struct Holding : Handle {
  Content content;
  explicit Holding(Content given) : content(std::move(given)) {}
};

using HotwordsHandle = Holding<std::shared_ptr<const ContextGraph>>;
using GrammarHandle = Holding<std::shared_ptr<const PhraseGraph>>;
using ModelHandle = Holding<std::shared_ptr<const Fusion>>;
using SearchHandle = Holding<std::unique_ptr<CtcSearch>>;

thread_local std::string last_error;

// Returns the result of `make`. If it throws, returns null and keeps the message for `u2moe_search_error`.
template <class Make>
auto guarded(Make make) -> decltype(make()) {
  try {
    return make();
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "unknown error";
  }
  return {};
}

CtcSearch& search_of(Handle* handle) { return *static_cast<SearchHandle*>(handle)->content; }

size_t write(const std::vector<double>& numbers, double* to, size_t room) {
  if (numbers.size() <= room) std::copy(numbers.begin(), numbers.end(), to);
  return numbers.size();
}

size_t write(const std::vector<Hypothesis>& hypotheses, double* to, size_t room) {
  std::vector<double> found = {static_cast<double>(hypotheses.size())};
  for (const Hypothesis& each : hypotheses) {
    found.insert(found.end(), {static_cast<double>(each.tokens.size()), each.score, each.context_score, each.language_score});
    found.insert(found.end(), each.tokens.begin(), each.tokens.end());
    found.insert(found.end(), each.times.begin(), each.times.end());
    found.insert(found.end(), each.probabilities.begin(), each.probabilities.end());
  }
  return write(found, to, room);
}

}  // namespace

/// Returns the message of the last failed call in this thread.
U2MOE_EXPORT const char* u2moe_search_error() { return last_error.c_str(); }

/// Creates hotwords from phrases and weights. `tokens` is the content of tokens.txt.
U2MOE_EXPORT Handle* u2moe_search_hotwords(const char* tokens, const char* const* phrases, const double* weights, size_t num) {
  return guarded([&]() -> Handle* {
    std::vector<Hotword> hotwords;
    for (size_t i = 0; i < num; ++i) hotwords.push_back({phrases[i], weights[i]});
    return new HotwordsHandle(std::make_shared<ContextGraph>(hotwords, Vocabulary::parse(tokens, "vocabulary")));
  });
}

/// Creates a language model from its words, one per line, and its nodes; see `Ngrams`. `numbers` are the weight, word
/// bonus, unknown score and rescoring weight. `classes` is JSON.
U2MOE_EXPORT Handle* u2moe_search_fusion(const char* tokens, const char* words, const uint64_t* num_children, const uint32_t* word,
                                                 const float* log_prob, const float* backoff, size_t num_nodes, const double* numbers,
                                                 int is_by_token, const char* classes) {
  return guarded([&]() -> Handle* {
    LanguageModelOptions options;
    options.read(Json::parse(classes, "language model"));
    options.weight = numbers[0];
    options.word_bonus = numbers[1];
    options.unknown_score = numbers[2];
    options.rescoring_weight = numbers[3];
    options.level = is_by_token ? "token" : "word";
    Ngrams ngrams(lines_of(words), {num_children, num_children + num_nodes}, {word, word + num_nodes}, {log_prob, log_prob + num_nodes},
                  {backoff, backoff + num_nodes}, "language model");
    const Vocabulary vocabulary = Vocabulary::parse(tokens, "vocabulary");
    return new ModelHandle(std::make_shared<const Fusion>(std::move(ngrams), options, vocabulary, "language model"));
  });
}

/// Creates a grammar from its lines. `tokens` is the content of tokens.txt.
U2MOE_EXPORT Handle* u2moe_search_grammar(const char* tokens, const char* const* lines, size_t num, int blank) {
  return guarded([&]() -> Handle* {
    const Vocabulary vocabulary = Vocabulary::parse(tokens, "vocabulary");
    return new GrammarHandle(std::make_shared<const PhraseGraph>(std::vector<std::string>(lines, lines + num), vocabulary, blank));
  });
}

/// Begins a search. The hotwords, the language model and the grammar may be null.
U2MOE_EXPORT Handle* u2moe_search_begin(size_t beam_size, int blank, double blank_penalty, Handle* hotwords, Handle* model, Handle* grammar) {
  return guarded([&]() -> Handle* {
    const auto context = hotwords ? static_cast<HotwordsHandle*>(hotwords)->content : nullptr;
    const auto states = model ? Fusion::states(static_cast<ModelHandle*>(model)->content) : nullptr;
    const auto graph = grammar ? static_cast<GrammarHandle*>(grammar)->content : nullptr;
    return new SearchHandle(std::make_unique<PrefixBeamSearch>(beam_size, blank, context, states, blank_penalty, graph));
  });
}

/// Continues a search with log-probabilities [frames, vocab]. Returns null on failure.
U2MOE_EXPORT Handle* u2moe_search_advance(Handle* search, const float* log_probs, size_t num_frames, size_t vocab_size) {
  return guarded([&] {
    search_of(search).advance(log_probs, num_frames, vocab_size);
    return search;
  });
}

/// Ends the input of a search. Returns null on failure.
U2MOE_EXPORT Handle* u2moe_search_finish(Handle* search) {
  return guarded([&] {
    search_of(search).finish();
    return search;
  });
}

/// If there is room, writes the number of hypotheses (at most `limit`), then the hypotheses, best first. Returns how
/// many numbers this takes, or 0 on failure. Each hypothesis begins with its token count, score, hotword bonus and
/// language model score. Then come its tokens, their times and their probabilities.
U2MOE_EXPORT size_t u2moe_search_hypotheses(Handle* search, size_t limit, double* to, size_t room) {
  return guarded([&] { return write(search_of(search).hypotheses(limit), to, room); });
}

/// Like `u2moe_search_hypotheses`, but writes only the best hypothesis that begins with the committed tokens.
U2MOE_EXPORT size_t u2moe_search_best(Handle* search, double* to, size_t room) {
  return guarded([&] { return write(std::vector<Hypothesis>{search_of(search).best()}, to, room); });
}

/// If there is room, writes whether a word must begin after the settled tokens (1 or 0), then these tokens. Returns
/// how many numbers this takes, or 0 on failure. `word_starts` [vocab] is 1 for each token that begins a word, else 0.
U2MOE_EXPORT size_t u2moe_search_settled(Handle* search, const unsigned char* word_starts, size_t vocab_size, double* to, size_t room) {
  return guarded([&] {
    const Settled settled = search_of(search).settled({word_starts, word_starts + vocab_size});
    std::vector<double> found = {settled.ends ? 1.0 : 0.0};
    found.insert(found.end(), settled.tokens.begin(), settled.tokens.end());
    return write(found, to, room);
  });
}

/// Commits further settled tokens. Returns null on failure.
U2MOE_EXPORT Handle* u2moe_search_commit(Handle* search, const int* tokens, size_t num) {
  return guarded([&] {
    search_of(search).commit({tokens, tokens + num});
    return search;
  });
}

/// Returns the earliest frame at which a token after the committed ones may peak.
U2MOE_EXPORT int u2moe_search_next_peak(Handle* search) { return search_of(search).next_peak(); }

/// Frees a handle of any kind.
U2MOE_EXPORT void u2moe_search_free(Handle* handle) { delete handle; }
