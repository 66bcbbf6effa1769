// Language model scores of hypotheses that grow by tokens, with look-ahead in words, as runtime/decoding/fusion.py explains.
#pragma once

#include <atomic>

#include "json.hpp"
#include "ngrams.hpp"
#include "vocabulary.hpp"

namespace u2moe::runtime {

/// See u2moe_language_model_options.
struct LanguageModelOptions : LanguageModelNumbers {
  std::string level;  ///< "word" or "token"; "": the level of the model
  /// Words of each class. The model treats a class as one word, and the words of the class share its probability equally.
  std::map<std::string, std::vector<std::string>> classes;

  /// Read the options from an object.
  /// @throws BundleError if a field is invalid. The message names the field.
  void read(const Json& json) {
    read_numbers<LanguageModelNumbers>(json, *this);
    if (json.given("level")) level = json["level"].string();
    if (!is_level()) json["level"].fail("'word', 'token' or null");
    if (!json.given("classes")) return;
    for (const auto& [name, words] : json["classes"].object()) {
      for (const Json& word : words.array()) classes[name].push_back(word.string());
    }
  }

  /// @throws InvalidArgument if an option is out of range.
  void check() const {
    check_numbers<LanguageModelNumbers>(*this);
    if (!is_level()) fail<InvalidArgument>("level must be 'word', 'token' or none, got '" + level + "'");
  }

 private:
  bool is_level() const { return level.empty() || level == "word" || level == "token"; }
};

using WordShare = std::pair<Ngrams::Id, double>;  // a word of the model, and log10 of a share of its probability

inline const std::string kUnreadable(1, '\0');  // stands for symbols that are not text, and for letters that begin no word
inline const std::string kBoundary;

class FusionStates;

/// A language model for the tokens of a vocabulary. Threads may share it. Each search has its own `FusionStates`.
class Fusion {
 public:
  /// @throws InvalidArgument if an option is out of range.
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
    for (Id id = 0; id < words.size(); ++id) ids.emplace(words[id], id);
    for (const auto& [name, listed] : options.classes) {
      const auto found = ids.find(name);
      if (found == ids.end()) fail<InvalidArgument>("classes: the language model has no word '" + name + "'");
      const double share = -std::log10(static_cast<double>(listed.size()));
      for (const std::string& word : listed) listed_[spell(word)].emplace_back(found->second, share);
    }
    for (std::size_t token = 0; token < symbols.size(); ++token) {
      const std::vector<std::string>& pieces = pieces_.emplace_back(pieces_of(vocabulary.symbols()[token]));
      const auto starts = std::count_if(pieces.begin(), pieces.end(), [](const std::string& piece) { return !piece.empty(); });
      gains_.push_back(bonus_ * static_cast<double>(by_token_ ? 1 : starts) + kSlack);
      ends_word_.push_back(!by_token_ && !pieces.empty() && pieces.front() == kBoundary);
      double& most = ends_word_.back() ? most_ending_ : most_going_on_;
      most = std::max(most, gains_.back());
      if (!by_token_) continue;
      const auto found = ids.find(symbols[token]);
      token_words_.push_back(found == ids.end() ? std::nullopt : std::optional<Id>(found->second));
    }
    most_gain_ = std::max(most_ending_, most_going_on_);
  }
  Fusion(const Fusion&) = delete;
  Fusion& operator=(const Fusion&) = delete;
  ~Fusion();

  /// Return states for one search. They are those of an ended search, which know common words, or new ones.
  static std::shared_ptr<FusionStates> states(const std::shared_ptr<const Fusion>& fusion);

  /// @throws LanguageModelError if the model contains no token of the vocabulary (token level), or no word that the
  /// vocabulary can spell (word level). The message begins with `source`.
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
  bool knows_ends() const { return ngrams_->end().has_value(); }  ///< whether the model predicts sentence ends
  /// Whether the model was prepared for this vocabulary.
  bool is_of(const Vocabulary& vocabulary) const { return fingerprint_ == vocabulary.fingerprint(); }

