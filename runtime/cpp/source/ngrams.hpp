// An n-gram model with backoff, stored as a trie in arrays. It also bounds the probabilities of words with a given prefix.
// runtime/language/ngrams.py describes the order of nodes.
#pragma once

#include "errors.hpp"

namespace u2moe::runtime {

/// An n-gram model. Immutable: threads may share it.
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
  static constexpr double kMostLog = 1e-4;  ///< tolerance, since rounding produces log-probabilities slightly above 0

  /// Build a model from its nodes, beginning with node 0: child counts, words, log10 probabilities and log10 backoffs.
  /// @throws LanguageModelError if the nodes do not form a trie or have invalid probabilities. The message begins with
  /// `source`.
  Ngrams(std::vector<std::string> words, const std::vector<std::uint64_t>& num_children, std::vector<Id> word,
         std::vector<float> log_prob, std::vector<float> backoff, const std::string& source)
      : words_(std::move(words)), word_(std::move(word)), log_prob_(std::move(log_prob)), backoff_(std::move(backoff)) {
    const std::size_t num = word_.size();
    if (num >= std::size_t{1} << 31 || words_.empty() || words_.size() > kMostWords) {
      fail(source, "the number of words (" + std::to_string(words_.size()) + ") or n-grams (" + std::to_string(num) +
                       ") is 0 or too large");
    }
    const std::uint64_t total = std::accumulate(num_children.begin(), num_children.end(), std::uint64_t{1});
    if (num_children.size() != num || log_prob_.size() != num || backoff_.size() != num || total != num || num_children[0] != words_.size()) {
      fail(source, "the numbers of n-grams are inconsistent");
    }
    first_.assign(1, 1);
    for (const std::uint64_t count : num_children) first_.push_back(first_.back() + static_cast<Id>(count));
    for (Id node = 1; node < num; ++node) {
      if (first_[node] <= node) fail(source, "an n-gram comes before its prefix");
    }
    const std::vector<Id> parent = parents_of(first_);
    check(parent, source);
    for (float& each : log_prob_) each = std::min(each, 0.0F);
    if (counts().size() > static_cast<std::size_t>(kMostOrder)) fail(source, "has n-grams of more than 9 words");
    link(parent);
    const auto id_of = [this](const char* text) -> std::optional<Id> {
      const auto found = std::find(words_.begin(), words_.end(), text);
      return found == words_.end() ? std::nullopt : std::optional<Id>(static_cast<Id>(found - words_.begin()));
    };
    end_ = id_of("</s>");
    unknown_ = id_of("<unk>");
    if (!unknown_) unknown_ = id_of("<UNK>");
    if (const std::optional<Id> start = id_of("<s>")) begin_ = state(1 + *start);
  }

