// Rules for written English, as in runtime/text/written/english.py and in the same order. That file explains each rule.
#include "result.hpp"

namespace u2moe::runtime {
namespace {

using Words = std::vector<std::string>;
using Place = std::size_t;

struct Number {
  std::int64_t value;
  Place end;  // place after the last word
};

using Found = std::optional<Number>;

// A written word, and the range of spoken words that it stands for.
struct Part {
  std::string text;
  Place begin, end;
};

using Parts = std::vector<Part>;  // result of a rule; empty if the rule does not apply

Words split(const std::string& text) {
  Words words(1);
  for (const char32_t c : decode_utf8(text)) {
    if (!is_space(c)) words.back() += encode_utf8({c});
    else if (!words.back().empty()) words.emplace_back();
  }
  if (words.back().empty()) words.pop_back();
  return words;
}

const Words kUnits = split("one two three four five six seven eight nine");
const Words kTeens = split("ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen");
const Words kTens = split("ten twenty thirty forty fifty sixty seventy eighty ninety");
const Words kScales = split("thousand million billion trillion");
const Words kMonths = split("january february march april may june july august september october november december");
const Words kWithin = split("and point of hundred thousand million billion trillion p dollar dollars euro euros");
const Words kAfterDates = split(
    "and or but so then at on in to from until till by for with as the i you he she it we they this that there is was will would if when "
    "because before after today tonight tomorrow yesterday please monday tuesday wednesday thursday friday saturday sunday");
const Words kCurrencies = split("dollar dollars euro euros");
const Words kCounted = split("percent cent cents degrees dollar dollars euro euros");
const Words kHalves = split("half quarter quarters");
const Words kPlurals = split("twenties thirties forties fifties sixties seventies eighties nineties hundreds thousands millions billions");
const Words kBeforeTimes = split("at by until till from to around before after since");
const Words kIrregular = split("first one second two third three fifth five eighth eight ninth nine twelfth twelve");
bool is_in(const Words& words, const std::string& word) { return std::count(words.begin(), words.end(), word) > 0; }

// Return `step` times the index of a word in a list. The first word has index `first`. 0: the word is not in the list.
std::int64_t number_in(const Words& words, const std::string& word, std::int64_t first = 1, std::int64_t step = 1) {
  const auto found = std::find(words.begin(), words.end(), word);
  return found == words.end() ? 0 : step * (first + (found - words.begin()));
}

std::int64_t unit(const std::string& word) { return number_in(kUnits, word); }
std::int64_t tens(const std::string& word) { return word == "ten" ? 0 : number_in(kTens, word, 1, 10); }
bool is_zero(const std::string& word) { return word == "zero" || word == "oh"; }

// Whether a word may follow a date, a time or an amount of money, but is not counted by a number. "": the end of the text.
bool may_follow(const std::string& word) { return word.empty() || is_in(kAfterDates, word); }

std::int64_t scale_of(const std::string& word) {
  std::int64_t scale = 1;
  for (std::int64_t i = number_in(kScales, word); i > 0; --i) scale *= 1000;
  return scale;
}

// Spoken words in lower case, and the rules that convert them to written form.
class Spoken {
 public:
  explicit Spoken(Words words) : words_(std::move(words)) {}

  Parts written() const {
    Parts all;
    for (Place place = 0; place < words_.size(); place = all.back().end) {
      Parts found;
      for (const auto rule : {&Spoken::date, &Spoken::time, &Spoken::spoken_year, &Spoken::digit_row, &Spoken::ordinal, &Spoken::quantity}) {
        if (found.empty()) found = (this->*rule)(place);
      }
      if (found.empty()) found = {part(place)};
      all.insert(all.end(), found.begin(), found.end());
    }
    return all;
  }

  // Number of words whose written form cannot change: all except a last number, date or amount that may still grow.
  Place num_settled() const {
    Place begin = words_.size();
    while (begin && is_read_on(begin - 1)) --begin;
    while (begin < words_.size() && is_in(kWithin, at(begin))) ++begin;
    return begin;
  }

 private:
  bool is_read_on(Place place) const {
    const std::string& word = at(place);
    return is_number(place) || is_in(kMonths, word) || is_in(kWithin, word) || word == "a" || !of_ordinal(word).empty();
  }

  // Word at a place; empty beyond the end.
  const std::string& at(Place place) const {
    static const std::string none;
    return place < words_.size() ? words_[place] : none;
  }

