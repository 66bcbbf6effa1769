// The score of a language model for a hypothesis that grows token by token, with look-ahead inside words; as
// runtime/decoding/fusion.py has it, which says why.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ngrams.hpp"
#include "vocabulary.hpp"

namespace u2moe::runtime {

/// See u2moe_language_model_options.
struct LanguageModelOptions {
  double weight = 0.5, word_bonus = 0.5, unknown_score = -5, rescoring_weight = 1;
  std::string level;  ///< "word", "token" or "": as the model

  /// @throws InvalidArgument an option is out of range.
  void check() const;
};

/// A language model for the tokens of a vocabulary. Immutable: threads may share it; each search has its own `FusionStates`.
class Fusion {
 public:
  /// @throws InvalidArgument an option is out of range.
  Fusion(Ngrams ngrams, const LanguageModelOptions& options, const Vocabulary& vocabulary, const std::string& source);

  /// @throws LanguageModelError the vocabulary has, or can spell, none of the model's words; begins with `source`.
  void check_words(const std::string& source) const;

  double rescoring_weight() const { return rescoring_weight_; }
  /// Whether it was made for this vocabulary.
  bool is_of(const Vocabulary& vocabulary) const { return fingerprint_ == vocabulary.fingerprint(); }

  /// No token adds more to the score than this: the bonus of the words that it may begin.
  double gain(int token) const { return gains_[static_cast<std::size_t>(token)]; }
  double most_gain() const { return most_gain_; }
  /// Whether a token ends the word before it.
  bool ends_word(int token) const { return ends_word_[static_cast<std::size_t>(token)]; }

 private:
  friend class FusionStates;
  using Id = Ngrams::Id;

  std::optional<Ngrams> ngrams_;
  double scale_, word_bonus_, unknown_score_, rescoring_weight_, bonus_;
  std::vector<std::string> spelled_;                   // words in the letter case of the vocabulary, in their order
  bool by_token_ = false;
  std::vector<std::optional<Id>> token_words_;         // the word of each token, if the model predicts tokens
  std::vector<std::vector<std::string>> pieces_;       // of each token: letters, and "" for a boundary between words
  std::vector<double> gains_;
  std::vector<bool> ends_word_;
  double most_gain_ = 0, most_going_on_ = 0, most_ending_ = 0;  // of all tokens, of those that do not end a word, and of those that do
  std::size_t fingerprint_;
};

struct FusionState;
using FusionStatePtr = std::shared_ptr<FusionState>;

/// What the scores of further tokens depend on: the words so far and the beginning of the current one.
struct FusionState {
  struct Move {
    FusionStatePtr state;
    double score;  ///< of the words that the token ends
  };
  /// Upper bounds of what the next token adds to the score: besides its gain, if it goes on with the current word and if it
  /// ends that word; and at most, with its gain.
  struct Losses {
    double going_on = 0, ending = 0, most = 0;
  };

  Ngrams::Id history = 0;  ///< words before the current one, as a node of the model
  std::string begun;       ///< the letters of the current word; empty between words
  double open = 0;         ///< score of its best completion; 0 between words
  std::map<int, Move> moves;
  std::optional<std::pair<double, Ngrams::Id>> ended;  ///< score of the current word if it ends here, and the history after it
  std::optional<Losses> losses;
};

/// The states of the hypotheses of one stream, cached up to a number. Not thread-safe.
class FusionStates {
 public:
  explicit FusionStates(std::shared_ptr<const Fusion> fusion);
  FusionStates(const FusionStates&) = delete;
  FusionStates& operator=(const FusionStates&) = delete;
  ~FusionStates() { forget(); }

  const Fusion& fusion() const { return *fusion_; }
  const FusionStatePtr& start() const { return start_; }

  /// State after a token, and the score of the words that it ends.
  const FusionState::Move& advance(const FusionStatePtr& state, int token);

  /// The score of the last word, and of the end of the sentence, for a hypothesis that ends in `state`.
  double finish(const FusionStatePtr& state);

  FusionState::Losses losses(FusionState& state);

 private:
  using Id = Ngrams::Id;

  // The words that begin in the same way.
  struct Beginning {
    Id low, high;       // of the model
    double best_alone;  // the largest probability of one of them without a history
    Id whole;           // after those that are no longer
  };

  FusionState::Move read(const FusionState& state, const std::vector<std::string>& pieces);
  FusionStatePtr state_of(Id history, std::string begun);
  std::pair<double, Id> ended(FusionState& state);
  std::pair<double, Id> word(Id history, const std::string& spelled);
  std::pair<double, Id> unknown(Id history);
  const Beginning* beginning(const std::string& begun);
  void forget();

  std::shared_ptr<const Fusion> fusion_;
  const Ngrams& ngrams_;
  FusionStatePtr start_;
  std::map<std::pair<Id, std::string>, FusionStatePtr> states_;
  std::unordered_map<std::string, std::unique_ptr<Beginning>> beginnings_;
  std::unordered_map<Id, std::pair<double, Id>> unknowns_;
};

}  // namespace u2moe::runtime
