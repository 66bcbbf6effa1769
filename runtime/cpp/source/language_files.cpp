// Reads language models as ARPA files and as compact files of `u2moe lm build`, as runtime/language/arpa.py and compact.py do.

#include "json.hpp"
#include "ngrams.hpp"
#include "sha256.hpp"

namespace u2moe::runtime {
namespace {

using Id = Ngrams::Id;

constexpr std::string_view kMagic("u2moe-lm\x01", 9);
constexpr std::size_t kDigestSize = 32;

std::string upper_case(const std::string& text) { return mapped(text, upper); }

// ---- compact files ----

struct Block {
  std::size_t width;  // bytes per number
  bool is_float;
  std::size_t length;
  std::string_view bytes;

  Id integer(std::size_t place) const {
    Id value = 0;
    for (std::size_t i = width; i-- > 0;) value = value << 8 | static_cast<unsigned char>(bytes[place * width + i]);
    return value;
  }

  float number(std::size_t place) const {
    const Id bits = integer(place);
    float value = 0;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
};

class CompactFile {
 public:
  CompactFile(std::string_view content, const std::string& source) : source_(source) {
    const std::size_t start = kMagic.size() + kDigestSize;
    if (content.size() < start + 4 || content.substr(0, kMagic.size()) != kMagic) {
      fail("is not a compact language model that this version can read");
    }
    if (sha256(content.substr(start)) != content.substr(kMagic.size(), kDigestSize)) {
      fail("is damaged: its content does not match its digest");
    }
    const std::size_t size = Block{4, false, 1, content.substr(start, 4)}.integer(0);
    if (size > content.size() - start - 4) fail("is damaged: its header is longer than the file");
    header_ = Json::parse(std::string(content.substr(start + 4, size)), source);
    std::size_t place = start + 4 + size;
    for (const Json& each : header_["blocks"].array()) {
      if (each.array().size() != 2) fail("is damaged: a block has no type and length");
      const std::string& type = each.array()[0].string();
      if (type != "|u1" && type != "<u2" && type != "<u4" && type != "<f4") fail("is damaged: it has a block of type " + type);
      Block block{static_cast<std::size_t>(type[2] - '0'), type[1] == 'f', static_cast<std::size_t>(each.array()[1].integer(0, 1 << 30)), {}};
      if (block.length > (content.size() - place) / block.width) fail("is damaged: its header does not match its blocks");
      block.bytes = content.substr(place, block.length * block.width);
      place += block.bytes.size();
      blocks_.push_back(block);
    }
    if (place != content.size()) fail("is damaged: its header does not match its blocks");
  }

  Ngrams model() const {
    std::vector<std::string> words;
    for (const Json& word : header_["words"].array()) words.push_back(word.string());
    const std::size_t num_orders = header_["num_ngrams"].array().size();
    if (num_orders == 0 || num_orders > 9 || blocks_.size() != 2 + 2 * (2 * num_orders - 1)) {
      fail("is damaged: its header does not match its blocks");
    }
    std::vector<Id> word = {0};
    std::vector<float> log_prob = {0}, backoff = {0};
    for (Id id = 0; id < words.size(); ++id) word.push_back(id);
    for (std::size_t i = 0; i < blocks_[1].length; ++i) word.push_back(blocks_[1].integer(i));
    const std::size_t num_columns = 2 * num_orders - 1;
    for (std::size_t column = 0; column < num_columns; ++column) {
      const Block &table = blocks_[2 + column], &codes = blocks_[2 + num_columns + column];
      if (!table.is_float || codes.is_float) fail("is damaged: a table has no numbers");
      std::vector<float>& target = column % 2 ? backoff : log_prob;
      for (std::size_t i = 0; i < codes.length; ++i) {
        const Id code = codes.integer(i);
        if (code >= table.length) fail("is damaged: a table has no value " + std::to_string(code));
        target.push_back(table.number(code));
      }
    }
    std::vector<std::uint64_t> children;
    for (std::size_t i = 0; i < blocks_[0].length; ++i) children.push_back(blocks_[0].integer(i));
    children.resize(word.size());
    backoff.resize(word.size());  // the longest n-grams have no backoff
    if (log_prob.size() != word.size()) fail("is damaged: the numbers of n-grams are inconsistent");
    return Ngrams(std::move(words), children, std::move(word), std::move(log_prob), std::move(backoff), source_);
  }

 private:
  [[noreturn]] void fail(const std::string& what) const { runtime::fail<LanguageModelError>(source_ + ": " + what); }

  std::string source_;
  Json header_;
  std::vector<Block> blocks_;
};

// ---- ARPA files ----

class ArpaFile {
 public:
  ArpaFile(std::string_view content, const std::string& source) : content_(content), source_(source) {
    if (content_.substr(0, 3) == "\xef\xbb\xbf") place_ = 3;
  }

  Ngrams model() {
    const std::vector<std::size_t> counts = read_counts();
    std::size_t highest = 0;
    for (std::size_t i = 0; i < counts.size(); ++i) highest = counts[i] ? i + 1 : highest;
    std::vector<Ngrams::Order> orders;
    for (std::size_t length = 1; length <= highest; ++length) {
      if (length > 1) expect(next(), title(length));
      orders.push_back(order(length, counts[length - 1], highest));
    }
    std::string_view end = next();
    for (std::size_t length = highest + 1; length <= counts.size(); ++length) {  // sections without n-grams are optional
      if (end == title(length)) end = next();
    }
    expect(end, "\\end\\");
    return Ngrams::of(words_, orders, source_, upper_case);
  }

 private:
  static std::string title(std::size_t length) { return "\\" + std::to_string(length) + "-grams:"; }