  Part part(Place place) const { return {at(place), place, place + 1}; }

  bool is_number(Place place) const {
    const std::string& word = at(place);
    return unit(word) || is_in(kTeens, word) || tens(word) || is_in(kScales, word) || word == "hundred" || is_zero(word);
  }

  bool goes_on(Place place) const { return is_number(place) && (at(place) != "oh" || is_number(place + 1)); }

  Parts as_spoken(Place place, Place end = 0) const {
    if (!end) {
      for (end = place + 1; is_number(end);) ++end;
    }
    Parts parts;
    for (; place < end; ++place) parts.push_back(part(place));
    return parts;
  }

  // ---- Numbers ----

  Found below_hundred(Place place) const {
    if (const std::int64_t ten = tens(at(place))) {
      const std::int64_t rest = unit(at(place + 1));
      return Number{ten + rest, place + 1 + (rest > 0)};
    }
    const std::int64_t number = unit(at(place)) + number_in(kTeens, at(place), 10);
    return number ? Found(Number{number, place + 1}) : std::nullopt;
  }

  Found group(Place place, bool with_and) const {
    const bool is_one = at(place) == "a" && (at(place + 1) == "hundred" || is_in(kScales, at(place + 1)));
    const Found found = is_one ? Number{1, place + 1} : below_hundred(place);
    if (!found || at(found->end) != "hundred") return found;
    const Place end = found->end + 1;
    const Found rest = below_hundred(end + (with_and && at(end) == "and"));
    if (rest && at(rest->end) != "hundred") return Number{100 * found->value + rest->value, rest->end};
    return Number{100 * found->value, end};
  }

  Found cardinal(Place place, bool with_and = true) const {
    if (at(place) == "zero") return Number{0, place + 1};
    Found total;
    for (std::int64_t scale = 1'000'000'000'000'000;;) {
      const Place begin = place + (total && with_and && at(place) == "and");
      const Found found = group(begin, with_and);
      if (!found || (begin > place && found->value >= 100)) return total;
      const std::int64_t following = scale_of(at(found->end));
      if (following >= scale || (following == 1 && total && found->value >= 1000)) return total;
      place = found->end + (following > 1);
      total = Number{(total ? total->value : 0) + found->value * following, place};
      scale = following;
      if (following == 1) return total;
    }
  }

  Found numbered(Place place) const {
    constexpr Place most_words = 20;
    for (Place end = std::min(words_.size(), place + most_words); end > place; --end) {
      const std::string last = of_ordinal(at(end - 1));
      if (last.empty()) continue;
      Words alone(words_.begin() + static_cast<std::ptrdiff_t>(place), words_.begin() + static_cast<std::ptrdiff_t>(end - 1));
      alone.push_back(last);
      const Found found = Spoken(std::move(alone)).cardinal(0);
      if (found && found->end == end - place) return Number{found->value, end};
      if (!found && end - 1 == place && last == "hundred") return Number{100, end};
      if (!found && end - 1 == place && is_in(kScales, last)) return Number{scale_of(last), end};
    }
    return std::nullopt;
  }

  static std::string of_ordinal(const std::string& word) {
    for (std::size_t i = 0; i < kIrregular.size(); i += 2) {
      if (word == kIrregular[i]) return kIrregular[i + 1];
    }
    const std::size_t size = word.size();
    if (size > 4 && word.compare(size - 4, 4, "ieth") == 0 && tens(word.substr(0, size - 4) + "y")) return word.substr(0, size - 4) + "y";
    if (size < 3 || word.compare(size - 2, 2, "th") != 0) return "";
    const std::string regular = word.substr(0, size - 2);
    return unit(regular) || is_in(kTeens, regular) || regular == "hundred" || is_in(kScales, regular) ? regular : "";
  }

  // Return the text of digits spoken one by one, and the place after them. "": fewer than two digits, or all are "oh".
  std::pair<std::string, Place> digits(Place place) const {
    std::string found;
    bool is_row = false;
    for (; unit(at(place)) || is_zero(at(place)); ++place) {
      found += static_cast<char>('0' + unit(at(place)));
      is_row |= at(place) != "oh";
    }
    return {found.size() > 1 && is_row ? found : "", place};
  }

