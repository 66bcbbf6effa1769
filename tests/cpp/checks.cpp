// Checks for tests/toys/compiled.py of parts of runtime/cpp that the example program does not show.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <clocale>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <limits>
#include <map>
#include <new>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "audio_file.hpp"
#include "fusion.hpp"
#include "grammar.hpp"
#include "json.hpp"
#include "ort.hpp"
#include "resampler.hpp"
#include "sha256.hpp"
#include "u2moe.hpp"

namespace core = u2moe::runtime;

void conformance(const std::string& kind, const std::string& file);
void recognize_cases(const std::string& file, const u2moe::Recognizer& recognizer, const std::vector<float>& samples, const std::string& model,
                     const std::string& networks);
void random_calls(const char* bundle, const std::vector<float>& samples, unsigned seed, int num_calls);

namespace {

std::atomic<std::size_t> largest{0};  // size of the largest allocation since it was set to 0

// Not inlined: GCC would report mismatched malloc and delete, or new and free, for the pairs below.
[[gnu::noinline]] void* allocated(std::size_t size) {
  for (std::size_t known = largest; size > known && !largest.compare_exchange_weak(known, size);) {}
  return std::malloc(size ? size : 1);
}
[[gnu::noinline]] void freed(void* memory) { std::free(memory); }

}  // namespace

void* operator new(std::size_t size) {
  if (void* found = allocated(size)) return found;
  throw std::bad_alloc();
}
void* operator new(std::size_t size, const std::nothrow_t&) noexcept { return allocated(size); }
void operator delete(void* memory) noexcept { freed(memory); }
void operator delete(void* memory, std::size_t) noexcept { freed(memory); }

