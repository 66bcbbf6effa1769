// Parts of runtime/cpp for tests/test_cpp.py: what the program alone does not show; and the program itself, because with
// sanitizers the library takes half a minute to compile, and both in one file compile it once.
#include <atomic>
#include <clocale>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "audio_file.hpp"
#include "u2moe/recognizer.hpp"

#define main transcribe_main
#include "main.cpp"
#undef main

namespace {

std::atomic<std::size_t> largest{0};  // bytes of the largest piece of memory since it was set to 0

// Not inlined: GCC would take the pairs below for malloc with delete, and new with free.
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

// float32 samples from standard input to standard output, in portions of the given sizes and then the rest.
void resample(int argc, char** argv) {
  const std::string bytes{std::istreambuf_iterator<char>(std::cin), {}};
  std::vector<float> samples(bytes.size() / 4), found;
  std::memcpy(samples.data(), bytes.data(), samples.size() * 4);
  u2moe::Resampler resampler(std::stoi(argv[2]), std::stoi(argv[3]));
  const auto add = [&found](const std::vector<float>& part) { found.insert(found.end(), part.begin(), part.end()); };
  std::size_t begin = 0;
  for (int i = 4; i <= argc; ++i) {
    const std::size_t left = samples.size() - begin, num = i < argc ? std::min<std::size_t>(std::stoul(argv[i]), left) : left;
    add(resampler.accept(samples.data() + begin, num));
    begin += num;
  }
  add(resampler.finish());
  std::fwrite(found.data(), 4, found.size(), stdout);
}

// Every letter that has another case: its code, upper case and lower case.
void print_letters() {
  for (char32_t c = 0; c < 0x110000; ++c) {
    const char32_t up = u2moe::upper(c), low = u2moe::lower(c);
    if (up != c || low != c) std::printf("%x %x %x\n", static_cast<unsigned>(c), static_cast<unsigned>(up), static_cast<unsigned>(low));
  }
}

// All final results of samples in portions, each as `show` has it.
template <class Show>
std::string recognize(const u2moe::Recognizer& recognizer, const std::vector<float>& samples, int rate, std::size_t portion,
                      u2moe::StreamOptions options, Show show) {
  std::string found;
  options.num_left_chunks = 4;
  u2moe::Stream stream = recognizer.create_stream([&](const u2moe::Result& result) {
    if (result.is_final) found += show(result);
  }, options);
  for (std::size_t begin = 0; begin < samples.size(); begin += portion) {
    stream.accept_waveform(rate, samples.data() + begin, std::min(portion, samples.size() - begin));
  }
  stream.input_finished();
  return found;
}

std::string text_of(const u2moe::Result& result) { return result.text + "|"; }

// Streams in several threads, each with other portions: all texts.
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

// The same audio in small portions and at once, as if it were of 48 kHz; and how much memory the latter takes in one piece.
void recognize_at_once(char** argv) {
  const u2moe::Recognizer recognizer(argv[2]);
  int rate = 0;
  const std::vector<float> once = read_all(argv[3], rate);
  std::vector<float> samples;
  for (int i = 0; i < 4; ++i) samples.insert(samples.end(), once.begin(), once.end());
  const auto everything = [](const u2moe::Result& result) { return as_json(result, "it"); };
  const std::string expected = recognize(recognizer, samples, 48000, 4800, {}, everything);
  largest = 0;
  const bool is_same = recognize(recognizer, samples, 48000, samples.size(), {}, everything) == expected && !expected.empty();
  std::printf("%s, %zu of %zu\n", is_same ? "the same" : "another", largest.load(), samples.size() * sizeof(float));
}

// Texts where only some of the endpoint rules are enabled, by their numbers.
void recognize_with_rules(int argc, char** argv) {
  u2moe::StreamOptions options;
  for (u2moe::EndpointRules::size_type i = 0; i < options.rules.size(); ++i) {
    if (!std::count(argv + 4, argv + argc, std::to_string(i + 1))) options.rules[i] = std::nullopt;
  }
  int rate = 0;
  const std::vector<float> samples = read_all(argv[3], rate);
  std::printf("%s", recognize(u2moe::Recognizer(argv[2]), samples, rate, samples.size(), options, text_of).c_str());
}

template <class T>
bool take(T* values, std::size_t num = 1) {
  return std::fread(values, sizeof(T), num, stdin) == num;
}

std::string read_text(const std::string& file) {
  std::ifstream stream(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

template <class T>
std::string listed(const std::vector<T>& items) {
  return listed(items, [](T item) {
    char text[40];
    std::snprintf(text, sizeof text, "%.17g", static_cast<double>(item));
    return std::string(text);
  });
}

// From tokens.txt and hotwords, and cases of a beam size, a number of frames and their log-probabilities: hypotheses before and
// after the end of the input, and the words of the best.
void search(char** argv) {
  const u2moe::Vocabulary vocabulary = u2moe::Vocabulary::parse(read_text(argv[2]), argv[2]);
  const std::vector<u2moe::Hotword> hotwords = u2moe::parse_hotwords(read_text(argv[3]));
  const auto context = hotwords.empty() ? nullptr : std::make_shared<const u2moe::ContextGraph>(hotwords, vocabulary);
  for (std::int32_t sizes[2]; take(sizes, 2);) {
    const auto num_frames = static_cast<std::size_t>(sizes[1]);
    std::vector<float> frames(num_frames * vocabulary.size());
    if (!take(frames.data(), frames.size())) throw std::runtime_error("too few frames");
    u2moe::PrefixBeamSearch beams(static_cast<std::size_t>(sizes[0]), 0, context);
    const std::size_t split = num_frames / 3;  // any split gives the same
    beams.advance(frames.data(), split, vocabulary.size());
    beams.advance(frames.data() + split * vocabulary.size(), num_frames - split, vocabulary.size());
    const std::vector<int> partial = beams.best().tokens;
    beams.finish();
    const auto hypothesis = [](const u2moe::Hypothesis& each) {
      return "{\"tokens\": " + listed(each.tokens) + ", \"times\": " + listed(each.times) + ", \"probabilities\": " +
             listed(each.probabilities) + ", \"scores\": " + listed(std::vector<double>{each.score, each.context_score}) + "}";
    };
    const auto word = [](const u2moe::WordSpan& each) {
      return "[" + quoted(each.text) + ", " + std::to_string(each.begin) + ", " + std::to_string(each.end) + "]";
    };
    const std::vector<int> best = beams.best().tokens;
    std::printf("{\"partial\": %s, \"found\": %s, \"words\": %s, \"text\": %s}\n", listed(partial).c_str(),
                listed(beams.hypotheses(), hypothesis).c_str(), listed(vocabulary.words(best), word).c_str(),
                quoted(vocabulary.text(best)).c_str());
  }
}

// Hotwords and their weights, in the notation of the locale.
void print_hotwords(char** argv) {
  for (const u2moe::Hotword& each : u2moe::parse_hotwords(read_text(argv[2]))) std::printf("%s %g\n", each.phrase.c_str(), each.weight);
}

template <class Kind, class Work>
void expect(const char* kind, Work work) {
  try {
    work();
    std::printf("%s: nothing was thrown\n", kind);
  } catch (const Kind& error) {
    std::printf("%s: %s\n", kind, error.what());
  }
}

struct CallbackFailure : std::logic_error {
  using std::logic_error::logic_error;
};

// The type and the message of every misuse, and what works after it.
void misuse(char** argv) {
  const u2moe::Recognizer recognizer(argv[2]);
  int rate = 0;
  const std::vector<float> samples = read_all(argv[3], rate);
  std::string text;
  bool fails = false;
  u2moe::Stream stream = recognizer.create_stream([&](const u2moe::Result& result) {
    if (fails) throw CallbackFailure("of the callback");
    if (result.is_final) text += result.text;
  });
  const auto accept = [&] { stream.accept_waveform(rate, samples.data(), samples.size()); };
  const float no_number[] = {0, std::numeric_limits<float>::quiet_NaN()}, too_loud[] = {0, -9};
  expect<u2moe::BundleError>("BundleError", [] { u2moe::Recognizer("/none"); });
  expect<u2moe::AudioError>("AudioError", [&] { stream.accept_waveform(1, samples.data(), 1); });
  expect<u2moe::AudioError>("AudioError", [&] { stream.accept_waveform(rate, no_number, 2); });
  expect<u2moe::AudioError>("AudioError", [&] { stream.accept_waveform(rate, too_loud, 2); });
  accept();
  expect<u2moe::AudioError>("AudioError", [&] { stream.accept_waveform(8000, samples.data(), 1); });
  stream.input_finished();
  expect<u2moe::StreamError>("StreamError", accept);
  expect<u2moe::StreamError>("StreamError", [&] { stream.input_finished(); });
  stream.reset();
  fails = true;
  expect<CallbackFailure>("CallbackFailure", accept);
  expect<u2moe::StreamError>("StreamError", accept);
  stream.reset();
  fails = false;
  const std::string before = std::exchange(text, {});
  accept();
  stream.input_finished();
  std::printf("%s\n", text == before && !text.empty() ? "the same text after reset" : "another text after reset");
  u2moe::Stream* itself = nullptr;
  u2moe::Stream resetting = recognizer.create_stream([&](const auto&) { itself->reset(); });
  itself = &resetting;
  expect<u2moe::StreamError>("StreamError", [&] {
    resetting.accept_waveform(rate, samples.data(), samples.size());
    resetting.input_finished();
  });
  const auto refuse = [&](auto change) {
    u2moe::StreamOptions options;
    change(options);
    expect<std::invalid_argument>("invalid_argument", [&] { recognizer.create_stream([](const u2moe::Result&) {}, options); });
  };
  for (const int beam_size : {0, 1001}) refuse([=](u2moe::StreamOptions& options) { options.beam_size = beam_size; });
  refuse([](u2moe::StreamOptions& options) { options.padding_s = 10.5; });
  for (const u2moe::EndpointRule& rule : {u2moe::EndpointRule{false, std::nan(""), 1}, {false, -1, 20}, {true}}) {
    refuse([=](u2moe::StreamOptions& options) { options.rules[1] = rule; });
  }
  expect<std::invalid_argument>("invalid_argument", [&] { recognizer.create_stream({}); });
  expect<std::invalid_argument>("invalid_argument", [&] { recognizer.hotwords({}); });
  expect<std::invalid_argument>("invalid_argument", [&] { u2moe::Recognizer(argv[2], 0); });
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "transcribe") return transcribe_main(argc - 1, argv + 1);
  std::setlocale(LC_ALL, "");  // as programs with a window do
  try {
    if (what == "resample") resample(argc, argv);
    if (what == "letters") print_letters();
    if (what == "threads") recognize_in_threads(argv);
    if (what == "at-once") recognize_at_once(argv);
    if (what == "rules") recognize_with_rules(argc, argv);
    if (what == "search") search(argv);
    if (what == "misuse") misuse(argv);
    if (what == "hotwords") print_hotwords(argv);
    if (what == "json") u2moe::Json::parse(read_text(argv[2]), "it");
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
