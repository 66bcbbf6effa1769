// The score of a language model for a hypothesis that grows token by token, with look-ahead inside words; as
// runtime/decoding/fusion.py has it, which says why.
#pragma once

#include "json.hpp"
#include "ngrams.hpp"
#include "vocabulary.hpp"

namespace u2moe::runtime {

/// See u2moe_language_model_options.
struct LanguageModelOptions : LanguageModelNumbers {
  std::string level;  ///< "word", "token" or "": as the model

  /// Take what an object has.
  /// @throws BundleError names the field.
  void read(const Json& json) {
    read_numbers<LanguageModelNumbers>(json, *this);
    if (json.given("level")) level = json["level"].string();
    if (!is_level()) json["level"].fail("'word', 'token' or null");
  }

  /// @throws InvalidArgument an option is out of range.
  void check() const {
    check_numbers<LanguageModelNumbers>(*this);
    if (!is_level()) fail<InvalidArgument>("level must be 'word', 'token' or none, got '" + level + "'");
  }

 private:
  bool is_level() const { return level.empty() || level == "word" || level == "token"; }
};

inline const std::string kUnreadable(1, '\0');  // symbols that are no text, and beginnings of words that the model does not have
inline const std::string kBoundary;

/// A language model for the tokens of a vocabulary. Immutable: threads may share it; each search has its own `FusionStates`.
class Fusion {
 public:
  /// @throws InvalidArgument an option is out of range.
  Fusion(Ngrams ngrams, const LanguageModelOptions& options, const Vocabulary& vocabulary, const std::string& source)
      : ngrams_(std::move(ngrams)), scale_(options.weight * std::log(10.0)), word_bonus_(options.word_bonus),
        unknown_score_(options.unknown_score / std::log(10.0)), rescoring_weight_(options.rescoring_weight),
        bonus_(std::max(options.word_bonus, 0.0)), fingerprint_(vocabulary.fingerprint()) {
    options.check();
    const std::vector<std::string>& symbols = vocabulary.texts();
    const Ngrams::Spell spell = spelling_of(symbols);
    spelled_ = spelled_words(*ngrams_, spell);
    if (!is_sorted(*ngrams_, spelled_)) {
      ngrams_ = ngrams_->spelled_by(spell, source);
      spelled_ = spelled_words(*ngrams_, spell);
    }
    const auto& words = ngrams_->words();
    const std::string mark = encode_utf8({kWordBoundary});
    const bool has_marks = std::any_of(words.begin(), words.end(), [&](const std::string& word) { return word.find(mark) != word.npos; });
    by_token_ = options.level.empty() ? has_marks : options.level == "token";
    std::unordered_map<std::string, Id> ids;
    for (Id id = 0; by_token_ && id < words.size(); ++id) ids.emplace(words[id], id);
    for (std::size_t token = 0; token < symbols.size(); ++token) {
      const std::vector<std::string>& pieces = pieces_.emplace_back(pieces_of(vocabulary.symbols()[token]));
      const auto starts = std::count_if(pieces.begin(), pieces.end(), [](const std::string& piece) { return !piece.empty(); });
      gains_.push_back(bonus_ * static_cast<double>(by_token_ ? 1 : starts) + kSlack);
      ends_word_.push_back(!by_token_ && !pieces.empty() && pieces.front() == kBoundary);
      if (!by_token_) continue;
      const auto found = ids.find(symbols[token]);
      token_words_.push_back(found == ids.end() ? std::nullopt : std::optional<Id>(found->second));
    }
    for (std::size_t token = 0; token < gains_.size(); ++token) {
      double& most = ends_word_[token] ? most_ending_ : most_going_on_;
      most = std::max(most, gains_[token]);
    }
    most_gain_ = std::max(most_ending_, most_going_on_);
  }

  /// @throws LanguageModelError the vocabulary has, or can spell, none of the model's words; begins with `source`.
  void check_words(const std::string& source) const {
    const auto& words = ngrams_->words();
    bool is_known = std::any_of(token_words_.begin(), token_words_.end(), [&](const std::optional<Id>& word) { return word && !is_marker(words[*word]); });
    if (!by_token_) {
      std::set<char32_t> letters;
      for (const auto& pieces : pieces_) {
        for (const std::string& piece : pieces) {
          for (const char32_t c : decode_utf8(piece)) letters.insert(c);
        }
      }
      is_known = std::any_of(spelled_.begin(), spelled_.end(), [&](const std::string& word) {
        const std::u32string own = decode_utf8(word);
        return std::all_of(own.begin(), own.end(), [&](char32_t c) { return letters.count(c) > 0; });
      });
    }
    if (is_known) return;
    fail<LanguageModelError>(source + ": found words such as '" + words.front() + "', expected " +
                             (by_token_ ? "tokens of the vocabulary" : "words that the vocabulary can spell"));
  }

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

