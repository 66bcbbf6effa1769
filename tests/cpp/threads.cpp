// Separate feeding and decoding, for tests/test_threads_of_cpp.py, with only u2moe.hpp: threads COMMAND BUNDLE SAMPLES [FILE].
// Samples have 16 bits at 16 kHz. Prints values to compare.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "u2moe.hpp"

namespace {

using Samples = std::vector<std::int16_t>;
constexpr int kRate = 16000;
constexpr std::size_t kBuffer = kRate / 100;

Samples read(const char* file) {
  std::ifstream stream(file, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(stream), {}};
  Samples samples(bytes.size() / 2);
  std::copy(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(2 * samples.size()), reinterpret_cast<char*>(samples.data()));
  return samples;
}

std::string taken(u2moe::Stream& stream) {
  std::string all;
  for (const u2moe::Result& segment : stream.take_segments()) all += segment.json() + "\n";
  return all + stream.get_result().json() + "\n";
}

u2moe::StreamOptions options_of(int chunk_size, double max_queue_s = 1000) {
  u2moe::StreamOptions options;
  options.chunk_size = chunk_size;
  options.num_left_chunks = 4;
  options.max_queue_s = max_queue_s;
  return options;
}

std::string alone(const u2moe::Recognizer& recognizer, const Samples& samples, const u2moe::StreamOptions& options) {
  u2moe::Stream stream = recognizer.create_stream(options);
  stream.accept_waveform(kRate, samples.data(), samples.size());
  stream.input_finished();
  return taken(stream);
}

template <class Work>
std::string error_of(Work work) {
  try {
    work();
    return "U2MOE_OK";
  } catch (const u2moe::Error& error) {
    return std::string(u2moe_error_name(error.code())) + ": " + error.what();
  }
}

// Decode streams of several lengths and chunk sizes together, twice. Each has the same results as alone. One is cancelled.
void batch(const u2moe::Recognizer& recognizer, const Samples& samples) {
  std::vector<u2moe::Stream> streams;
  std::vector<std::string> expected;
  std::vector<Samples> inputs;
  const int sizes[] = {16, 16, 16, 8, U2MOE_FULL_CONTEXT, 16, U2MOE_FULL_CONTEXT, 8, 16};
  for (const int size : sizes) {
    inputs.emplace_back(samples.begin() + static_cast<std::ptrdiff_t>(1000 * inputs.size()), samples.end() - static_cast<std::ptrdiff_t>(700 * inputs.size()));
    expected.push_back(alone(recognizer, inputs.back(), options_of(size)));
    streams.push_back(recognizer.create_stream(options_of(size)));
  }
  std::vector<u2moe::Stream*> all;
  for (u2moe::Stream& stream : streams) all.push_back(&stream);
  all.push_back(&streams[0]);  // twice
  std::vector<std::string> found(streams.size());
  for (std::size_t part = 0; part < 3; ++part) {
    for (std::size_t i = 0; i < streams.size(); ++i) {
      const std::size_t begin = inputs[i].size() * part / 3, end = inputs[i].size() * (part + 1) / 3;
      if (i == 3 && part) continue;
      streams[i].feed(kRate, inputs[i].data() + begin, end - begin);
      if (part == 2) streams[i].feed_finished();
    }
    if (part == 1) streams[3].cancel();
    std::printf("%s\n", error_of([&] { u2moe::decode_streams(all); }).c_str());
    for (std::size_t i = 0; i < streams.size(); ++i) {
      for (const u2moe::Result& segment : streams[i].take_segments()) found[i] += segment.json() + "\n";
    }
  }
  std::printf("%s\n", error_of([&] { streams[3].check_failure(); }).c_str());
  for (std::size_t i = 0; i < streams.size(); ++i) {
    if (i != 3) std::printf("%s\n", found[i] + streams[i].get_result().json() + "\n" == expected[i] ? "the same" : "another");
  }
}

// One thread feeds 10 ms at a time, one decodes, and one reads results.
void apart(const u2moe::Recognizer& recognizer, const Samples& samples) {
  u2moe::Stream stream = recognizer.create_stream(options_of(16));
  std::atomic<bool> is_fed{false}, is_done{false};
  std::thread feeder([&] {
    for (std::size_t begin = 0; begin < samples.size(); begin += kBuffer) {
      stream.feed(kRate, samples.data() + begin, std::min(kBuffer, samples.size() - begin));
      std::this_thread::sleep_for(std::chrono::microseconds(300));
    }
    stream.feed_finished();
    is_fed = true;
  });
  std::atomic<std::size_t> num_looks{0};
  std::thread watcher([&] {
    for (; !is_done; ++num_looks) {
      stream.get_result();
      stream.is_endpoint();
      stream.queued();
      std::this_thread::yield();
    }
  });
  std::string found;
  for (bool is_last = false; !is_last;) {
    is_last = is_fed;
    u2moe::decode_streams({&stream});
    for (const u2moe::Result& segment : stream.take_segments()) found += segment.json() + "\n";
  }
  is_done = true;
  feeder.join();
  watcher.join();
  std::printf("%s\n", found + stream.get_result().json() + "\n" == alone(recognizer, samples, options_of(16)) && num_looks > 9 ? "the same" : "another");
}

// Cancelling stops decoding in another thread, the queue is bounded, and reset recovers the stream.
void cancel(const u2moe::Recognizer& recognizer, const Samples& samples) {
  u2moe::Stream stream = recognizer.create_stream(options_of(16));
  for (int i = 0; i < 20; ++i) stream.feed(kRate, samples.data(), samples.size());
  const double before = stream.queued();
  std::string error;
  std::thread decoder([&] { error = error_of([&] { u2moe::decode_streams({&stream}); }); });
  while (stream.queued() == before) std::this_thread::yield();
  const double left = stream.queued();
  stream.cancel();
  decoder.join();
  std::printf("%s\n%s\n%d %g\n", error.c_str(), error_of([&] { stream.feed(kRate, samples.data(), 1); }).c_str(), left > before / 2, stream.queued());
  stream.reset();
  stream.feed(kRate, samples.data(), samples.size());
  stream.feed_finished();
  u2moe::decode_streams({&stream});
  std::printf("%s\n", taken(stream).find(alone(recognizer, samples, options_of(16)).substr(0, 40)) == 0 ? "the same" : "another");
  u2moe::Stream small = recognizer.create_stream(options_of(16, 0.5));
  small.feed(kRate, samples.data(), 6400);
  std::printf("%s\n%g\n", error_of([&] { small.feed(kRate, samples.data(), 1601); }).c_str(), small.queued());
  std::printf("%s\n", error_of([&] { small.feed(8000, samples.data(), 1); }).c_str());
  small.feed(kRate, samples.data(), 1600);
  Samples many;
  for (int i = 0; i < 100; ++i) many.insert(many.end(), samples.begin(), samples.end());
  stream.reset();
  std::thread feeder([&] { error = error_of([&] { stream.accept_waveform(kRate, many.data(), many.size()); }); });
  while (!*stream.get_result().text) std::this_thread::yield();
  stream.feed_finished();
  feeder.join();
  std::printf("%s\n", error.c_str());
}

// Run several transcribers with their events at once. Callbacks throw, wait, and free their own transcriber.
void transcribe(const u2moe::Recognizer& recognizer, const Samples& samples, const char* network) {
  const u2moe::Vad vad = u2moe::open_vad(network);
  u2moe::StreamOptions options = options_of(16), speech = options;
  speech.vad = vad.get();
  std::mutex printing;
  std::string partial, all, events, thrown;
  u2moe::Callbacks callbacks;
  callbacks.on_partial = [&](const u2moe::ResultView& result) { partial = result.text; };
  callbacks.on_final = [&](const u2moe::ResultView& result) { all += result.json() + "\n"; };
  u2moe::Transcriber plain = recognizer.create_transcriber(callbacks, options);
  u2moe::Callbacks throwing;
  throwing.on_final = [](const u2moe::ResultView&) { throw std::runtime_error("a fault of the program"); };
  throwing.on_error = [&](u2moe_error error, const std::string& message) { thrown = std::string(u2moe_error_name(error)) + ": " + message; };
  throwing.on_speech = [&](bool is_speech, double time) { events += (is_speech ? "speech " : "silence ") + std::to_string(time >= 0) + "\n"; };
  u2moe::Transcriber other = recognizer.create_transcriber(throwing, speech);
  std::atomic<int> num_calls{0}, num_freed{0};
  u2moe::Callbacks freeing;
  u2moe::Transcriber* own = nullptr;
  auto used = std::make_shared<int>();  // used by the function, which must live until it returns
  const std::weak_ptr<int> watched = used;
  freeing.on_partial = [&num_calls, &num_freed, &own, &watched, used](const u2moe::ResultView&) {
    std::atomic<int>& freed = num_freed;
    const std::weak_ptr<int>& still = watched;
    ++num_calls;
    own->wait();  // returns at once
    delete own;
    freed += still.expired() ? 100 : 1;
  };
  used.reset();
  own = new u2moe::Transcriber(recognizer.create_transcriber(std::move(freeing), options));
  u2moe::Transcriber dropped = recognizer.create_transcriber({}, options);
  for (std::size_t begin = 0; begin < samples.size(); begin += kBuffer) {
    const std::size_t num = std::min(kBuffer, samples.size() - begin);
    for (u2moe::Transcriber* each : {&plain, &other, &dropped}) each->feed(kRate, samples.data() + begin, num);
  }
  own->feed(kRate, samples.data(), samples.size());
  dropped.cancel();
  plain.input_finished();
  plain.wait();
  other.wait();
  while (!num_freed || !watched.expired()) std::this_thread::yield();
  std::printf("%d %d\n", num_calls.load(), num_freed.load());
  std::printf("%s\n", error_of([&] { dropped.wait(); }).c_str());
  std::printf("%s\n", error_of([&] { plain.feed(kRate, samples.data(), 1); }).c_str());
  u2moe::Stream stream = recognizer.create_stream(options);
  stream.accept_waveform(kRate, samples.data(), samples.size());
  stream.input_finished();
  std::string expected;
  for (const u2moe::Result& segment : stream.take_segments()) expected += segment.json() + "\n";
  std::printf("%s\n%s\n%s%d\n", all == expected && !all.empty() ? "the same" : "another", thrown.c_str(), events.c_str(), partial.empty());
}

// Print texts of tokens, digests of files, and log messages.
void look(const char* folder, const Samples& samples, const char* damaged, const char* failing) {
  std::vector<std::string> messages;
  u2moe::set_log([&](int severity, const std::string& origin, const std::string& message) { messages.push_back(std::to_string(severity) + " " + origin + " " + message); });
  const u2moe::Recognizer recognizer(folder);
  std::printf("%s\n%s\n%s\n", recognizer.token(1).c_str(), error_of([&] { recognizer.token(-1); }).c_str(), error_of([&] { u2moe::verify(folder); }).c_str());
  std::printf("%s\n", error_of([&] { u2moe::verify(damaged); }).c_str());
  error_of([&] { u2moe::Recognizer{damaged}; });
  std::printf("%s\n", error_of([&] { u2moe::open_vad(failing); }).c_str());
  u2moe::set_log(nullptr);
  const u2moe::Recognizer silent(folder);
  u2moe::Stream stream = recognizer.create_stream();
  stream.accept_waveform(kRate, samples.data(), samples.size());
  std::printf("%d\n", stream.is_endpoint());
  for (const std::string& each : messages) std::printf("%s\n", each.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  const std::string command = argv[1];
  const Samples samples = read(argv[3]);
  try {
    if (command == "look") {
      look(argv[2], samples, argv[4], argv[5]);
      return 0;
    }
    const u2moe::Recognizer recognizer(argv[2]);
    if (command == "batch") batch(recognizer, samples);
    if (command == "apart") apart(recognizer, samples);
    if (command == "cancel") cancel(recognizer, samples);
    if (command == "transcribe") transcribe(recognizer, samples, argv[4]);
    return argc > 6;
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