  [[noreturn]] void fail(const std::string& what) const {
    runtime::fail<LanguageModelError>(source_ + ": line " + std::to_string(number_) + ": " + what);
  }

  static std::string quoted(std::string_view text) { return "'" + std::string(text.substr(0, 60)) + "'"; }

  void expect(std::string_view found, const std::string& expected) const {
    if (found != expected) fail("found " + quoted(found) + ", expected '" + expected + "'");
  }

  // Return the next non-empty line; "" at the end.
  std::string_view next() {
    constexpr const char* blanks = " \t\r\n";
    while (place_ < content_.size()) {
      const std::size_t end = std::min(content_.find('\n', place_), content_.size());
      std::string_view line = content_.substr(place_, end - place_);
      place_ = end + 1;
      ++number_;
      line.remove_prefix(std::min(line.find_first_not_of(blanks), line.size()));
      line = line.substr(0, line.find_last_not_of(blanks) + 1);
      if (!line.empty()) return line;
    }
    return {};
  }

  static std::vector<std::string_view> split(std::string_view line) {
    constexpr const char* blanks = " \t\r\v\f";
    std::vector<std::string_view> fields;
    for (std::size_t begin = line.find_first_not_of(blanks); begin != line.npos; begin = line.find_first_not_of(blanks, begin)) {
      const std::size_t end = std::min(line.find_first_of(blanks, begin), line.size());
      fields.push_back(line.substr(begin, end - begin));
      begin = end;
    }
    return fields;
  }

  // Read the number of n-grams of each order from the header.
  std::vector<std::size_t> read_counts() {
    std::string_view line = next();
    while (!line.empty() && line != "\\data\\") line = next();  // a file may begin with comments
    if (line.empty()) fail("there is no \\data\\: not an ARPA file");
    std::vector<std::size_t> counts;
    for (line = next(); line != title(1); line = next()) {
      const std::string expected = "ngram " + std::to_string(counts.size() + 1) + "=";
      std::string compact;
      for (const std::string_view field : split(line)) compact += (compact == "ngram" ? " " : "") + std::string(field);
      const std::string digits = compact.substr(std::min(expected.size(), compact.size()));
      if (compact.compare(0, expected.size(), expected) != 0 || digits.empty() || digits.size() > 10 ||
          digits.find_first_not_of("0123456789") != std::string::npos) {
        fail("found " + quoted(line) + ", expected '" + expected + "' and a count, or '" + title(1) + "'");
      }
      counts.push_back(std::stoull(digits));
      if (counts.size() > static_cast<std::size_t>(Ngrams::kMostOrder)) fail("found n-grams of more than 9 words");
    }
    if (counts.empty() || counts[0] == 0 || counts[0] > Ngrams::kMostWords) fail("the number of unigrams in the header is 0 or too large");
    return counts;
  }

  Ngrams::Order order(std::size_t length, std::size_t count, std::size_t highest) {
    Ngrams::Order order;
    for (std::size_t i = 0; i < count; ++i) {
      const std::string_view line = next();
      const std::vector<std::string_view> fields = split(line);
      if (fields.size() != length + 1 && fields.size() != length + 2) {
        fail("found " + quoted(line) + ", expected a " + std::to_string(length) + "-gram (the header announces " +
             std::to_string(count) + " of them)");
      }
      order.log_prob.push_back(static_cast<float>(log_prob(fields[0])));
      const bool has_backoff = fields.size() == length + 2 && length < highest;
      const std::optional<double> backoff = has_backoff ? parse_number(fields.back()) : 0.0;
      if (!backoff) fail("found " + quoted(line) + ", expected a log probability, words and optionally a backoff");
      order.backoff.push_back(static_cast<float>(*backoff));
      for (std::size_t k = 1; k <= length; ++k) order.words.push_back(id_of(fields[k], length == 1));
    }
    return order;
  }

  double log_prob(std::string_view field) const {
    constexpr double zero = -99;  // ARPA files write the logarithm of 0 this way
    if (field == "-inf") return zero;  // some programs write this
    const std::optional<double> found = parse_number(field);
    if (!found) fail("found " + quoted(field) + ", expected a log probability, words and optionally a backoff");
    if (*found > Ngrams::kMostLog) fail("found " + std::string(field) + ", expected the logarithm of a probability");
    return std::max(*found, zero);
  }

  Id id_of(std::string_view word, bool is_unigram) {
    const auto found = ids_.find(std::string(word));
    if (found != ids_.end()) return found->second;
    if (!is_unigram) fail(quoted(word) + " is not among the unigrams");
    const Id id = static_cast<Id>(words_.size());
    ids_.emplace(word, id);
    words_.emplace_back(word);
    return id;
  }

  std::string_view content_;
  std::string source_;
  std::size_t place_ = 0, number_ = 0;
  std::unordered_map<std::string, Id> ids_;
  std::vector<std::string> words_;
};

}  // namespace

Ngrams Ngrams::parse(const std::string& content, const std::string& source) {
  if (content.compare(0, kMagic.size() - 1, kMagic.substr(0, kMagic.size() - 1)) == 0) {
#ifdef __cpp_exceptions
    try {
      return CompactFile(content, source).model();
    } catch (const BundleError& error) {  // from the JSON header
      throw LanguageModelError(source + ": is damaged: " + error.what());
    }
#else
    return CompactFile(content, source).model();
#endif
  }
  if (content.compare(0, 2, "\x1f\x8b") == 0) runtime::fail<LanguageModelError>(source + ": is compressed: unpack it with gunzip first");
  return ArpaFile(content, source).model();
}

}  // namespace u2moe::runtime
