// Call the C interface at random, with valid and invalid handles and arguments: random_calls(bundle, samples, num, seed). Each
// call must return an error code or do its work. Sanitizers find other faults.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "u2moe.h"

namespace {

class Caller {
 public:
  Caller(const char* bundle, const std::vector<float>& samples, unsigned seed) : bundle_(bundle), samples_(samples), random_(seed) {}

  void run(int num_calls) {
    open();
    for (int i = 0; i < num_calls; ++i) call();
    std::string seen;
    for (const int error : seen_) seen += std::string(" ") + u2moe_error_name(static_cast<u2moe_error>(error));
    std::printf("%d calls,%s\n", num_calls, seen.c_str());
    for (const auto handle : recognizers_) u2moe_recognizer_free(handle);
    for (const auto handle : streams_) u2moe_stream_free(handle);
    for (const auto handle : results_) u2moe_result_free(handle);
    for (const auto handle : hotwords_) u2moe_hotwords_free(handle);
    for (const auto handle : models_) u2moe_language_model_free(handle);
    for (const auto handle : transcribers_) u2moe_transcriber_free(handle);
  }

 private:
  std::size_t number(std::size_t below) { return std::uniform_int_distribution<std::size_t>(0, below - 1)(random_); }
  bool rarely() { return number(8) == 0; }

  // Return a handle that is or was open, or one that never was.
  template <class Handle>
  Handle any(const std::vector<Handle>& handles) {
    if (handles.empty() || rarely()) return reinterpret_cast<Handle>(static_cast<std::uintptr_t>(number(3) * number(1000)));
    return handles[handles.size() - 1 - number(std::min<std::size_t>(handles.size(), 4))];
  }

  template <class Handle>
  void keep(u2moe_error error, std::vector<Handle>& handles, const Handle& handle) {
    note(error);
    if (error == U2MOE_OK && handle) handles.push_back(handle);
  }

  void note(u2moe_error error) {
    seen_.insert(error);
    if (error != U2MOE_OK && !*u2moe_error_message()) std::printf("no message for %s\n", u2moe_error_name(error));
    if (error == U2MOE_INTERNAL_ERROR) std::printf("internal error: %s\n", u2moe_error_message());
  }

  template <class T>
  T* unless_rare(T* pointer) {
    return rarely() ? nullptr : pointer;
  }

  double odd_number() {
    const double odd[] = {0, -1, 0.5, 1e300, std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(), 3};
    return odd[number(7)];
  }

  void open() {
    u2moe_recognizer handle = nullptr;
    keep(u2moe_recognizer_open(bundle_, nullptr, &handle), recognizers_, handle);
  }

  void create_stream() {
    u2moe_stream_options options;
    note(u2moe_stream_options_init(&options, sizeof options));
    if (rarely()) options.size = number(200);
    if (rarely()) options.chunk_size = static_cast<int32_t>(number(40)) - 4;
    if (rarely()) options.beam_size = static_cast<int32_t>(number(12)) - 1;
    if (rarely()) options.padding_s = odd_number();
    if (rarely()) options.ctc_weight = odd_number();
    if (rarely()) options.pause = odd_number();
    if (rarely()) options.turn = odd_number();
    if (rarely()) options.search = rarely() ? "none" : number(2) ? "ctc_greedy" : "attention";
    if (rarely()) options.length_penalty = odd_number();
    if (rarely()) options.rules[number(3)] = {1, odd_number(), odd_number()};
    if (rarely()) options.hotwords = any(hotwords_);
    if (rarely()) options.grammar = "A [A]\n[unk]";
    if (rarely()) options.language_model = any(models_);
    u2moe_stream handle = nullptr;
    keep(u2moe_stream_create(any(recognizers_), unless_rare(&options), unless_rare(&handle)), streams_, handle);
  }