  static constexpr double kSlack = 1e-9;  // more than the rounding of sums of scores

  // Puts words into the letter case of a vocabulary, if it has only one.
  static Ngrams::Spell spelling_of(const std::vector<std::string>& symbols) {
    std::string letters;
    for (const std::string& symbol : symbols) letters += is_marker(symbol) ? "" : symbol;
    if (letters == mapped(letters, upper)) return [](const std::string& word) { return mapped(word, upper); };
    if (letters == mapped(letters, lower)) return [](const std::string& word) { return mapped(word, lower); };
    return [](const std::string& word) { return word; };
  }

  // Letters of a symbol, with a boundary for spaces and around characters that are words.
  static std::vector<std::string> pieces_of(const std::u32string& symbol) {
    std::vector<std::string> pieces;
    for (const char32_t c : with_boundaries(symbol, is_spaceless)) {
      if (c == kWordBoundary) pieces.push_back(kBoundary);
      else if (pieces.empty() || pieces.back() == kBoundary) pieces.push_back(encode_utf8({c}));
      else pieces.back() += encode_utf8({c});
    }
    return pieces;
  }

  static std::vector<std::string> spelled_words(const Ngrams& ngrams, const Ngrams::Spell& spell) {
    std::vector<std::string> spelled;
    for (const std::string& word : ngrams.words()) {
      if (!is_marker(word)) spelled.push_back(spell(word));
    }
    return spelled;
  }

  // Whether the words come first, in the order of their spelling, and markers after them.
  static bool is_sorted(const Ngrams& ngrams, const std::vector<std::string>& spelled) {
    const auto& words = ngrams.words();
    return std::is_sorted(spelled.begin(), spelled.end()) &&
           std::none_of(words.begin(), words.begin() + static_cast<std::ptrdiff_t>(spelled.size()), is_marker<std::string>);
  }

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
  explicit FusionStates(std::shared_ptr<const Fusion> fusion)
      : fusion_(std::move(fusion)), ngrams_(*fusion_->ngrams_), start_(std::make_shared<FusionState>()) {
    start_->history = ngrams_.begin();
  }

  FusionStates(const FusionStates&) = delete;
  FusionStates& operator=(const FusionStates&) = delete;
  ~FusionStates() { forget(); }

  const Fusion& fusion() const { return *fusion_; }
  const FusionStatePtr& start() const { return start_; }
  std::size_t size() const { return states_.size(); }

  /// State after a token, and the score of the words that it ends.
  const FusionState::Move& advance(const FusionStatePtr& state, int token) {
    const auto known = state->moves.find(token);
    if (known != state->moves.end()) return known->second;
    const auto index = static_cast<std::size_t>(token);
    FusionState::Move move;
    if (fusion_->by_token_) {
      const std::optional<Id> word = fusion_->token_words_[index];
      const auto [score, history] = word ? ngrams_.step(state->history, *word) : unknown(state->history);
      move = {state_of(history, ""), fusion_->scale_ * score + fusion_->word_bonus_};
    } else {
      move = read(*state, fusion_->pieces_[index]);
    }
    return state->moves.emplace(token, std::move(move)).first->second;
  }

  /// The score of the last word, and of the end of the sentence, for a hypothesis that ends in `state`.
  double finish(const FusionStatePtr& state) {
    const FusionState::Move last = read(*state, {kBoundary});
    double score = last.score;
    if (const std::optional<Id>& end = ngrams_.end()) score += fusion_->scale_ * ngrams_.step(last.state->history, *end).first;
    return score;
  }

  FusionState::Losses losses(FusionState& state) {
    if (!state.losses) {
      const bool is_open = !state.begun.empty();
      const double going_on = is_open ? -fusion_->bonus_ : 0, ending = is_open ? ended(state).first - state.open : 0;
      state.losses = {going_on, ending, std::max(going_on + fusion_->most_going_on_, ending + fusion_->most_ending_)};
    }
    return *state.losses;
  }

 private:
  using Id = Ngrams::Id;
  static constexpr std::size_t kMostStates = std::size_t{1} << 17;
  static constexpr const char* kLast = "\xf4\x8f\xbf\xbf";  // U+10FFFF