  /// Upper bound on what a token adds to the score: the bonuses of the words that it may begin.
  double gain(int token) const { return gains_[static_cast<std::size_t>(token)]; }
  double most_gain() const { return most_gain_; }
  /// Whether a token ends the previous word.
  bool ends_word(int token) const { return ends_word_[static_cast<std::size_t>(token)]; }

 private:
  friend class FusionStates;
  using Id = Ngrams::Id;

  static constexpr double kSlack = 1e-9;  // above the rounding error of summed scores

  // Return a function that converts words to the letter case of the vocabulary. With both cases, words stay unchanged.
  static Ngrams::Spell spelling_of(const std::vector<std::string>& symbols) {
    std::string letters;
    for (const std::string& symbol : symbols) letters += is_marker(symbol) ? "" : symbol;
    if (letters == mapped(letters, upper)) return [](const std::string& word) { return mapped(word, upper); };
    if (letters == mapped(letters, lower)) return [](const std::string& word) { return mapped(word, lower); };
    return [](const std::string& word) { return word; };
  }

  // Parts of a symbol: boundaries and the letters between them. Spaces become boundaries, and characters that are words have
  // boundaries around them.
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

  // Whether words are sorted by their spelling and precede the markers.
  static bool is_sorted(const Ngrams& ngrams, const std::vector<std::string>& spelled) {
    const auto& words = ngrams.words();
    return std::is_sorted(spelled.begin(), spelled.end()) &&
           std::none_of(words.begin(), words.begin() + static_cast<std::ptrdiff_t>(spelled.size()), is_marker<std::string>);
  }

  std::optional<Ngrams> ngrams_;
  double scale_, word_bonus_, unknown_score_, rescoring_weight_, bonus_;
  std::vector<std::string> spelled_;                   // words in the letter case of the vocabulary, in model order
  std::map<std::string, std::vector<WordShare>> listed_;    // words of classes in the same letter case, with their classes
  bool by_token_ = false;
  std::vector<std::optional<Id>> token_words_;         // word of each token, if the model predicts tokens
  std::vector<std::vector<std::string>> pieces_;       // letters of each token, with "" for a boundary between words
  std::vector<double> gains_;
  std::vector<bool> ends_word_;
  // Largest gain of any token, of a token that continues a word, and of a token that ends a word.
  double most_gain_ = 0, most_going_on_ = 0, most_ending_ = 0;
  std::size_t fingerprint_;
  mutable std::array<std::atomic<FusionStates*>, 4> idle_{};  // states of ended searches
};

/// The words with a common prefix.
struct Beginning {
  std::string letters;
  std::uint64_t number = 0;           ///< unique number
  Ngrams::Id low = 0, high = 0;       ///< range of the model's words with this prefix
  double best_alone = 0;              ///< largest log10 probability of these words without a history
  std::vector<WordShare> words, listed;  ///< words that equal the prefix; members of classes that begin with it
};

/// State that determines the scores of further tokens: the words so far and the prefix of the current word.
struct FusionState {
  struct Move {
    std::shared_ptr<FusionState> state;
    double score, open;  ///< score of the words that the token ends, and of the best completion of the word in progress
  };
  /// Upper bounds on what the next token adds to the score. `going_on` applies to tokens that continue the current word,
  /// `ending` to tokens that end it; both exclude the token's gain. `most` applies to any token and includes the gain.
  struct Losses {
    double going_on = 0, ending = 0, most = 0;
  };

  Ngrams::Id history = 0;                  ///< words before the current one, as a node of the model
  std::shared_ptr<const Beginning> begun;  ///< letters of the current word; empty between words
  std::uint64_t number = 0;                ///< unique number
  double open = 0;                         ///< score of the best completion of the current word; 0 between words
  std::optional<std::pair<double, Ngrams::Id>> ended = {};  ///< score of the current word if it ends here, and the history after it
  std::optional<Losses> losses = {};
};
using FusionStatePtr = std::shared_ptr<FusionState>;

/// Language model states of the hypotheses of one stream, in a cache of limited size. Not thread-safe.
class FusionStates {
 public:
  static constexpr std::size_t kMostIdle = std::size_t{1} << 14;  ///< larger states are not kept for other searches