  Found halved_year(Place place) const {
    const Found century = below_hundred(place);
    if (!century || century->value < 13 || century->value > 20) return std::nullopt;
    place = century->end;
    if (is_zero(at(place)) && unit(at(place + 1))) return Number{100 * century->value + unit(at(place + 1)), place + 2};
    const Found rest = below_hundred(place);
    return rest && rest->value >= 10 ? Found(Number{100 * century->value + rest->value, rest->end}) : std::nullopt;
  }

  Found year(Place place) const {
    Found found = halved_year(place);
    if (!found) found = cardinal(place);
    return found && found->value >= 1000 && found->value <= 2999 && at(place) != "a" ? found : std::nullopt;
  }

  // ---- Rules ----

  Parts date(Place place) const {
    const std::string& month = at(place);
    if (!is_in(kMonths, month)) return {};
    const bool is_verb = month == "march" || month == "may";
    Found day = numbered(place + 1);
    if (!day && !is_verb) {
      day = below_hundred(place + 1);
      if (day && !may_follow(at(day->end)) && !year(day->end)) day.reset();
    }
    const Found alone = year(place + 1);
    if (!day) return is_verb || !alone ? Parts{} : Parts{part(place), {std::to_string(alone->value), place + 1, alone->end}};
    if (day->value < 1 || day->value > 31 || alone) return {};
    const Found found = year(day->end);
    Parts parts = {part(place), {std::to_string(day->value) + (found ? "," : ""), place + 1, day->end}};
    if (found) parts.push_back({std::to_string(found->value), day->end, found->end});
    return parts;
  }

  Parts time(Place place) const {
    const Found hour = below_hundred(place);
    if (!hour || hour->value > 12) return {};
    const auto [minutes, end] = minutes_at(hour->end);
    const auto [half, after] = half_of_day(end);
    const std::string text = std::to_string(hour->value) + minutes;
    if (!half.empty()) return {{text, place, end}, {half, end, after}};
    if (minutes.empty() && at(end) == "o'clock") return {{text, place, end}, {"o'clock", end, end + 1}};
    const bool is_open = at(place - 1) == "at" ? !is_in(kCounted, at(end)) && !goes_on(end) : may_follow(at(end));
    return !minutes.empty() && is_in(kBeforeTimes, at(place - 1)) && is_open ? Parts{{text, place, end}} : Parts{};
  }

  std::pair<std::string, Place> minutes_at(Place place) const {
    if (at(place) == "oh" && unit(at(place + 1))) return {":0" + std::to_string(unit(at(place + 1))), place + 2};
    const Found found = below_hundred(place);
    if (!found || found->value < 10 || found->value > 59) return {"", place};
    return {":" + std::to_string(found->value), found->end};
  }

  std::pair<std::string, Place> half_of_day(Place place) const {
    for (const std::string letter : {"a", "p"}) {
      const std::string half = letter + ".m.";
      if (at(place) == letter + "m" || at(place) == half) return {half, place + 1};
      if (at(place) == letter && at(place + 1) == "m") return {half, place + 2};
    }
    return {"", place};
  }

  Parts spoken_year(Place place) const {
    const Found found = halved_year(place);
    return !found || goes_on(found->end) ? Parts{} : Parts{{std::to_string(found->value), place, found->end}};
  }

  Parts digit_row(Place place) const {
    const auto [found, end] = digits(place);
    if (found.size() < 3) return {};
    return goes_on(end) ? as_spoken(place) : Parts{{found, place, end}};
  }

  Parts ordinal(Place place) const {
    const Found found = numbered(place);
    if (!found) return {};
    if ((at(place) == "a" || at(place) == "one") && found->end == place + 2) return as_spoken(place, found->end);
    if (at(place - 1) == "a" || is_number(place - 1)) return {};
    const bool is_day = at(found->end) == "of" && is_in(kMonths, at(found->end + 1));
    if (found->value < 10 && !is_day) return {};
    const std::int64_t last = found->value % 100 / 10 == 1 ? 0 : found->value % 10;
    return {{std::to_string(found->value) + (last == 1 ? "st" : last == 2 ? "nd" : last == 3 ? "rd" : "th"), place, found->end}};
  }

