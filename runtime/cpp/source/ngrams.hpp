// An n-gram model as a trie in arrays: probabilities with backoff, and the best completion of the beginning of a word; as
// runtime/language/ngrams.py has it, which describes the order of nodes.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace u2moe::runtime {

/// Immutable: threads may share it.
class Ngrams {
 public:
  using Spell = std::function<std::string(const std::string&)>;
  using Id = std::uint32_t;

  /// N-grams of one order: word ids [n, order], log10 probabilities [n], log10 backoffs [n].
  struct Order {
    std::vector<Id> words;
    std::vector<float> log_prob, backoff;
  };

  static constexpr int kMostOrder = 9;
  static constexpr std::size_t kMostWords = std::size_t{1} << 24;
  static constexpr double kMostLog = 1e-4;  ///< logarithms of probabilities slightly above 0 come from rounding

  /// From the nodes: their numbers of children, words, log10 probabilities and log10 backoffs, those of node 0 first.
  /// @throws LanguageModelError they are not a trie, or hold numbers that are not probabilities; begins with `source`.
  Ngrams(std::vector<std::string> words, const std::vector<std::uint64_t>& num_children, std::vector<Id> word,
         std::vector<float> log_prob, std::vector<float> backoff, const std::string& source);

  /// From n-grams in any order; every word needs a unigram, and every n-gram the one that it continues.
  static Ngrams of(const std::vector<std::string>& words, const std::vector<Order>& orders, const std::string& source, const Spell& spell);

  /// A model from the content of an ARPA file or of a compact file.
  static Ngrams parse(const std::string& content, const std::string& source);

  /// This model with its words in the order of another spelling.
  Ngrams spelled_by(const Spell& spell, const std::string& source) const;

  const std::vector<std::string>& words() const { return words_; }
  Id begin() const { return begin_; }                             ///< the history at the beginning of a sentence
  const std::optional<Id>& end() const { return end_; }           ///< the word that ends a sentence
  const std::optional<Id>& unknown() const { return unknown_; }

  /// The log10 probability of a word after a history, and the history after it.
  std::pair<double, Id> step(Id history, Id word) const;
  /// The largest log10 probability without a history of a word with `low` <= id < `high`, at least one word.
  double best_alone(Id low, Id high) const;
  /// An upper bound of the log10 probability of any such word; `alone` is their `best_alone`.
  double best(Id history, Id low, Id high, double alone) const;

 private:
  Id child(Id history, Id word) const;
  Id state(Id node) const;
  void check(const std::vector<Id>& parent, const std::string& source) const;
  std::vector<std::size_t> counts() const;
  void link(const std::vector<Id>& parent);

  std::vector<std::string> words_;
  std::vector<Id> word_, first_, link_;
  std::vector<float> log_prob_, backoff_;
  Id begin_ = 0;
  std::optional<Id> end_, unknown_;
};

}  // namespace u2moe::runtime