  explicit FusionStates(const Fusion& fusion)
      : fusion_(&fusion), ngrams_(*fusion_->ngrams_), start_(std::make_shared<FusionState>(FusionState{ngrams_.begin(), nothing_, 0})) {}

  const Fusion& fusion() const { return *fusion_; }
  const FusionStatePtr& start() const { return start_; }
  std::size_t size() const { return states_.size(); }

  /// Return the state after a token, and the score of the words that it ends. The reference is valid until the next call.
  const FusionState::Move& advance(FusionState& state, int token) {
    const auto index = static_cast<std::size_t>(token);
    const std::uint64_t key = state.number * fusion_->pieces_.size() + index;
    const auto known = moves_.find(key);
    if (known != moves_.end()) return known->second;
    if (std::max(states_.size(), beginnings_.size()) >= kMostStates) {  // hypotheses keep the states that they use
      moves_.clear();
      states_.clear();
      beginnings_.clear();
    }
    if (!fusion_->by_token_) return moves_.emplace(key, read(state, fusion_->pieces_[index])).first->second;
    const std::optional<Id> word = fusion_->token_words_[index];
    const auto [score, history] = word ? ngrams_.step(state.history, *word) : unknown(state.history);
    return moves_.emplace(key, FusionState::Move{state_of(history, nothing_), fusion_->scale_ * score + fusion_->word_bonus_, 0}).first->second;
  }

  /// Score of the last word and of the sentence end for a hypothesis that ends in `state`.
  double finish(FusionState& state) {
    const FusionState::Move last = read(state, {kBoundary});
    double score = last.score;
    if (const std::optional<Id>& end = ngrams_.end()) score += fusion_->scale_ * ngrams_.step(last.state->history, *end).first;
    return score;
  }

  /// Probability that a sentence ends after these tokens; 0 if the model does not predict ends.
  double end_probability(const std::vector<int>& tokens) {
    FusionStatePtr state = start_;
    for (const int token : tokens) state = FusionStatePtr(advance(*state, token).state);
    const std::optional<Id>& end = ngrams_.end();
    return end ? std::pow(10, ngrams_.step(read(*state, {kBoundary}).state->history, *end).first) : 0;
  }

  const FusionState::Losses& losses(FusionState& state) {
    if (!state.losses) {
      const bool is_open = state.begun != nothing_;
      const double going_on = is_open ? -fusion_->bonus_ : 0, ending = is_open ? ended(state).first - state.open : 0;
      state.losses = {going_on, ending, std::max(going_on + fusion_->most_going_on_, ending + fusion_->most_ending_)};
    }
    return *state.losses;
  }

 private:
  using Id = Ngrams::Id;
  using BeginningPtr = std::shared_ptr<const Beginning>;
  static constexpr std::size_t kMostStates = std::size_t{1} << 17;
  static constexpr const char* kLast = "\xf4\x8f\xbf\xbf";  // U+10FFFF

  FusionState::Move read(FusionState& state, const std::vector<std::string>& pieces) {
    Id history = state.history;
    BeginningPtr begun = state.begun;
    double score = 0;
    for (const std::string& piece : pieces) {
      if (piece != kBoundary) {
        begun = beginning(begun->letters + piece);
      } else if (begun != nothing_) {
        const auto [word_score, after] = begun == state.begun ? ended(state) : word(history, *begun);
        score += word_score;
        history = after;
        begun = nothing_;
      }
    }
    const FusionStatePtr& next = state_of(history, begun);
    return {next, score, next->open};
  }

  const FusionStatePtr& state_of(Id history, const BeginningPtr& begun) {
    FusionStatePtr& state = states_[begun->number << 32 | history];
    if (state) return state;
    state = std::make_shared<FusionState>(FusionState{history, begun, ++num_made_});
    if (begun != nothing_) {  // upper bound: the most probable word with this prefix
      double best = unknown(history).first;
      if (begun->low < begun->high) best = std::max(best, ngrams_.best(history, begun->low, begun->high, begun->best_alone));
      for (const auto& [word, share] : begun->listed) best = std::max(best, ngrams_.step(history, word).first + share);
      state->open = fusion_->scale_ * best + fusion_->word_bonus_;
    }
    return state;
  }