  // The words that begin in the same way.
  struct Beginning {
    Id low, high;       // of the model
    double best_alone;  // the largest probability of one of them without a history
    Id whole;           // after those that are no longer
  };

  FusionState::Move read(const FusionState& state, const std::vector<std::string>& pieces) {
    Id history = state.history;
    std::string begun = state.begun;
    double score = 0;
    for (const std::string& piece : pieces) {
      if (piece != kBoundary) {
        begun += piece;
      } else if (!begun.empty()) {
        const auto [word_score, after] = word(history, begun);
        score += word_score;
        history = after;
        begun.clear();
      }
    }
    return {state_of(history, std::move(begun)), score};
  }

  FusionStatePtr state_of(Id history, std::string begun) {
    const Beginning* found = begun.empty() ? nullptr : beginning(begun);
    if (!begun.empty() && !found) begun = kUnreadable;
    const std::pair<Id, std::string> key(history, begun);
    const auto known = states_.find(key);
    if (known != states_.end()) return known->second;
    if (states_.size() >= kMostStates) forget();
    const auto state = std::make_shared<FusionState>();
    state->history = history;
    state->begun = begun;
    if (!begun.empty()) {  // the most probable word with this beginning; never below that of an actual one
      double best = unknown(history).first;
      if (found) best = std::max(best, ngrams_.best(history, found->low, found->high, found->best_alone));
      state->open = fusion_->scale_ * best + fusion_->word_bonus_;
    }
    states_.emplace(key, state);
    return state;
  }

  // The score of the current word if it ends here: the same for every token that begins another.
  std::pair<double, Id> ended(FusionState& state) {
    if (!state.ended) state.ended = word(state.history, state.begun);
    return *state.ended;
  }

  // The score of a word, and the history after it; if it may be read in several ways, of the most probable.
  std::pair<double, Id> word(Id history, const std::string& spelled) {
    const Beginning* found = beginning(spelled);
    double best = -std::numeric_limits<double>::infinity();
    Id following = 0;
    if (!found || found->low == found->whole) std::tie(best, following) = unknown(history);
    for (Id word = found ? found->low : 0; found && word < found->whole; ++word) {
      const auto [score, after] = ngrams_.step(history, word);
      if (score > best) {
        best = score;
        following = after;
      }
    }
    return {fusion_->scale_ * best + fusion_->word_bonus_, following};
  }

  // The log10 probability of a word that the model does not have, and the history after it.
  std::pair<double, Id> unknown(Id history) {
    const auto known = unknowns_.find(history);
    if (known != unknowns_.end()) return known->second;
    std::pair<double, Id> found(0.0, 0);
    if (ngrams_.unknown()) found = ngrams_.step(history, *ngrams_.unknown());
    found.first += fusion_->unknown_score_;
    if (unknowns_.size() >= kMostStates) unknowns_.clear();
    unknowns_.emplace(history, found);
    return found;
  }

  // None: no word of the model begins so.
  const Beginning* beginning(const std::string& begun) {
    auto known = beginnings_.find(begun);
    if (known == beginnings_.end()) {
      const auto& spelled = fusion_->spelled_;
      const auto first = spelled.begin(), low = std::lower_bound(first, spelled.end(), begun), high = std::lower_bound(low, spelled.end(), begun + kLast);
      std::unique_ptr<Beginning> found;
      if (low != high) {
        const Id from = static_cast<Id>(low - first), to = static_cast<Id>(high - first);
        found.reset(new Beginning{from, to, ngrams_.best_alone(from, to), static_cast<Id>(std::upper_bound(low, high, begun) - first)});
      }
      if (beginnings_.size() >= kMostStates) beginnings_.clear();
      known = beginnings_.emplace(begun, std::move(found)).first;
    }
    return known->second.get();
  }

  // States that are in use remain, and reach no others.
  void forget() {
    for (auto& [key, state] : states_) state->moves.clear();
    start_->moves.clear();
    states_.clear();
  }

  std::shared_ptr<const Fusion> fusion_;
  const Ngrams& ngrams_;
  FusionStatePtr start_;
  std::map<std::pair<Id, std::string>, FusionStatePtr> states_;
  std::unordered_map<std::string, std::unique_ptr<Beginning>> beginnings_;
  std::unordered_map<Id, std::pair<double, Id>> unknowns_;
};

}  // namespace u2moe::runtime
