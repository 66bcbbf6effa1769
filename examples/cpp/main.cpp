// Recognises WAV files or raw PCM as it comes:  u2moe_transcribe [options] BUNDLE [FILE.wav... | -]
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "audio_file.hpp"
#include "u2moe/number.hpp"
#include "u2moe/recognizer.hpp"

namespace {

constexpr const char* kUsage =
    "usage: u2moe_transcribe [options] BUNDLE [FILE.wav... | -]\n"
    "Recognises files or standard input as they stream in: partial results on stderr, final ones with times on stdout.\n"
    "  --hotwords FILE    phrases to prefer, one a line, \"kubernetes :2.5\"\n"
    "  --raw              samples of 16 bits without a header, one channel\n"
    "  --rate HZ          rate of raw samples; without it, that of the model\n"
    "  --left-chunks N    chunks of the past that the encoder sees; -1: all\n"
    "  --padding S        seconds of silence around input that is cut in a sound; without it, as in the bundle\n"
    "  --no-endpoint      the whole input is one utterance\n"
    "  --threads N        threads of onnxruntime\n"
    "  --json             one JSON object for each final result\n"
    "  --timing           with --json, one more for each file: milliseconds to load and to recognise\n";

struct Arguments {
  bool json = false, raw = false, timing = false;
  int num_threads = 1, rate = 0;
  u2moe::StreamOptions options;
  std::string bundle, hotwords;
  std::vector<std::string> files;
};

int integer(const char* text, int least, int most) {
  char* end = nullptr;
  const long value = std::strtol(text, &end, 10);
  if (*text == '\0' || *end != '\0' || value < least || value > most) throw std::invalid_argument(std::string("invalid number ") + text);
  return static_cast<int>(value);
}

double quantity(const char* text) {
  const std::optional<double> value = u2moe::parse_number(text);
  if (!value) throw std::invalid_argument(std::string("invalid number ") + text);
  return *value;
}

Arguments parse(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const auto value = [&] {
      if (i + 1 == argc) throw std::invalid_argument(argument + " needs a value");
      return argv[++i];
    };
    if (argument == "--json") arguments.json = true;
    else if (argument == "--timing") arguments.timing = true;
    else if (argument == "--raw") arguments.raw = true;
    else if (argument == "--rate") arguments.rate = integer(value(), 1000, 384000);
    else if (argument == "--hotwords") arguments.hotwords = value();
    else if (argument == "--no-endpoint") arguments.options.endpoint = false;
    else if (argument == "--left-chunks") arguments.options.num_left_chunks = integer(value(), -1, 100000);
    else if (argument == "--padding") arguments.options.padding_s = quantity(value());
    else if (argument == "--threads") arguments.num_threads = integer(value(), 1, 64);
    else if (argument.size() > 1 && argument[0] == '-') throw std::invalid_argument("unknown option " + argument);
    else if (arguments.bundle.empty()) arguments.bundle = argument;
    else arguments.files.push_back(argument);
  }
  if (arguments.bundle.empty()) throw std::invalid_argument("the folder of a bundle is missing");
  if (arguments.rate && !arguments.raw) throw std::invalid_argument("--rate is for --raw: a WAV file has its own");
  if (arguments.files.empty()) arguments.files = {"-"};
  return arguments;
}

std::vector<u2moe::Hotword> read_hotwords(const std::string& file) {
  std::ifstream stream(file, std::ios::binary);
  const std::string content{std::istreambuf_iterator<char>(stream), {}};
  if (!stream) throw std::invalid_argument(file + ": cannot be read");
  return u2moe::parse_hotwords(content);
}

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
  static const bool is_terminal = isatty(STDERR_FILENO);
  if (!result.is_final) {
    if (!json) std::fprintf(stderr, is_terminal ? "\r\033[K%s" : "%s\n", result.text.c_str());
  } else if (json) {
    std::printf("%s\n", as_json(result, file).c_str());
  } else {
    if (is_terminal) std::fputs("\r\033[K", stderr);
    std::printf("%.2f %.2f %s\n", result.words.front().start, result.words.back().end, result.text.c_str());
  }
  std::fflush(stdout);
}

using Clock = std::chrono::steady_clock;

double milliseconds_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

// Returns whether all files were whole.
bool transcribe(const Arguments& arguments) {
  bool are_whole = true;
  const Clock::time_point begin = Clock::now();
  const u2moe::Recognizer recognizer(arguments.bundle, arguments.num_threads);
  const double load_ms = milliseconds_since(begin);
  u2moe::StreamOptions options = arguments.options;
  if (!arguments.hotwords.empty()) options.hotwords = recognizer.hotwords(read_hotwords(arguments.hotwords));
  const int raw_rate = !arguments.raw ? 0 : arguments.rate ? arguments.rate : recognizer.sample_rate();
  for (const std::string& file : arguments.files) {
    const Clock::time_point start = Clock::now();
    AudioFile audio(file, raw_rate);
    u2moe::Stream stream = recognizer.create_stream([&](const auto& result) { print(result, file, arguments.json); }, options);
    for (std::vector<float> samples = audio.read(); !samples.empty(); samples = audio.read()) {
      stream.accept_waveform(audio.sample_rate(), samples.data(), samples.size());
    }
    stream.input_finished();
    if (audio.is_cut_off()) {
      std::cerr << "u2moe_transcribe: " << file << ": was cut off: its header states more samples\n";
      are_whole = false;
    }
    if (arguments.json && arguments.timing) {
      std::printf("{\"file\": %s, \"load_ms\": %s, \"ms\": %s}\n", quoted(file).c_str(), number(load_ms).c_str(),
                  number(milliseconds_since(start)).c_str());
    }
  }
  return are_whole;
}

}  // namespace

int main(int argc, char** argv) {
  setenv("ORT_DISABLE_TELEMETRY", "1", 0);  // newer versions of onnxruntime write to the home folder otherwise
  try {
    const bool are_whole = transcribe(parse(argc, argv));
    if (std::fflush(stdout) != 0 || std::ferror(stdout)) throw std::runtime_error("stdout cannot be written");
    return are_whole ? 0 : 1;
  } catch (const std::invalid_argument& error) {
    std::cerr << "u2moe_transcribe: " << error.what() << "\n" << kUsage;
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "u2moe_transcribe: " << error.what() << "\n";
    return 1;
  }
}