  void accept() {
    const std::size_t begin = number(samples_.size()), num = std::min(number(8000), samples_.size() - begin);
    std::vector<float> buffer(samples_.begin() + static_cast<std::ptrdiff_t>(begin), samples_.begin() + static_cast<std::ptrdiff_t>(begin + num));
    if (num && rarely()) buffer[number(num)] = static_cast<float>(odd_number());
    const int32_t rate = rarely() ? static_cast<int32_t>(number(400000)) - 10 : 16000;
    if (!rarely()) {
      note(u2moe_stream_accept_waveform(any(streams_), rate, unless_rare(buffer.data()), num));
      return;
    }
    const std::vector<int16_t> integers(num, static_cast<int16_t>(number(1000)));
    note(u2moe_stream_accept_waveform_int16(any(streams_), rate, unless_rare(integers.data()), num));
  }

  void feed() {
    const std::size_t begin = number(samples_.size()), num = std::min(number(8000), samples_.size() - begin);
    const int32_t rate = rarely() ? static_cast<int32_t>(number(400000)) - 10 : 16000;
    const float* const buffer = unless_rare(samples_.data()) ? samples_.data() + begin : nullptr;
    const std::vector<int16_t> integers(num, static_cast<int16_t>(number(1000)));
    if (rarely()) note(u2moe_stream_feed_int16(any(streams_), rate, unless_rare(integers.data()), num));
    note(number(2) ? u2moe_stream_feed(any(streams_), rate, buffer, num) : u2moe_transcriber_feed(any(transcribers_), rate, buffer, num));
    if (rarely()) note(u2moe_transcriber_feed_int16(any(transcribers_), rate, unless_rare(integers.data()), num));
    const u2moe_stream all[] = {any(streams_), any(streams_), any(streams_)};
    if (rarely()) note(u2moe_decode_streams(unless_rare(all), number(4)));
    if (rarely()) note(u2moe_stream_feed_finished(any(streams_)));
    if (rarely()) note(u2moe_stream_cancel(any(streams_)));
    note(u2moe_stream_failure(any(streams_)));
  }

  void transcribe() {
    u2moe_transcriber_callbacks callbacks;
    note(u2moe_transcriber_callbacks_init(&callbacks, sizeof callbacks));
    if (rarely()) callbacks.size = number(200);
    u2moe_stream_options options;
    note(u2moe_stream_options_init(&options, sizeof options));
    if (rarely()) options.max_queue_s = odd_number();
    u2moe_transcriber handle = nullptr;
    const u2moe_error error = u2moe_transcriber_create(any(recognizers_), unless_rare(&options), unless_rare(&callbacks), unless_rare(&handle));
    keep(error, transcribers_, handle);
    double seconds = 0;
    note(u2moe_transcriber_queued(any(transcribers_), unless_rare(&seconds)));
    if (rarely()) note(u2moe_transcriber_input_finished(any(transcribers_)));
    if (rarely()) note(u2moe_transcriber_wait(any(transcribers_)));
    if (rarely()) note(u2moe_transcriber_cancel(any(transcribers_)));
    if (!rarely()) note(u2moe_transcriber_free(any(transcribers_)));
  }

  void take() {
    u2moe_result handle = nullptr;
    const bool is_partial = rarely();
    const auto function = is_partial ? u2moe_stream_get_result : u2moe_stream_take_segment;
    keep(function(any(streams_), unless_rare(&handle)), results_, handle);
  }

  void look() {
    u2moe_result_view view = {};
    view.size = rarely() ? number(200) : sizeof view;
    const char* json = nullptr;
    const u2moe_error error = u2moe_result_get(any(results_), unless_rare(&view));
    note(error);
    if (error == U2MOE_OK) sum_ += std::strlen(view.text) + view.num_words;
    note(u2moe_result_json(any(results_), unless_rare(&json)));
    note(u2moe_recognizer_describe(any(recognizers_), unless_rare(&json)));
    note(u2moe_available_providers(unless_rare(&json)));
    int32_t value = 0;
    note(u2moe_recognizer_sample_rate(any(recognizers_), unless_rare(&value)));
    note(u2moe_stream_is_endpoint(any(streams_), unless_rare(&value)));
    note(u2moe_stream_is_speech(any(streams_), unless_rare(&value)));
    note(u2moe_recognizer_token(any(recognizers_), static_cast<int32_t>(number(400)) - 9, unless_rare(&json)));
    u2moe_speech_event event = {rarely() ? number(200) : sizeof event, 0, 0};
    note(u2moe_stream_take_speech_event(any(streams_), unless_rare(&event), unless_rare(&value)));
    double seconds = 0;
    note(u2moe_stream_queued(any(streams_), unless_rare(&seconds)));
    if (rarely()) note(u2moe_verify(unless_rare("/none")));
  }