  /// Build a model from n-grams in any order. Every word needs a unigram, and every n-gram the n-gram without its last word.
  static Ngrams of(const std::vector<std::string>& words, const std::vector<Order>& orders, const std::string& source, const Spell& spell) {
    std::vector<std::pair<std::pair<bool, std::string>, Id>> places;
    for (Id id = 0; id < words.size(); ++id) places.push_back({{is_marker(words[id]), spell(words[id])}, id});
    std::sort(places.begin(), places.end(), [&](const auto& one, const auto& other) {
      return one.first != other.first ? one.first < other.first : words[one.second] < words[other.second];
    });
    std::vector<Id> rank(words.size()), all_words = {0};
    std::vector<std::string> sorted;
    for (const auto& [unused, id] : places) {
      rank[id] = static_cast<Id>(sorted.size());
      sorted.push_back(words[id]);
    }
    if (orders.empty() || orders[0].words.size() != words.size()) fail(source, "the unigrams do not match the words");
    std::vector<float> log_probs = {0}, backoffs = {0};
    std::vector<std::uint64_t> children(1);
    std::vector<Key> keys;
    for (std::size_t length = 1; length <= orders.size(); ++length) {
      const Order& order = orders[length - 1];
      const auto complain = [&](std::size_t row, const char* what) {
        std::string text;
        for (std::size_t i = 0; i < length; ++i) text += (i ? " " : "") + words[order.words[row * length + i]];
        fail(source, "the " + std::to_string(length) + "-gram '" + text + "' " + what);
      };
      std::vector<std::pair<Key, std::size_t>> rows;
      for (std::size_t row = 0; row < order.log_prob.size(); ++row) {
        Id parent = 0;
        for (std::size_t i = 0; i + 1 < length; ++i) {
          parent = find_node(keys, key_of(parent, rank[order.words[row * length + i]], words.size()));
          if (parent == kNoNode) complain(row, "has a prefix that is not listed");
        }
        rows.emplace_back(key_of(parent, rank[order.words[(row + 1) * length - 1]], words.size()), row);
      }
      std::sort(rows.begin(), rows.end());
      for (std::size_t i = 0; i < rows.size(); ++i) {
        const auto [key, row] = rows[i];
        if (i && key == rows[i - 1].first) complain(row, "appears twice");
        ++children[key / words.size()];
        keys.push_back(key);
        all_words.push_back(static_cast<Id>(key % words.size()));
        log_probs.push_back(order.log_prob[row]);
        backoffs.push_back(order.backoff[row]);
      }
      children.resize(all_words.size());
    }
    return Ngrams(std::move(sorted), children, std::move(all_words), std::move(log_probs), std::move(backoffs), source);
  }

  /// Parse an ARPA file or a compact file.
  static Ngrams parse(const std::string& content, const std::string& source);

  /// Return this model with its words sorted by the spelling that `spell` returns for each word.
  Ngrams spelled_by(const Spell& spell, const std::string& source) const {
    const std::vector<Id> parent = parents_of(first_);
    std::vector<Order> orders;
    Id node = 1;
    for (const std::size_t count : counts()) {
      Order& order = orders.emplace_back();
      const std::size_t length = orders.size();
      for (std::size_t i = 0; i < count; ++i, ++node) {
        order.log_prob.push_back(log_prob_[node]);
        order.backoff.push_back(backoff_[node]);
        order.words.resize(order.words.size() + length);
        auto place = order.words.end();
        for (Id each = node; each; each = parent[each]) *--place = word_[each];
      }
    }
    return of(words_, orders, source, spell);
  }

  const std::vector<std::string>& words() const { return words_; }
  Id begin() const { return begin_; }                             ///< history at the beginning of a sentence
  const std::optional<Id>& end() const { return end_; }           ///< word that ends a sentence
  const std::optional<Id>& unknown() const { return unknown_; }

  /// Return the log10 probability of a word after a history, and the history after that word.
  std::pair<double, Id> step(Id history, Id word) const {
    for (double penalty = 0;; history = link_[history]) {
      if (const Id found = child(history, word)) return {std::min(penalty + static_cast<double>(log_prob_[found]), 0.0), state(found)};
      penalty += static_cast<double>(backoff_[history]);
    }
  }

  /// Largest log10 probability, without a history, of any word with `low` <= id < `high`. The range must not be empty.
  double best_alone(Id low, Id high) const {
    return static_cast<double>(*std::max_element(log_prob_.begin() + 1 + low, log_prob_.begin() + 1 + high));
  }

  /// Upper bound on the log10 probability, after a history, of words with `low` <= id < `high`, whose `best_alone` is `alone`.
  double best(Id history, Id low, Id high, double alone) const {
    double penalty = 0, best = -std::numeric_limits<double>::infinity();
    for (; history; history = link_[history]) {
      const auto end = word_.begin() + first_[history + 1];
      const auto begin = std::lower_bound(word_.begin() + first_[history], end, low), last = std::lower_bound(begin, end, high);
      if (begin != last) {
        const auto most = std::max_element(log_prob_.begin() + (begin - word_.begin()), log_prob_.begin() + (last - word_.begin()));
        best = std::max(best, penalty + static_cast<double>(*most));
      }
      penalty += static_cast<double>(backoff_[history]);
    }
    return std::min(std::max(best, penalty + alone), 0.0);
  }

