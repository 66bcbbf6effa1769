// Recognise WAV files or raw PCM as streams: u2moe_transcribe [options] BUNDLE [FILE.wav... | -]
#include <unistd.h>
#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#endif

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "audio_file.hpp"
#include "u2moe.hpp"

namespace {

constexpr const char* kUsage =
    "usage: u2moe_transcribe [options] BUNDLE [FILE.wav... | -]\n"
    "Recognise files or standard input while reading: partial results on stderr, final results with times on stdout.\n"
    "  --hotwords FILE    phrases to prefer, one per line, such as \"kubernetes :2.5\"\n"
    "  --grammar FILE     restrict recognition to phrases, one per line, such as \"lights (on | off)\"\n"
    "  --raw              headerless 16-bit samples, mono\n"
    "  --rate HZ          rate of raw samples; default: rate of the model\n"
    "  --left-chunks N    chunks of left context; -1: all\n"
    "  --padding S        seconds of silence added where the input begins or ends within a sound; default: as in the bundle\n"
    "  --full             full context: encode up to 30 s at once\n"
    "  --lm FILE          language model, compact or ARPA; its options: --lm-weight, --word-bonus, --unknown-score, --rescoring-weight N\n"
    "  --search NAME      attention_rescoring, ctc_prefix_beam or ctc_greedy\n"
    "  --beam-size N      size of the beam\n"
    "  --kernels NAME     auto, native or onnxruntime\n"
    "  --describe         only print versions, kernels and providers as JSON\n"
    "  --no-endpoint      the whole input is one utterance\n"
    "  --threads N        threads of onnxruntime\n"
    "  --json             print each final result as a JSON object\n"
    "  --timing           with --json, also print for each file the milliseconds to load and to recognise\n";

struct Arguments {
  bool json = false, raw = false, timing = false, describe = false;
  int num_threads = 1, rate = 0;
  u2moe::LanguageModelOptions weights;
  u2moe::StreamOptions options;
  std::string bundle, hotwords, grammar, language_model, kernels;
  std::vector<std::string> files;
};

int integer(const char* text, int least, int most) {
  char* end = nullptr;
  const long value = std::strtol(text, &end, 10);
  if (*text == '\0' || *end != '\0' || value < least || value > most) throw std::invalid_argument(std::string("invalid number ") + text);
  return static_cast<int>(value);
}

double quantity(const char* text) {
  std::istringstream stream(text);
  double value = 0;
  if (!(stream >> value) || !stream.eof()) throw std::invalid_argument(std::string("invalid number ") + text);
  return value;
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
    else if (argument == "--grammar") arguments.grammar = value();
    else if (argument == "--full") arguments.options.chunk_size = U2MOE_FULL_CONTEXT;
    else if (argument == "--lm") arguments.language_model = value();
    else if (argument == "--lm-weight") arguments.weights.weight = quantity(value());
    else if (argument == "--word-bonus") arguments.weights.word_bonus = quantity(value());
    else if (argument == "--unknown-score") arguments.weights.unknown_score = quantity(value());
    else if (argument == "--rescoring-weight") arguments.weights.rescoring_weight = quantity(value());
    else if (argument == "--search") arguments.options.search = value();
    else if (argument == "--beam-size") arguments.options.beam_size = integer(value(), 1, 1000);
    else if (argument == "--kernels") arguments.kernels = value();
    else if (argument == "--describe") arguments.describe = true;
    else if (argument == "--no-endpoint") arguments.options.endpoint = 0;
    else if (argument == "--left-chunks") arguments.options.num_left_chunks = integer(value(), -1, 100000);
    else if (argument == "--padding") arguments.options.padding_s = quantity(value());
    else if (argument == "--threads") arguments.num_threads = integer(value(), 1, 64);
    else if (argument.size() > 1 && argument[0] == '-') throw std::invalid_argument("unknown option " + argument);
    else if (arguments.bundle.empty()) arguments.bundle = argument;
    else arguments.files.push_back(argument);
  }
  if (arguments.bundle.empty()) throw std::invalid_argument("missing argument: folder of a bundle");
  if (arguments.rate && !arguments.raw) throw std::invalid_argument("--rate is for --raw: a WAV file has its own");
  if (arguments.files.empty()) arguments.files = {"-"};
  return arguments;
}

