// Recognises one source in its own thread and calls a function for each event.
#pragma once

#include <atomic>
#include <exception>
#include <future>
#include <thread>

#include "stream.hpp"

namespace u2moe::runtime {

/// Functions that a transcriber calls in its thread, one at a time.
struct Events {
  std::function<void(Result)> on_result;  ///< a partial result with a changed text, or a final result
  std::function<void(SpeechEvent)> on_speech;
  std::function<void(std::exception_ptr)> on_failure;
};

/// Runs a thread that recognises one source. The thread ends after the last result, or within one chunk after a failure or
/// `cancel`. The thread shares ownership of the objects that it uses.
class Transcriber {
 public:
  Transcriber(std::shared_ptr<Stream> stream, Events events) : state_(std::make_shared<State>(std::move(stream), std::move(events))) {
    thread_ = std::thread([state = state_] { state->work(); });
  }

  Transcriber(const Transcriber&) = delete;
  Transcriber& operator=(const Transcriber&) = delete;

  /// Cancel remaining work. Wait for a running callback, unless this is the transcriber's own thread.
  ~Transcriber() {
    cancel();
    if (is_own_thread()) thread_.detach();
    else thread_.join();
  }

  Stream& stream() const { return *state_->stream; }

  /// Make the thread stop within one chunk, without waiting. No callback begins later, except one that is already starting.
  void cancel() {
    state_->is_silent = true;
    stream().cancel();
  }

  /// Wait until the thread has ended. If called in that thread, return at once.
  void wait() {
    if (!is_own_thread()) state_->end.wait();
  }

 private:
  struct State {
    State(std::shared_ptr<Stream> of, Events called) : stream(std::move(of)), events(std::move(called)) {}

    void work() {
      worker = std::this_thread::get_id();
      try {
        for (bool has_more = true; has_more;) {
          has_more = stream->wait_for_input();
          recognize();
        }
      } catch (const Cancelled&) {  // `cancel` requested this
      } catch (...) {
        tell(events.on_failure, std::current_exception());
      }
      ended.set_value();
    }

    template <class Event, class Told>
    void tell(const Event& event, Told told) {
      if (!is_silent) event(std::move(told));
    }

    // Recognise the next part of the input, and send its events. Send the remaining events before reporting a failure.
    void recognize() {
      std::exception_ptr failure;
      try {
        Stream::decode({stream.get()}, false);
      } catch (...) {
        failure = std::current_exception();
      }
      while (const auto event = stream->take_speech_event()) tell(events.on_speech, *event);
      bool has_segment = false;
      while (std::optional<Result> segment = stream->take_segment()) {
        has_segment = true;
        tell(events.on_result, std::move(*segment));
      }
      if (failure) std::rethrow_exception(failure);
      Result partial = stream->result();
      const auto before = has_segment ? std::pair<std::string, int>() : shown;
      shown = partial.is_final ? std::pair<std::string, int>() : std::pair(partial.text, partial.num_committed);
      if (shown == before) return;
      partial.is_final = false;
      tell(events.on_result, std::move(partial));
    }

    const std::shared_ptr<Stream> stream;
    const Events events;
    std::atomic<std::thread::id> worker;
    std::atomic<bool> is_silent{false};
    std::pair<std::string, int> shown;  // last partial text and number of committed words; empty after a final result
    std::promise<void> ended;
    const std::shared_future<void> end = ended.get_future().share();
  };

  bool is_own_thread() const { return std::this_thread::get_id() == state_->worker; }

  std::shared_ptr<State> state_;
  std::thread thread_;
};

}  // namespace u2moe::runtime