  Parts quantity(Place place) const {
    const std::string& before = at(place - 1);
    const Found found = cardinal(place, before != "between");
    if (!found) return {};
    const bool is_part = is_in(kHalves, before) || (before == "of" && is_in(kHalves, at(place - 2)));
    if (at(place) == "a" && (found->value < 1000 || is_part)) return {};
    auto [text, end] = decimal(*found);
    const bool is_decimal = text.find('.') != text.npos;
    if (is_decimal && found->value == 1 && before == "at" && !is_in(kCounted, at(end)) && !is_in(kScales, at(end))) return {};
    std::string scale = is_decimal && is_in(kScales, at(end)) ? at(end) : "";
    const std::string& last = at(end - 1);
    if (!is_decimal && found->value >= 1'000'000 && scale_of(last) > 1000 && found->value % scale_of(last) == 0 && end - 1 > place) {
      scale = last;
      text = with_commas(found->value / scale_of(last), 1000);
      --end;
    }
    const Place after = end + !scale.empty();
    if (goes_on(after) || is_in(kPlurals, at(after))) return as_spoken(place);
    if (is_in(kCurrencies, at(after))) return money(place, text, end, scale);
    if (at(after) == "percent" && scale.empty()) return {{text + "%", place, after + 1}};
    if (!scale.empty()) return {{text, place, end}, {scale, end, end + 1}};
    return is_decimal || found->value >= 10 ? Parts{{text, place, end}} : Parts{};
  }

  static std::string with_commas(std::int64_t number, std::int64_t least = 10'000) {
    std::string text = std::to_string(number);
    for (std::size_t place = text.size(); number >= least && place > 3; text.insert(place, ",")) place -= 3;
    return text;
  }

  // Return a number in digits, with any decimals after "point", and the place of the word after the number.
  std::pair<std::string, Place> decimal(const Number& number) const {
    const Place place = number.end + 1;
    const std::string whole = std::to_string(number.value) + ".";
    if (at(number.end) == "point") {
      if (const auto [spoken, end] = digits(place); !spoken.empty()) return {whole + spoken, end};
      if (unit(at(place)) || is_zero(at(place))) return {whole + std::to_string(unit(at(place))), place + 1};
      if (const Found found = below_hundred(place)) return {whole + std::to_string(found->value), found->end};
    }
    return {with_commas(number.value), number.end};
  }

  Parts money(Place place, const std::string& text, Place end, const std::string& scale) const {
    const Place after = end + !scale.empty();
    const std::string amount = (at(after)[0] == 'd' ? "$" : "\xe2\x82\xac") + text;
    if (!scale.empty()) return {{amount, place, end}, {scale, end, after + 1}};
    const Place following = after + 1 + (at(after + 1) == "and");
    const Found cents = text.find('.') == text.npos ? below_hundred(following) : std::nullopt;
    if (cents) {
      const std::string& last = at(cents->end);
      const std::string with_cents = amount + (cents->value < 10 ? ".0" : ".") + std::to_string(cents->value);
      if (last == "cent" || last == "cents") return {{with_cents, place, cents->end + 1}};
      if (cents->value >= 10 && following == after + 1 && may_follow(last)) return {{with_cents, place, cents->end}};
    }
    return {{amount, place, after + 1}};
  }

