// Recognises WAV files or raw PCM as it comes:  u2moe_transcribe [--json] [--raw] [options] BUNDLE [FILE.wav... | -]
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iostream>
#include <stdexcept>
#include <string>

#include "stream.hpp"

namespace {

constexpr const char* kUsage =
    "usage: u2moe_transcribe [--json] [--raw] [--no-endpoint] [--left-chunks N] [--threads N] BUNDLE [FILE.wav... | -]\n"
    "Reads 16-bit mono WAV at the model's rate from files or standard input; --raw: samples without a header.\n"
    "Prints partial results on stderr and final ones on stdout; --json: one JSON object per final result.\n";

struct Arguments {
  bool json = false, raw = false;
  int num_threads = 1;
  u2moe::StreamOptions options;
  std::string bundle;
  std::vector<std::string> files;
};

int integer(const char* text, int least, int most) {
  char* end = nullptr;
  const long value = std::strtol(text, &end, 10);
  if (*text == '\0' || *end != '\0' || value < least || value > most) throw std::invalid_argument(std::string("invalid number ") + text);
  return static_cast<int>(value);
}

Arguments parse(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--json") arguments.json = true;
    else if (argument == "--raw") arguments.raw = true;
    else if (argument == "--no-endpoint") arguments.options.endpoint = false;
    else if (argument == "--left-chunks" && i + 1 < argc) arguments.options.num_left_chunks = integer(argv[++i], -1, 100000);
    else if (argument == "--threads" && i + 1 < argc) arguments.num_threads = integer(argv[++i], 1, 64);
    else if (argument.size() > 1 && argument[0] == '-') throw std::invalid_argument("unknown option " + argument);
    else if (arguments.bundle.empty()) arguments.bundle = argument;
    else arguments.files.push_back(argument);
  }
  if (arguments.bundle.empty()) throw std::invalid_argument("the folder of a bundle is missing");
  if (arguments.files.empty()) arguments.files = {"-"};
  return arguments;
}

// A file or standard input as blocks of samples.
class Audio {
 public:
  Audio(const std::string& file, bool raw, int sample_rate) : name_(file), file_(file == "-" ? stdin : std::fopen(file.c_str(), "rb")) {
    if (!file_) throw std::runtime_error(file + ": cannot be read");
    try {
      if (!raw) read_header(sample_rate);
    } catch (...) {
      close();
      throw;
    }
  }
  ~Audio() { close(); }
  Audio(const Audio&) = delete;
  Audio& operator=(const Audio&) = delete;

  // The next samples in [-1, 1]; none at the end.
  std::vector<float> read() {
    unsigned char bytes[3200];
    const std::size_t wanted = left_ < sizeof bytes ? static_cast<std::size_t>(left_) : sizeof bytes;
    const std::size_t num = std::fread(bytes, 1, wanted, file_) / 2;
    if (left_ != kEndless) left_ -= 2 * num;
    std::vector<float> samples(num);
    for (std::size_t i = 0; i < num; ++i) {
      samples[i] = static_cast<float>(static_cast<std::int16_t>(bytes[2 * i] | bytes[2 * i + 1] << 8)) / 32768.0F;
    }
    return samples;
  }

 private:
  static constexpr std::uint64_t kEndless = ~std::uint64_t{0};

  void close() {
    if (file_ && file_ != stdin) std::fclose(file_);
    file_ = nullptr;
  }

  [[noreturn]] void fail(const std::string& what) const { throw std::runtime_error(name_ + ": " + what); }

  void take(unsigned char* bytes, std::size_t num) {
    if (std::fread(bytes, 1, num, file_) != num) fail("is not a WAV file, or ends within its header");
  }