 private:
  using Key = std::uint64_t;  // number of the parent node and id of the word

  static constexpr Id kNoNode = std::numeric_limits<Id>::max();

  [[noreturn]] static void fail(const std::string& source, const std::string& what) { runtime::fail<LanguageModelError>(source + ": " + what); }

  static Key key_of(Id parent, Id word, std::size_t num_words) { return Key{parent} * num_words + word; }

  // Return the 1-based index of the node with this key, or kNoNode if there is none.
  static Id find_node(const std::vector<Key>& keys, Key wanted) {
    const auto found = std::lower_bound(keys.begin(), keys.end(), wanted);
    return found != keys.end() && *found == wanted ? static_cast<Id>(found - keys.begin()) + 1 : kNoNode;
  }

  static std::vector<Id> parents_of(const std::vector<Id>& first) {
    std::vector<Id> parent(first.size() - 1);
    for (Id node = 0; node + 1 < first.size(); ++node) std::fill(parent.begin() + first[node], parent.begin() + first[node + 1], node);
    return parent;
  }

  // Node of a word after a history; 0 if there is none.
  Id child(Id history, Id word) const {
    if (history == 0) return 1 + word;
    const auto end = word_.begin() + first_[history + 1];
    const auto found = std::lower_bound(word_.begin() + first_[history], end, word);
    return found != end && *found == word ? static_cast<Id>(found - word_.begin()) : 0;
  }

  // Shortest history that gives the same predictions as the whole n-gram of a node.
  Id state(Id node) const { return first_[node] != first_[node + 1] || backoff_[node] != 0 ? node : link_[node]; }

  void check(const std::vector<Id>& parent, const std::string& source) const {
    for (Id node = 1; node < word_.size(); ++node) {
      if (word_[node] >= words_.size()) fail(source, "an n-gram's word is not among the model's " + std::to_string(words_.size()) + " words");
      if (node <= words_.size() && word_[node] != node - 1) fail(source, "its unigrams do not match its words");
      if (node > 1 && parent[node] == parent[node - 1] && word_[node] <= word_[node - 1]) fail(source, "n-grams are not sorted");
      if (!std::isfinite(log_prob_[node]) || static_cast<double>(log_prob_[node]) > kMostLog) {
        fail(source, "found " + shown_number(static_cast<double>(log_prob_[node])) +
                         ", expected the logarithm of a probability");
      }
      if (!std::isfinite(backoff_[node])) fail(source, "a backoff is not finite");
    }
  }

  // Number of n-grams of each order.
  std::vector<std::size_t> counts() const {
    std::vector<std::size_t> found;
    for (Id begin = 1, end = first_[1]; begin < end;) {
      found.push_back(end - begin);
      const Id next = first_[end];
      begin = end;
      end = next;
    }
    return found;
  }

  // For each node, find the node to back off to: the longest suffix of its n-gram that has children or a backoff.
  void link(const std::vector<Id>& parent) {
    std::vector<Id> suffix(word_.size());
    link_.assign(word_.size(), 0);
    for (Id node = 1; node < word_.size(); ++node) {
      if (parent[node]) {
        for (Id shorter = suffix[parent[node]]; !suffix[node]; shorter = suffix[shorter]) suffix[node] = child(shorter, word_[node]);
      }
      link_[node] = state(suffix[node]);
    }
  }

  std::vector<std::string> words_;
  std::vector<Id> word_, first_, link_;
  std::vector<float> log_prob_, backoff_;
  Id begin_ = 0;
  std::optional<Id> end_, unknown_;
};

}  // namespace u2moe::runtime