  Words words_;
};

// ---- Letter case ----

std::string capital(const std::string& text) {
  std::u32string characters = decode_utf8(text);
  if (!characters.empty()) characters[0] = upper(characters[0]);
  return encode_utf8(characters);
}

std::string text_of(const Parts& parts) {
  return joined(parts, " ", [](const Part& part) { return part.text; });
}

// Words and phrases that are always capitalized. Each pair contains the phrase in lower case, and its words as written.
const std::vector<std::pair<std::string, Words>> kCapitalized = [] {
  std::vector<std::pair<std::string, Words>> all;
  for (std::string phrase : split(
           "Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February April June July August September October November December "
           "I I'm I've I'll I'd Christmas Easter English American British French German Spanish Chinese Japanese America Europe Africa Asia England "
           "Britain France Germany Spain China Japan India London Paris New_York United_States Internet OK TV PC Mr Mrs Ms Dr")) {
    std::replace(phrase.begin(), phrase.end(), '_', ' ');
    all.emplace_back(mapped(phrase, lower), split(phrase));
  }
  return all;
}();

// Number of words whose letter case cannot change: all words, or those before an incomplete phrase at the end.
std::size_t num_settled(const Parts& parts) {
  for (std::size_t place = 0; place < parts.size(); ++place) {
    const std::string rest = text_of({parts.begin() + static_cast<std::ptrdiff_t>(place), parts.end()}) + " ";
    for (const auto& each : kCapitalized) {
      if (each.first.compare(0, rest.size(), rest) == 0) return place;
    }
  }
  return parts.size();
}

// Capitalize the first word, months in dates, and all words and phrases that are always capitalized.
void capitalize(Parts& parts) {
  for (std::size_t place = 0; place < parts.size(); ++place) {
    for (const auto& [found, words] : kCapitalized) {
      if (place + words.size() > parts.size()) continue;
      const auto first = parts.begin() + static_cast<std::ptrdiff_t>(place);
      const std::string text = text_of({first, first + static_cast<std::ptrdiff_t>(words.size())});
      if (text != found && text != found + "'s") continue;
      for (std::size_t i = 0; i < words.size(); ++i) parts[place + i].text = words[i];
      place += words.size() - 1;
      if (text != found) parts[place].text += "'s";
      break;
    }
  }
  if (!parts.empty()) parts[0].text = capital(parts[0].text);
  const auto is_digit = [&](std::size_t place) { return place < parts.size() && parts[place].text[0] >= '0' && parts[place].text[0] <= '9'; };
  for (std::size_t place = 0; place < parts.size(); ++place) {  // next to a number, march and may are months
    const bool is_after_day = place >= 2 && parts[place - 1].text == "of" && is_digit(place - 2);
    if (is_in(kMonths, parts[place].text) && (is_digit(place + 1) || is_after_day)) parts[place].text = capital(parts[place].text);
  }
}

bool is_english(const Words& words) {
  const std::u32string all = decode_utf8(joined(words, " "));
  return std::none_of(all.begin(), all.end(), is_spaceless);
}

Words small_words(const Words& spoken) {
  Words plain;
  for (const std::string& word : spoken) plain.push_back(mapped(word, lower));
  return plain;
}

bool is_capital(const Words& words) {
  return std::all_of(words.begin(), words.end(), [](const std::string& word) { return word == mapped(word, upper); });
}

Parts parts_of(const Words& spoken) {
  const Words plain = small_words(spoken);
  Parts parts = Spoken(plain).written();
  if (is_capital(spoken)) {
    capitalize(parts);
    return parts;
  }
  for (Part& part : parts) {
    if (part.end == part.begin + 1 && part.text == plain[part.begin]) part.text = spoken[part.begin];
  }
  return parts;
}

std::string written_text(const std::string& text) {
  const Words spoken = split(text);
  return is_english(spoken) ? text_of(parts_of(spoken)) : text;
}

// Number of written words that come from the committed words `spoken` and cannot be changed by later words.
std::size_t num_settled(const Words& spoken, const Vocabulary& vocabulary) {
  // Later words may still show that the text is not English, or not all in capitals.
  if (vocabulary.has_spaceless() || (vocabulary.has_both_cases() && is_capital(spoken))) return 0;
  Words plain = small_words(spoken);
  plain.resize(Spoken(plain).num_settled());
  return num_settled(Spoken(plain).written());
}

void commit(Result& result, const Vocabulary& vocabulary) {
  const Words spoken = split(result.text);
  if (!is_english(spoken)) return;
  Parts parts = parts_of(spoken);
  if (!result.is_final) parts.resize(num_settled(split(result.committed), vocabulary));
  result.committed = text_of(parts);
  result.num_committed = static_cast<int>(parts.size());
}

}  // namespace

Result written(Result result, const Vocabulary& vocabulary) {
  commit(result, vocabulary);
  Words spoken;
  for (const Word& word : result.words) spoken.push_back(word.text);
  if (!spoken.empty() && is_english(spoken) && joined(spoken, " ") == result.text) {
    const Parts parts = parts_of(spoken);
    std::vector<Word> words;
    for (const Part& part : parts) {
      Word word{part.text, result.words[part.begin].start, result.words[part.end - 1].end, 1};
      for (Place place = part.begin; place < part.end; ++place) word.confidence = std::min(word.confidence, result.words[place].confidence);
      words.push_back(word);
    }
    result.words = std::move(words);
    result.text = text_of(parts);
  } else {
    result.text = written_text(result.text);
  }
  std::set<std::string> seen;
  std::vector<Alternative> nbest;
  for (Alternative& each : result.nbest) {
    each.text = written_text(each.text);
    if (seen.insert(each.text).second) nbest.push_back(std::move(each));
  }
  result.nbest = std::move(nbest);
  return result;
}

}  // namespace u2moe::runtime