  void read_header(int sample_rate) {
    unsigned char head[12], chunk[8], format[16];
    take(head, 12);
    if (std::memcmp(head, "RIFF", 4) != 0 || std::memcmp(head + 8, "WAVE", 4) != 0) fail("is not a WAV file");
    const auto number = [](const unsigned char* bytes, int size) {
      std::uint32_t value = 0;
      for (int i = size - 1; i >= 0; --i) value = value << 8 | bytes[i];
      return value;
    };
    for (bool has_format = false;;) {
      take(chunk, 8);
      std::uint64_t size = number(chunk + 4, 4);
      if (std::memcmp(chunk, "data", 4) == 0) {
        if (!has_format) fail("has no format before its data");
        left_ = size == 0xffffffffU || size == 0 ? kEndless : size;  // a program that writes to a pipe knows no size
        return;
      }
      if (std::memcmp(chunk, "fmt ", 4) == 0 && size >= 16) {
        take(format, 16);
        has_format = true;
        const std::uint32_t channels = number(format + 2, 2), rate = number(format + 4, 4), bits = number(format + 14, 2);
        if (channels != 1 || bits != 16 || rate != static_cast<std::uint32_t>(sample_rate)) {
          fail("has " + std::to_string(channels) + " channels of " + std::to_string(bits) + " bits at " + std::to_string(rate) +
               " Hz, expected one of 16 bits at " + std::to_string(sample_rate) + " Hz");
        }
        size -= 16;
      }
      for (size += size % 2; size > 0; --size) {
        if (std::fgetc(file_) == EOF) fail("ends within its header");
      }
    }
  }

  std::string name_;
  std::FILE* file_;
  std::uint64_t left_ = kEndless;
};

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    if (static_cast<unsigned char>(c) >= 0x20) result += c;
  }
  return result + '"';
}

template <class Items, class Show>
std::string listed(const Items& items, Show show) {
  std::string result = "[";
  for (const auto& item : items) result += (result.size() > 1 ? ", " : "") + show(item);
  return result + "]";
}

std::string number(double value) {
  char text[40];
  std::snprintf(text, sizeof text, "%.10g", value);
  return text;
}

std::string as_json(const u2moe::Result& result, const std::string& file) {
  const auto tokens = [](const std::vector<int>& ids) { return listed(ids, [](int id) { return std::to_string(id); }); };
  const auto word = [](const u2moe::Word& w) {
    return "{\"word\": " + quoted(w.text) + ", \"start\": " + number(w.start) + ", \"end\": " + number(w.end) +
           ", \"confidence\": " + number(w.confidence) + "}";
  };
  const auto alternative = [&tokens](const u2moe::Alternative& a) {
    return "{\"text\": " + quoted(a.text) + ", \"tokens\": " + tokens(a.tokens) + ", \"score\": " + number(a.score) + "}";
  };
  return "{\"file\": " + quoted(file) + ", \"text\": " + quoted(result.text) + ", \"segment\": " + std::to_string(result.segment) + ", \"tokens\": " +
         tokens(result.tokens) + ", \"times\": " + listed(result.times, number) + ", \"words\": " + listed(result.words, word) +
         ", \"nbest\": " + listed(result.nbest, alternative) + "}";
}

void print(const u2moe::Result& result, const std::string& file, bool json) {
  if (!result.is_final) {
    if (!json) std::fprintf(stderr, "\r\033[K%s", result.text.c_str());
  } else if (json) {
    std::printf("%s\n", as_json(result, file).c_str());
  } else {
    std::fprintf(stderr, "\r\033[K");
    std::printf("%.2f %.2f %s\n", result.words.front().start, result.words.back().end, result.text.c_str());
  }
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  setenv("ORT_DISABLE_TELEMETRY", "1", 0);  // newer versions of onnxruntime write to the home folder otherwise
  try {
    const Arguments arguments = parse(argc, argv);
    const u2moe::Bundle bundle(arguments.bundle);
    u2moe::Graphs graphs(bundle, arguments.num_threads);
    for (const std::string& file : arguments.files) {
      Audio audio(file, arguments.raw, bundle.manifest.sample_rate);
      const auto show = [&](const u2moe::Result& result) { print(result, file, arguments.json); };
      u2moe::Stream stream(graphs, bundle, arguments.options, show);
      for (std::vector<float> samples = audio.read(); !samples.empty(); samples = audio.read()) {
        stream.accept(samples.data(), samples.size());
      }
      stream.finish();
    }
    return 0;
  } catch (const std::invalid_argument& error) {
    std::cerr << "u2moe_transcribe: " << error.what() << "\n" << kUsage;
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "u2moe_transcribe: " << error.what() << "\n";
    return 1;
  }
}