  // Score of the current word if it ends here, and the history after it: the same for every token that begins the next word.
  std::pair<double, Id> ended(FusionState& state) {
    if (!state.ended) state.ended = word(state.history, *state.begun);
    return *state.ended;
  }

  // Score of a word with these letters, and the history after it. If several words match, the most probable one counts.
  std::pair<double, Id> word(Id history, const Beginning& spelled) {
    std::pair<double, Id> best(-std::numeric_limits<double>::infinity(), 0);
    if (spelled.words.empty()) best = unknown(history);
    for (const auto& [word, share] : spelled.words) {
      const auto [score, after] = ngrams_.step(history, word);
      if (score + share > best.first) best = {score + share, after};
    }
    return {fusion_->scale_ * best.first + fusion_->word_bonus_, best.second};
  }

  // log10 probability of an out-of-vocabulary word, and the history after that word.
  std::pair<double, Id> unknown(Id history) const {
    std::pair<double, Id> found(0.0, 0);
    if (ngrams_.unknown()) found = ngrams_.step(history, *ngrams_.unknown());
    return {found.first + fusion_->unknown_score_, found.second};
  }

  // Return the `Beginning` for these letters. All letter sequences that begin no word share one `Beginning`.
  const BeginningPtr& beginning(const std::string& letters) {
    BeginningPtr& known = beginnings_[letters];
    if (known) return known;
    const auto& spelled = fusion_->spelled_;
    const auto first = spelled.begin(), low = std::lower_bound(first, spelled.end(), letters), high = std::lower_bound(low, spelled.end(), letters + kLast);
    Beginning found{letters, ++num_made_, static_cast<Id>(low - first), static_cast<Id>(high - first), 0, {}, {}};
    if (low != high) found.best_alone = ngrams_.best_alone(found.low, found.high);
    for (Id word = found.low; word < found.high && spelled[word] == letters; ++word) found.words.emplace_back(word, 0);
    for (auto each = fusion_->listed_.lower_bound(letters); each != fusion_->listed_.end() && each->first < letters + kLast; ++each) {
      found.listed.insert(found.listed.end(), each->second.begin(), each->second.end());
      if (each->first == letters) found.words.insert(found.words.end(), each->second.begin(), each->second.end());
    }
    const bool is_read = low != high || !found.listed.empty();
    return known = is_read ? std::make_shared<const Beginning>(std::move(found)) : unreadable_;
  }

  const Fusion* fusion_;
  const Ngrams& ngrams_;
  std::uint64_t num_made_ = 1;
  BeginningPtr nothing_ = std::make_shared<const Beginning>(), unreadable_ = std::make_shared<const Beginning>(Beginning{kUnreadable, 1, 0, 0, 0, {}, {}});
  FusionStatePtr start_;
  std::unordered_map<std::uint64_t, FusionStatePtr> states_;   // by numbers of histories and prefixes
  std::unordered_map<std::uint64_t, FusionState::Move> moves_;  // by numbers of states and tokens
  std::unordered_map<std::string, BeginningPtr> beginnings_;
};

inline Fusion::~Fusion() {
  for (const auto& idle : idle_) delete idle.load();
}

inline std::shared_ptr<FusionStates> Fusion::states(const std::shared_ptr<const Fusion>& fusion) {
  FusionStates* found = nullptr;
  for (auto& idle : fusion->idle_) found = found ? found : idle.exchange(nullptr);
  return {found ? found : new FusionStates(*fusion), [fusion](FusionStates* ended) {
    bool is_kept = false;
    for (auto& idle : fusion->idle_) {
      FusionStates* none = nullptr;
      is_kept = is_kept || (ended->size() <= FusionStates::kMostIdle && idle.compare_exchange_strong(none, ended));
    }
    if (!is_kept) delete ended;
  }};
}

}  // namespace u2moe::runtime