namespace {

std::vector<float> read_all(const std::string& file, int& rate) {
  AudioFile audio(file, 0);
  rate = audio.sample_rate();
  std::vector<float> samples;
  for (std::vector<float> part = audio.read(); !part.empty(); part = audio.read()) {
    samples.insert(samples.end(), part.begin(), part.end());
  }
  return samples;
}

std::string read_text(const std::string& file) {
  std::ifstream stream(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

// Print every letter that has another case: its code, upper case and lower case.
void print_letters() {
  for (char32_t c = 0; c < 0x110000; ++c) {
    const char32_t up = core::upper(c), low = core::lower(c);
    if (up != c || low != c) std::printf("%x %x %x\n", static_cast<unsigned>(c), static_cast<unsigned>(up), static_cast<unsigned>(low));
  }
}

// Print SHA-256 of the first 0, 1, 2, ... bytes of a file, with and without the processor's instructions.
void print_digests(char** argv) {
  const std::string content = read_text(argv[2]);
  for (std::size_t num = 0; num <= content.size(); ++num) {
    const std::string_view part(content.data(), num);
    std::printf("%s %s\n", core::hex_of(core::sha256(part)).c_str(), core::hex_of(core::sha256(part, false)).c_str());
  }
}

// Return all final results of samples fed in buffers, formatted by `show`.
template <class Show>
std::string recognize(const u2moe::Recognizer& recognizer, const std::vector<float>& samples, int rate, std::size_t buffer,
                      u2moe::StreamOptions options, Show show) {
  std::string found;
  if (options.num_left_chunks < 0) options.num_left_chunks = 4;
  u2moe::Stream stream = recognizer.create_stream(options);
  const auto take = [&] {
    for (const u2moe::Result& segment : stream.take_segments()) found += show(segment);
  };
  for (std::size_t begin = 0; begin < samples.size(); begin += buffer) {
    stream.accept_waveform(rate, samples.data() + begin, std::min(buffer, samples.size() - begin));
    take();
  }
  stream.input_finished();
  take();
  return found;
}

std::string text_of(const u2moe::Result& result) { return std::string(result.text) + "|"; }

// Recognise in several threads, each with its own buffer size, and print all texts.
void recognize_in_threads(char** argv) {
  const u2moe::Recognizer recognizer(argv[2]);
  int rate = 0;
  const std::vector<float> samples = read_all(argv[3], rate);
  std::vector<std::string> texts(4);
  std::vector<std::thread> threads;
  for (std::size_t number = 0; number < texts.size(); ++number) {
    threads.emplace_back([&, number] { texts[number] = recognize(recognizer, samples, rate, 997 * (number + 1), {}, text_of); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& text : texts) std::printf("%s\n", text.c_str());
}

// Recognise the same audio in small buffers and in one call, as if at 48 kHz. Print the largest allocation of the latter.
void recognize_at_once(char** argv) {
  const u2moe::Recognizer recognizer(argv[2]);
  int rate = 0;
  const std::vector<float> once = read_all(argv[3], rate);
  std::vector<float> samples;
  for (int i = 0; i < 4; ++i) samples.insert(samples.end(), once.begin(), once.end());
  const auto everything = [](const u2moe::Result& result) { return result.json(); };
  const std::string expected = recognize(recognizer, samples, 48000, 4800, {}, everything);
  largest = 0;
  const bool is_same = recognize(recognizer, samples, 48000, samples.size(), {}, everything) == expected && !expected.empty();
  std::printf("%s, %zu of %zu\n", is_same ? "the same" : "another", largest.load(), samples.size() * sizeof(float));
}

// Print texts of a bundle from its folder, and from memory with session options of the caller, which write each graph to a file.
void recognize_from_memory(char** argv) {
  std::map<std::string, std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator(argv[2])) files[entry.path().filename().string()] = read_text(entry.path().string());
  const OrtApi& api = core::ort::api();
  const auto sessions = core::ort::made<OrtSessionOptions>(api.CreateSessionOptions);
  core::ort::check(api.SetIntraOpNumThreads(sessions.get(), 1));
  core::ort::check(api.SetOptimizedModelFilePath(sessions.get(), std::filesystem::path(argv[4]).c_str()));
  u2moe::RecognizerOptions options;
  options.session_options = sessions.get();
  u2moe::StreamOptions two;
  two.num_left_chunks = 2;
  int rate = 0;
  const std::vector<float> samples = read_all(argv[3], rate);
  const auto print = [&](const u2moe::Recognizer& recognizer) {
    std::printf("%s\n", recognize(recognizer, samples, rate, samples.size(), two, text_of).c_str());
  };
  print(u2moe::Recognizer(argv[2]));
  print(u2moe::Recognizer(files, options));
}

// Print hotwords and their weights, with the locale's number format.
void print_hotwords(char** argv) {
  for (const core::Hotword& each : core::parse_hotwords(read_text(argv[2]))) std::printf("%s %g\n", each.phrase.c_str(), each.weight);
}

// Print the code and message of a misuse.
template <class Work>
void expect_error(Work work) {
  try {
    work();
    std::printf("nothing was thrown\n");
  } catch (const u2moe::Error& error) {
    std::printf("%s: %s\n", u2moe_error_name(error.code()), error.what());
  }
}

void misuse(char** argv) {
  const u2moe::Recognizer recognizer(argv[2]);
  int rate = 0;
  const std::vector<float> samples = read_all(argv[3], rate);
  u2moe::Stream stream = recognizer.create_stream();
  const auto accept = [&] { stream.accept_waveform(rate, samples.data(), samples.size()); };
  const auto finish = [&] {
    accept();
    stream.input_finished();
    std::string text;
    for (const u2moe::Result& segment : stream.take_segments()) text += text_of(segment);
    return text;
  };
  const float no_number[] = {0, std::numeric_limits<float>::quiet_NaN()}, too_loud[] = {0, -9};
  expect_error([] { u2moe::Recognizer("/none"); });
  expect_error([&] { stream.accept_waveform(1, samples.data(), 1); });
  expect_error([&] { stream.accept_waveform(std::numeric_limits<int>::max(), samples.data(), 1); });
  expect_error([&] { stream.accept_waveform(0, samples.data(), 1); });
  for (const auto& [from, to] : {std::pair(0, 16000), {16000, 0}}) {
    try {
      u2moe::runtime::Resampler(from, to);
    } catch (const u2moe::runtime::Error& error) {
      std::printf("%s\n", error.what());
    }
  }
  expect_error([&] { stream.accept_waveform(rate, no_number, 2); });
  expect_error([&] { stream.accept_waveform(rate, too_loud, 2); });
  stream.accept_waveform(rate, samples.data(), 1);
  expect_error([&] { stream.accept_waveform(8000, samples.data(), 1); });
  stream.reset();
  const std::string before = finish();
  expect_error(accept);
  expect_error([&] { stream.input_finished(); });
  stream.reset();
  std::printf("%s\n", finish() == before && !before.empty() ? "the same text after reset" : "another text after reset");
  const auto refuse = [&](auto change) {
    u2moe::StreamOptions options;
    change(options);
    expect_error([&] { recognizer.create_stream(options); });
  };
  for (const int beam_size : {-1, 1001}) refuse([=](u2moe::StreamOptions& options) { options.beam_size = beam_size; });
  refuse([](u2moe::StreamOptions& options) { options.padding_s = 10.5; });
  refuse([](u2moe::StreamOptions& options) { options.ctc_weight = std::nan(""); });
  refuse([](u2moe::StreamOptions& options) { options.pause = 0.1; });
  refuse([](u2moe::StreamOptions& options) { options.turn = 1.5; });
  refuse([](u2moe::StreamOptions& options) { options.search = "viterbi"; });
  refuse([](u2moe::StreamOptions& options) { options.length_penalty = 11; });
  refuse([](u2moe::StreamOptions& options) { options.rules[1] = {0, std::nan(""), 1}; });
  refuse([](u2moe::StreamOptions& options) { options.rules[2] = {0, 0, HUGE_VAL}; });
  u2moe::StreamOptions earlier;
  earlier.size = offsetof(u2moe_stream_options, length_penalty);
  earlier.length_penalty = 11;  // beyond its end
  const auto text = [&](const auto& options) { return recognize(recognizer, samples, rate, samples.size(), options, text_of); };
  if (text(earlier) == text(u2moe::StreamOptions())) std::puts("options of an earlier version are accepted");
  expect_error([&] { recognizer.hotwords({}); });
  expect_error([&] { recognizer.hotwords({{std::string(std::size_t{2} << 20, 'A'), 0}}); });
  expect_error([&] { u2moe::Recognizer("/none\xff\xc3"); });
  const auto refuse_settings = [&](auto change) {
    u2moe::RecognizerOptions options;
    change(options);
    expect_error([&] { u2moe::Recognizer(argv[2], options); });
  };
  refuse_settings([](u2moe::RecognizerOptions& options) { options.num_threads = 0; });
  refuse_settings([](u2moe::RecognizerOptions& options) { options.kernels = "fast"; });
}

// Open a bundle that must be signed by the key in a file: with OpenSSL, with a function, and with a function that rejects
// everything.
void demand_signature(char** argv) {
  const std::string pem = read_text(argv[3]);
  const char* const keys[] = {pem.c_str()};
  u2moe::RecognizerOptions options;
  options.public_keys = keys;
  options.num_public_keys = 1;
  const auto told = [&] {
    u2moe_recognizer recognizer = nullptr;
    const u2moe_error error = u2moe_recognizer_open(argv[2], &options, &recognizer);
    std::printf("%s: %s\n", u2moe_error_name(error), recognizer ? "open" : u2moe_error_message());
    u2moe_recognizer_free(recognizer);
  };
  told();
  std::size_t expected = read_text((std::string(argv[2]) + "/bundle.json").c_str()).size() + 25;
  options.verify_context = &expected;
  options.verify_signature = [](void* context, const std::uint8_t*, const std::uint8_t* message, std::size_t size, const std::uint8_t*) -> std::int32_t {
    return size == *static_cast<std::size_t*>(context) && message[0] == 'u';
  };
  told();
  options.verify_signature = [](void*, const std::uint8_t*, const std::uint8_t*, std::size_t, const std::uint8_t*) -> std::int32_t { return 0; };
  told();
  options.num_public_keys = 0;
  told();
}

// Print texts of a bundle with a runner that runs a graph in onnxruntime, and the errors of a runner that leaves out an output or
// fails, and of another bundle.
void recognize_with_runner(char** argv) {
  const std::string graph = read_text(argv[3]);
  const auto env = core::ort::environment();
  const auto settings = core::ort::made<OrtSessionOptions>(core::ort::api().CreateSessionOptions);
  const auto session = core::ort::made<OrtSession>(core::ort::api().CreateSessionFromArray, env.get(), graph.data(), graph.size(), settings.get());
  std::string left_out;
  int status = 0;
  u2moe::Runner runner = [&](const std::vector<u2moe_tensor>& inputs, const std::vector<u2moe_tensor>& outputs) {
    std::vector<std::string> names, wanted;
    std::vector<std::vector<float>> kept;
    core::ort::Values values;
    const auto shape = [](const u2moe_tensor& each) { return core::ort::Shape(each.shape, each.shape + each.rank); };
    for (const u2moe_tensor& each : inputs) {
      names.emplace_back(each.name);
      values.push_back(core::ort::tensor(kept.emplace_back(each.data, each.data + core::ort::count(shape(each))), shape(each)));
    }
    for (const u2moe_tensor& each : outputs) wanted.emplace_back(each.name);
    const core::ort::Values found = core::ort::run(*session, names, values, wanted);
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      if (core::ort::shape_of<float>(*found[i]) != shape(outputs[i])) return 9;
      const auto numbers = core::ort::numbers_of<float>(*found[i]);
      if (wanted[i] != left_out) std::copy(numbers.begin(), numbers.end(), outputs[i].data);
    }
    return status;
  };
  u2moe::RecognizerOptions options;
  options.set_runner(runner);
  const u2moe::Recognizer recognizer(argv[2], options);
  int rate = 0;
  const std::vector<float> samples = read_all(argv[4], rate);
  u2moe::StreamOptions two;
  two.num_left_chunks = 2;
  const auto text = [&] { return recognize(recognizer, samples, rate, 1000, two, text_of); };
  std::printf("%s\n", text().c_str());
  left_out = "r_cnn_cache";
  expect_error(text);
  status = 7;
  expect_error(text);
  expect_error([&] { u2moe::Recognizer(argv[5], options); });
}

// Open a bundle with each provider, with one option unless it is null.
void use_providers(char** argv) {
  const char* const cpu = "CPUExecutionProvider";
  const std::pair<const char*, const char*> all[] = {
      {"RocketExecutionProvider", nullptr}, {"RocketExecutionProvider", "fuel"}, {cpu, "use_arena"}, {nullptr, nullptr}, {cpu, ""}, {cpu, nullptr},
      {"AzureExecutionProvider", nullptr}};
  for (const auto& [name, key] : all) {
    const char* const zero = "0";
    const u2moe_provider provider = {name, key && *key ? &key : nullptr, &zero, key ? std::size_t{1} : 0};
    u2moe::RecognizerOptions options;
    options.providers = &provider;
    options.num_providers = 1;
    expect_error([&] { throw u2moe::Error(U2MOE_OK, u2moe::Recognizer(argv[2], options).describe()); });
    u2moe_recognizer recognizer = nullptr;
    const u2moe_error error = u2moe_recognizer_open(argv[2], &options, &recognizer);
    std::printf("%s: %s\n", u2moe_error_name(error), recognizer ? "open" : u2moe_error_message());
    u2moe_recognizer_free(recognizer);
  }
}

// Limit this process to `mb` more MB. Return the previous limit.
rlimit limit_memory(std::size_t mb) {
  std::size_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  rlimit before = {};
  getrlimit(RLIMIT_AS, &before);
  const rlimit tight = {pages * static_cast<std::size_t>(sysconf(_SC_PAGESIZE)) + (mb << 20), before.rlim_max};
  setrlimit(RLIMIT_AS, &tight);
  return before;
}

// Open a bundle in child processes limited to some more MB. Each prints its result unless it dies.
void load_in_little_memory(int argc, char** argv) {
  for (int i = 3; i < argc; ++i) {
    std::fflush(stdout);
    if (const pid_t child = fork()) {
      int status = 0;
      waitpid(child, &status, 0);
      if (status) std::printf("status %d\n", status);
      continue;
    }
    alarm(60);
    limit_memory(std::stoul(argv[i]));
    u2moe_recognizer recognizer = nullptr;
    std::puts(u2moe_error_name(u2moe_recognizer_open(argv[2], nullptr, &recognizer)));
    std::fflush(stdout);
    _exit(0);
  }
}

// With 64 MB of memory left, check that calls that need hundreds of MB fail and a stream continues.
void run_out_of_memory(char** argv) {
  u2moe_recognizer recognizer = nullptr;
  u2moe_stream stream = nullptr;
  u2moe_hotwords hotwords = nullptr;
  u2moe::check(u2moe_recognizer_open(argv[2], nullptr, &recognizer));
  u2moe::check(u2moe_stream_create(recognizer, nullptr, &stream));
  const std::string phrase(std::size_t{100} << 20, 'a');
  const auto* const samples = reinterpret_cast<const std::int16_t*>(phrase.data());
  const rlimit before = limit_memory(64);
  const u2moe_error found[] = {u2moe_hotwords_parse(recognizer, phrase.c_str(), &hotwords),
                               u2moe_stream_accept_waveform_int16(stream, 16000, samples, phrase.size() / 2)};
  setrlimit(RLIMIT_AS, &before);
  for (const u2moe_error error : found) std::printf("%s\n", u2moe_error_name(error));
  std::printf("%s\n", u2moe_error_name(u2moe_stream_accept_waveform_int16(stream, 16000, samples, 1600)));
  u2moe_stream_free(stream);
  u2moe_recognizer_free(recognizer);
}

// Print errors of a thread that recognises with a stream while another thread does.
void use_in_two_threads(char** argv) {
  const u2moe::Recognizer recognizer(argv[2]);
  int rate = 0;
  const std::vector<float> samples = read_all(argv[3], rate);
  u2moe::Stream stream = recognizer.create_stream();
  std::atomic<bool> is_done{false};
  std::thread feeder([&] {
    for (int fed = 0; fed < 5;) {
      try {
        stream.accept_waveform(rate, samples.data(), samples.size());
        ++fed;
      } catch (const u2moe::Error&) {  // the other thread was faster
      }
    }
    is_done = true;
  });
  std::set<std::string> seen;
  while (!is_done) {
    try {
      stream.accept_waveform(rate, samples.data(), 0);
    } catch (const u2moe::Error& error) {
      seen.insert(error.what());
    }
  }
  feeder.join();
  for (const std::string& each : seen) std::printf("%s\n", each.c_str());
}

// Find grammars of one letter, and print for each the number of its automaton and of its phrases in that letter.
void print_grammars(const char* letters) {
  core::PhraseGraphs graphs;
  const core::Vocabulary vocabulary = core::Vocabulary::parse("<blank> 0\n▁A 1\n▁B 2\n▁C 3\n▁D 4\n▁E 5\n", "vocabulary");
  std::vector<std::shared_ptr<const core::PhraseGraph>> seen;
  for (; *letters; ++letters) {
    const auto graph = graphs.find({std::string(1, *letters)}, vocabulary, 0);
    const auto known = std::find(seen.begin(), seen.end(), graph);
    std::printf("%d:%zu ", static_cast<int>(known - seen.begin()), graph->phrases({*letters - 'a' + 1}, true).size());
    if (known == seen.end()) seen.push_back(graph);
  }
}

// Print the errors of grammars, each a file of lines, for the vocabulary in a file.
void print_refusals(const char* tokens, char** files) {
  const core::Vocabulary vocabulary = core::Vocabulary::parse(read_text(tokens), "vocabulary");
  for (; *files; ++files) {
    try {
      core::PhraseGraph(core::grammar_lines(read_text(*files)), vocabulary, 0);
    } catch (const core::Error& error) {
      std::puts(error.what());
    }
  }
}

// Print the error of each bundle, opened and used for a recording.
void use_each(const char* recording, char** bundles) {
  int rate = 0;
  const std::vector<float> samples = read_all(recording, rate);
  for (; *bundles; ++bundles) {
    expect_error([&] { recognize(u2moe::Recognizer(*bundles), samples, rate, samples.size(), {}, text_of); });
  }
}

// Print whether a search gets the states of an ended one, and whether a search at the same time gets new ones.
void print_states() {
  const core::Vocabulary vocabulary = core::Vocabulary::parse("<blank> 0\n▁A 1\n", "vocabulary");
  core::Ngrams ngrams = core::Ngrams::parse("\\data\\\nngram 1=1\n\\1-grams:\n-1 A\n\\end\\\n", "model");
  const auto fusion = std::make_shared<const core::Fusion>(std::move(ngrams), core::LanguageModelOptions(), vocabulary, "model");
  auto ended = core::Fusion::states(fusion);
  ended->advance(*ended->start(), 1);
  ended.reset();
  const auto later = core::Fusion::states(fusion), other = core::Fusion::states(fusion);
  std::printf("%d %d", later->size() > 0, other->size() == 0);
}

// Print whether each file is JSON, or its error.
void read_json(char** files) {
  for (; *files; ++files) {
    try {
      core::Json::parse(read_text(*files), "it");
      std::puts("it: read");
    } catch (const core::Error& error) {
      std::puts(error.what());
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  std::setlocale(LC_ALL, "");  // as GUI programs do
  try {
    if (what == "conformance") conformance(argv[2], argv[3]);
    if (what == "recordings") {
      int rate = 0;
      const std::vector<float> samples = read_all(argv[4], rate);
      recognize_cases(argv[3], u2moe::Recognizer(argv[2]), samples, argv[5], argv[6]);
    }
    if (what == "letters") print_letters();
    if (what == "threads") recognize_in_threads(argv);
    if (what == "at-once") recognize_at_once(argv);
    if (what == "memory") recognize_from_memory(argv);
    if (what == "runner") recognize_with_runner(argv);
    if (what == "misuse") misuse(argv);
    if (what == "providers") use_providers(argv);
    if (what == "out-of-memory") run_out_of_memory(argv);
    if (what == "little-memory") load_in_little_memory(argc, argv);
    if (what == "digests") print_digests(argv);
    if (what == "two-threads") use_in_two_threads(argv);
    if (what == "random-calls") {
      int rate = 0;
      const std::vector<float> samples = read_all(argv[3], rate);
      random_calls(argv[2], samples, static_cast<unsigned>(std::stoul(argv[4])), std::stoi(argv[5]));
    }
    if (what == "hotwords") print_hotwords(argv);
    if (what == "grammars") print_grammars(argv[2]);
    if (what == "bad-grammars") print_refusals(argv[2], argv + 3);
    if (what == "each") use_each(argv[2], argv + 3);
    if (what == "states") print_states();
    if (what == "signed") demand_signature(argv);
    if (what == "json") read_json(argv + 2);
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