  void prefer() {
    const char* const phrases[] = {"a", "", "the\xff", "zero one", "\xf0\x9f\x98\x80"};
    const u2moe_hotword hotword = {rarely() ? nullptr : phrases[number(5)], rarely() ? odd_number() : 0};
    u2moe_hotwords handle = nullptr;
    keep(u2moe_hotwords_create(any(recognizers_), unless_rare(&hotword), rarely() ? 0 : 1, &handle), hotwords_, handle);
    const char* const arpa = "\\data\\\nngram 1=3\n\n\\1-grams:\n-1 <unk>\n-1 </s>\n-0.5 A\n\n\\end\\\n";
    std::string content = arpa;
    if (rarely()) content[number(content.size())] = static_cast<char>(number(256));
    u2moe_vad vad = nullptr;  // from a file that is not a network or does not exist
    const u2moe_vad_options when = {rarely() ? 1 : sizeof when, odd_number(), 0.3, 0.6, 0.3};
    note(u2moe_vad_open(rarely() ? bundle_ : "/none", unless_rare(&when), unless_rare(&vad)));
    note(u2moe_vad_free(reinterpret_cast<u2moe_vad>(any(streams_))));
    u2moe_language_model model = nullptr;
    keep(u2moe_language_model_open_memory(any(recognizers_), content.data(), content.size(), nullptr, &model), models_, model);
  }

  void free() {
    switch (number(5)) {
      case 0: note(u2moe_stream_free(any(streams_))); break;
      case 1: note(u2moe_result_free(any(results_))); break;
      case 2: note(u2moe_hotwords_free(any(hotwords_))); break;
      case 3: note(u2moe_language_model_free(any(models_))); break;
      default: note(u2moe_stream_free(reinterpret_cast<u2moe_stream>(any(results_)))); break;
    }
  }

  void call() {
    switch (number(40)) {
      case 0: note(u2moe_recognizer_open(rarely() ? nullptr : "/none", nullptr, nullptr)); break;
      case 1: create_stream(); break;
      case 2: create_stream(); break;
      case 3: note(u2moe_stream_reset(any(streams_))); break;
      case 4: note(u2moe_stream_input_finished(any(streams_))); break;
      case 5: prefer(); break;
      case 6: free(); break;
      case 7: case 8: case 9: case 10: case 11: case 12: take(); break;
      case 13: case 14: case 15: case 16: case 17: look(); break;
      case 19: case 20: case 21: feed(); break;
      case 22: transcribe(); break;
      case 18:
        if (number(20)) break;
        note(u2moe_recognizer_free(any(recognizers_)));
        open();
        break;
      default: accept(); break;
    }
  }

  const char* bundle_;
  const std::vector<float>& samples_;
  std::mt19937 random_;
  std::vector<u2moe_recognizer> recognizers_;
  std::vector<u2moe_stream> streams_;
  std::vector<u2moe_result> results_;
  std::vector<u2moe_hotwords> hotwords_;
  std::vector<u2moe_language_model> models_;
  std::vector<u2moe_transcriber> transcribers_;
  std::set<int> seen_;
  std::size_t sum_ = 0;
};

}  // namespace

void random_calls(const char* bundle, const std::vector<float>& samples, unsigned seed, int num_calls);

void random_calls(const char* bundle, const std::vector<float>& samples, unsigned seed, int num_calls) {
  Caller(bundle, samples, seed).run(num_calls);
}