std::string read(const std::string& file) {
  std::ifstream stream(file, std::ios::binary);
  const std::string content{std::istreambuf_iterator<char>(stream), {}};
  if (!stream) throw std::invalid_argument(file + ": cannot be read");
  return content;
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    if (static_cast<unsigned char>(c) >= 0x20) result += c;
  }
  return result + '"';
}

void print(const u2moe::Result& segment, const std::string& file, bool json) {
  if (json) {
    std::printf("{\"file\": %s, %s\n", quoted(file).c_str(), segment.json().c_str() + 1);
  } else {
    if (isatty(STDERR_FILENO)) std::fputs("\r\033[K", stderr);
    std::printf("%.2f %.2f %s\n", segment.start, segment.end, segment.text);
  }
  std::fflush(stdout);
}

void print_partial(const std::string& text) {
  if (!text.empty()) std::fprintf(stderr, isatty(STDERR_FILENO) ? "\r\033[K%s" : "%s\n", text.c_str());
}

using Clock = std::chrono::steady_clock;

double milliseconds_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

// Recognise all files. Return whether they were complete.
bool transcribe(const Arguments& arguments) {
  bool are_whole = true;
  const Clock::time_point begin = Clock::now();
  u2moe::RecognizerOptions settings;
  settings.num_threads = arguments.num_threads;
  if (!arguments.kernels.empty()) settings.kernels = arguments.kernels.c_str();
  const u2moe::Recognizer recognizer(arguments.bundle, settings);
  const double load_ms = milliseconds_since(begin);
  if (arguments.describe) {
    std::printf("%s\n", recognizer.describe().c_str());
    return true;
  }
  u2moe::StreamOptions options = arguments.options;
  u2moe::Hotwords hotwords;
  u2moe::LanguageModel language_model;
  if (!arguments.hotwords.empty()) hotwords = recognizer.parse_hotwords(read(arguments.hotwords));
  if (!arguments.language_model.empty()) language_model = recognizer.language_model(arguments.language_model, arguments.weights);
  const std::string grammar = arguments.grammar.empty() ? "" : read(arguments.grammar);
  if (!arguments.grammar.empty()) options.grammar = grammar.c_str();
  options.hotwords = hotwords.get();
  options.language_model = language_model.get();
  const int raw_rate = !arguments.raw ? 0 : arguments.rate ? arguments.rate : recognizer.sample_rate();
  for (const std::string& file : arguments.files) {
    const Clock::time_point start = Clock::now();
    AudioFile audio(file, raw_rate);
    u2moe::Stream stream = recognizer.create_stream(options);
    const auto show = [&] {
      for (const u2moe::Result& segment : stream.take_segments()) print(segment, file, arguments.json);
    };
    for (std::vector<float> samples = audio.read(); !samples.empty(); samples = audio.read()) {
      stream.accept_waveform(audio.sample_rate(), samples.data(), samples.size());
      show();
      if (!arguments.json) print_partial(stream.get_result().text);
    }
    stream.input_finished();
    show();
    if (audio.is_cut_off()) {
      std::cerr << "u2moe_transcribe: " << file << ": was cut off: its header states more samples\n";
      are_whole = false;
    }
    if (arguments.json && arguments.timing) {
      std::printf("{\"file\": %s, \"load_ms\": %.3f, \"ms\": %.3f}\n", quoted(file).c_str(), load_ms, milliseconds_since(start));
    }
  }
  return are_whole;
}

}  // namespace

int main(int argc, char** argv) {
  // Without this, newer versions of onnxruntime write to the home folder.
#ifdef _WIN32
  if (!std::getenv("ORT_DISABLE_TELEMETRY")) _putenv_s("ORT_DISABLE_TELEMETRY", "1");
  _setmode(_fileno(stdin), _O_BINARY);
#else
  setenv("ORT_DISABLE_TELEMETRY", "1", 0);
#endif
  try {
    const bool are_whole = transcribe(parse(argc, argv));
    if (std::fflush(stdout) != 0 || std::ferror(stdout)) throw std::runtime_error("stdout cannot be written");
    return are_whole ? 0 : 1;
  } catch (const u2moe::Error& error) {
    std::cerr << "u2moe_transcribe: " << error.what() << "\n";
    return error.code() == U2MOE_INVALID_ARGUMENT ? 2 : 1;
  } catch (const std::invalid_argument& error) {
    std::cerr << "u2moe_transcribe: " << error.what() << "\n" << kUsage;
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "u2moe_transcribe: " << error.what() << "\n";
    return 1;
  }
}
