// A stream recognises one audio source. Feeding it and decoding it may run in different threads.
#pragma once

#include <atomic>
#include <condition_variable>
#include <exception>
#include <future>
#include <mutex>

#include "graphs.hpp"
#include "vad.hpp"

namespace u2moe::runtime {

/// A bundle and its sessions. Threads may share a model.
struct Model {
  Model(Location location, Settings chosen, const std::optional<Demanded>& demanded)
      : settings(std::move(chosen)), bundle(std::move(location), demanded), reading(std::async([this] { return bundle.language_model(); })),
        graphs(bundle, settings), hotwords(bundle.hotwords()), language_model(reading.get()) {}

  const Settings settings;
  const Bundle bundle;
  std::future<std::shared_ptr<const Fusion>> reading;  ///< the language model, read while sessions start
  const Graphs graphs;
  const std::shared_ptr<const ContextGraph> hotwords;  ///< hotwords of the bundle; null: none
  const std::shared_ptr<const Fusion> language_model;  ///< language model of the bundle; null: none
  mutable std::mutex mutex;                            ///< protects the grammars
  mutable PhraseGraphs grammars;
};

/// Only one thread at a time may decode a stream. Meanwhile, any thread may feed or cancel it and take results. The stream
/// keeps the model alive. If recognition fails, audio is lost, and the stream is unusable until `reset`.
class Stream {
 public:
  /// @param vad voice activity detector, which makes each speech segment a separate source. Null: all samples are one source.
  /// @param max_queue_s maximum seconds of audio in the queue of `feed`.
  Stream(std::shared_ptr<const Model> model, const StreamOptions& options, std::shared_ptr<const Vad> vad, double max_queue_s)
      : model_(std::move(model)), vad_(std::move(vad)), max_queue_s_(max_queue_s), source_(new_source(options)), result_(source_.result()) {
    if (vad_) past_ = vad_->start();
  }

  /// Append mono samples in [-1, 1] to the queue. If an error is thrown, no samples are appended.
  /// @throws AudioError for an invalid rate or invalid samples.
  /// @throws StreamError if the input is finished or recognition has failed.
  /// @throws QueueFull if the queue would contain more than `max_queue_s` seconds of audio.
  void feed(int sample_rate, const Floats& samples) {
    const std::lock_guard<std::mutex> lock(changing_);
    check_usable();
    check_audio(rate_, sample_rate, samples.data(), samples.size());
    const double rate = sample_rate, queued_s = static_cast<double>(num_queued_) / rate, more_s = static_cast<double>(samples.size()) / rate;
    if (queued_s + more_s > max_queue_s_) {
      char seconds[2][32];
      std::snprintf(seconds[0], sizeof seconds[0], "%.2f", queued_s);
      std::snprintf(seconds[1], sizeof seconds[1], "%.2f", more_s);
      fail<QueueFull>(std::string(seconds[0]) + " s of audio is waiting to be recognised: " + seconds[1] +
                      " s more would exceed the limit of " + shown_number(max_queue_s_) + " s");
    }
    append(sample_rate, samples);
  }

  /// Finish the input. The next `decode` recognises the remaining audio.
  /// @param may_be_over false: throw StreamError if the stream is already finished or has failed.
  void finish(bool may_be_over = false) {
    const std::lock_guard<std::mutex> lock(changing_);
    if (!may_be_over) check_usable();
    is_finished_ = true;
    changed_.notify_all();
  }

  /// Discard queued audio, and make decoding stop within one chunk. Until `reset`, `feed` throws Cancelled.
  void cancel() {
    is_cancelled_ = true;
    const std::lock_guard<std::mutex> lock(changing_);
    queue_.clear();
    num_queued_ = 0;
    if (!failure_) failure_ = std::make_exception_ptr(Cancelled(kCancelled));
    changed_.notify_all();
  }

  /// Accept any number of samples. They are decoded one second at a time, so that memory use and time per window do not grow.
  void accept_waveform(int sample_rate, const float* samples, std::size_t num) {
    const std::unique_lock<std::mutex> claimed = claim();
    locked([&] {
      check_usable();
      check_audio(rate_, sample_rate, samples, num);
    });
    const auto second = static_cast<std::size_t>(sample_rate);
    for (std::size_t begin = 0; begin < num; begin += second) {
      locked([&] {
        check_usable();  // another thread may finish or cancel meanwhile
        append(sample_rate, Floats(samples + begin, samples + std::min(begin + second, num)));
      });
      decode_claimed({this});
    }
  }

  /// Finish the input and recognise the remaining audio.
  void input_finished() {
    const std::unique_lock<std::mutex> claimed = claim();
    finish();
    decode_claimed({this});
  }

  /// Decode the queued audio of the streams, in batches. A failed or cancelled stream does not affect the other streams.
  /// @throws StreamError if another thread is decoding one of the streams. In this case, nothing is decoded.
  /// @throws Error of the first failed stream, after all other streams have been decoded.
  static void decode(std::vector<Stream*> streams, bool all = true) {
    std::sort(streams.begin(), streams.end());
    streams.erase(std::unique(streams.begin(), streams.end()), streams.end());
    std::vector<std::unique_lock<std::mutex>> claimed;
    for (Stream* stream : streams) claimed.push_back(stream->claim());
    decode_claimed(streams, all);
  }

  // See `StreamState` for functions of the same name.
  std::optional<Result> take_segment() { return locked([this] { return take_first(segments_); }); }
  std::optional<SpeechEvent> take_speech_event() { return locked([this] { return take_first(speech_events_); }); }
  Result result() const { return locked([this] { return result_; }); }
  bool has_segments() const { return locked([this] { return !segments_.empty(); }); }
  bool is_speech() const { return locked([this] { return is_speech_; }); }
  double queued_s() const { return locked([this] { return rate_ ? static_cast<double>(num_queued_) / rate_ : 0; }); }

  /// @throws Error the error that ended recognition, if any.
  void check_failure() const { locked([this] { return failure_ ? std::rethrow_exception(failure_) : void(); }); }

  /// Wait for audio, the end of the input, or a failure. Return whether there is audio to decode.
  bool wait_for_input() {
    std::unique_lock<std::mutex> lock(changing_);
    changed_.wait(lock, [this] { return !queue_.empty() || is_finished_ || failure_; });
    return !queue_.empty() && !failure_;
  }

  /// Discard everything and begin a new source. Waits while another thread is decoding this stream.
  void reset() {
    const std::lock_guard<std::mutex> claimed(decoding_), lock(changing_);
    source_ = new_source(source_.options());
    caches_ = {};
    if (vad_) past_ = vad_->start();
    queue_.clear();
    segments_.clear();
    speech_events_.clear();
    result_ = source_.result();
    num_queued_ = 0;
    rate_ = 0;
    failure_ = nullptr;
    is_cancelled_ = is_finished_ = is_ended_ = is_speech_ = false;
  }

 private:
  static constexpr const char* kCancelled = "this stream was cancelled: reset it, or create another";
  static constexpr std::size_t kMostChunks = 32, kMostWindows = 8, kMostWindowFrames = 6000, kMostCtcFrames = 2048;

  struct Job {
    Stream* stream;
    Request request;
  };
  using Jobs = std::vector<Job>;

  StreamState new_source(const StreamOptions& options) const {
    return StreamState(model_->bundle.manifest(), model_->bundle.vocabulary(), options, vad_ ? std::optional(vad_->options()) : std::nullopt);
  }

  template <class Look>
  auto locked(Look look) const -> decltype(look()) {
    const std::lock_guard<std::mutex> lock(changing_);
    return look();
  }

  std::unique_lock<std::mutex> claim() {
    std::unique_lock<std::mutex> lock(decoding_, std::try_to_lock);
    if (!lock) fail<StreamError>("this stream is being decoded by another thread");
    return lock;
  }

  void check_usable() const {
    if (is_cancelled_) fail<Cancelled>(kCancelled);
    if (failure_) fail<StreamError>("recognition has failed, and audio was lost: reset the stream, or create another");
    if (is_finished_) fail<StreamError>("the input is finished: reset the stream, or create another");
  }

  // Append samples in parts of at most one second, because taking a window from a part moves the rest of the part in memory.
  void append(int sample_rate, const Floats& samples) {
    rate_ = sample_rate;
    const auto second = static_cast<std::ptrdiff_t>(sample_rate);
    for (auto part = samples.begin(); part != samples.end();) {
      const auto end = part + std::min(second, samples.end() - part);
      queue_.emplace_back(part, end);
      num_queued_ += queue_.back().size();
      part = end;
    }
    changed_.notify_all();
  }

  // Return the next graph to run, or nullopt if the queue is empty. Unless `all` is set, take only one part from the queue.
  std::optional<Request> next(bool all) {
    for (;;) {
      if (is_cancelled_) fail<Cancelled>(kCancelled);
      if (std::optional<Request> request = source_.next()) {
        has_news_ = true;
        return request;
      }
      if (!all && has_taken_) return std::nullopt;
      std::unique_lock<std::mutex> lock(changing_);
      const int rate = rate_;
      const std::optional<Floats> samples = take_first(queue_);
      if (!samples && (!is_finished_ || is_ended_)) return std::nullopt;
      num_queued_ -= samples ? samples->size() : 0;
      lock.unlock();
      has_taken_ = true;
      is_ended_ = !samples;
      has_news_ |= is_ended_;
      if (is_ended_) source_.finish();
      else source_.accept(rate, samples->data(), samples->size());
    }
  }

  // Make new results and speech events visible to other threads.
  void publish() {
    Result result = source_.result();
    const std::lock_guard<std::mutex> lock(changing_);
    while (std::optional<Result> segment = source_.take_segment()) segments_.push_back(std::move(*segment));
    while (std::optional<SpeechEvent> event = source_.take_speech_event()) {
      is_speech_ = event->is_speech;
      speech_events_.push_back(*event);
    }
    result_ = std::move(result);
  }

  // Do work that concerns only this stream. An error becomes the failure of the stream.
  template <class Work>
  void failing(Work work) {
    try {
      work();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(changing_);
      if (!failure_) failure_ = std::current_exception();
    }
  }

  static void decode_claimed(const std::vector<Stream*>& streams, bool all = true) {
    for (Stream* stream : streams) stream->has_taken_ = stream->has_news_ = false;
    for (;;) {
      Jobs jobs;
      for (Stream* stream : streams) {
        if (stream->locked([&] { return stream->failure_ != nullptr; })) continue;
        stream->failing([&] {
          if (const auto request = stream->next(all)) jobs.push_back({stream, *request});
        });
      }
      if (jobs.empty()) break;
      // Run the encoder only when no other graph is due, so that more streams share a call.
      const auto is_encoder = [](const Job& job) { return job.request.graph == Request::Graph::kEncoder; };
      const auto encoder = std::stable_partition(jobs.begin(), jobs.end(), [&](const Job& job) { return !is_encoder(job); });
      if (encoder == jobs.begin()) encode(std::move(jobs));
      else run({jobs.begin(), encoder});
    }
    std::exception_ptr failure;
    for (Stream* stream : streams) {
      if (stream->has_news_) stream->failing([&] { stream->publish(); });
      if (!failure) failure = stream->locked([&] { return stream->failure_; });
    }
    if (failure) std::rethrow_exception(failure);
  }

  // Run jobs of any graph except the encoder. Jobs of the CTC head run in batches, and the others run one by one.
  static void run(Jobs jobs) {
    const auto is_ctc = [](const Job& job) { return job.request.graph == Request::Graph::kCtc; };
    const auto ctc = std::stable_partition(jobs.begin(), jobs.end(), [&](const Job& job) { return !is_ctc(job); });
    for (auto job = jobs.begin(); job != ctc; ++job) job->stream->failing([&] { job->stream->run_alone(job->request); });
    Jobs batch;
    std::size_t num = 0;
    for (auto job = ctc; job != jobs.end(); ++job) {
      const std::size_t more = job->request.input->size();
      if (num + more > kMostCtcFrames * static_cast<std::size_t>(job->stream->model_->bundle.manifest().output_size)) apart(std::exchange(batch, {}), score), num = 0;
      batch.push_back(*job);
      num += more;
    }
    apart(batch, score);
  }

  void run_alone(const Request& request) {
    const Graphs& graphs = model_->graphs;
    if (request.graph == Request::Graph::kDecoder) source_.give(graphs.score(*request.input, *request.sequences));
    if (request.graph == Request::Graph::kVad) source_.give({vad_->probability(request.input->data(), past_)});
  }

  // Encode chunks of the same size and left context in batches. With full context, windows of similar length form a batch.
  static void encode(Jobs jobs) {
    const auto key = [](const Job& job) {
      const StreamOptions& options = job.stream->source_.options();
      return std::make_tuple(job.stream->model_.get(), options.chunk_size, job.request.required);
    };
    const auto size = [](const Job& job) { return job.request.input->size() / static_cast<std::size_t>(job.stream->model_->bundle.manifest().feature_size); };
    const auto is_whole = [](const Job& job) { return job.stream->source_.options().chunk_size == StreamOptions::kFullContext; };
    std::stable_sort(jobs.begin(), jobs.end(), [&](const Job& one, const Job& other) {
      if (key(one) != key(other)) return key(one) < key(other);
      return is_whole(one) && size(one) < size(other);
    });
    Jobs batch;
    for (const Job& job : jobs) {
      const std::size_t num = batch.size() + 1;
      const bool is_full = is_whole(job) ? num > kMostWindows || num * size(job) > kMostWindowFrames : num > kMostChunks;
      const bool is_alike = batch.empty() || (key(job) == key(batch[0]) && (!is_whole(job) || 10 * size(job) <= 11 * size(batch[0])));
      if (!batch.empty() && (is_full || !is_alike)) apart(std::exchange(batch, {}), encode_batch);
      batch.push_back(job);
    }
    apart(batch, encode_batch);
  }

  static void encode_batch(const Jobs& jobs) {
    const Graphs& graphs = jobs[0].stream->model_->graphs;
    std::vector<Chunk> chunks;
    for (const auto& [stream, request] : jobs) {
      if (request.begins) stream->caches_ = graphs.start();
      if (request.kept >= 0) graphs.keep_last(stream->caches_, request.kept);
      chunks.push_back({request.input, &stream->caches_});
    }
    std::vector<Floats> outputs = graphs.encode(chunks, jobs[0].request.required);
    for (std::size_t i = 0; i < jobs.size(); ++i) jobs[i].stream->failing([&] { jobs[i].stream->source_.give(std::move(outputs[i])); });
  }

  static void score(const Jobs& jobs) {
    Floats all;
    for (const Job& job : jobs) all.insert(all.end(), job.request.input->begin(), job.request.input->end());
    const Manifest& m = jobs[0].stream->model_->bundle.manifest();
    const Floats log_probs = jobs[0].stream->model_->graphs.ctc(jobs.size() > 1 ? std::move(all) : *jobs[0].request.input);
    auto begin = log_probs.begin();
    for (const auto& [stream, request] : jobs) {
      const auto end = begin + static_cast<std::ptrdiff_t>(request.input->size()) / m.output_size * m.vocab_size;
      stream->failing([&, stream = stream] { stream->source_.give(Floats(begin, end)); });
      begin = end;
    }
  }

  // Run `work` on all jobs together. If it fails, run it on each half separately, until each failure concerns a single job.
  static void apart(const Jobs& jobs, void (*work)(const Jobs&)) {
    if (jobs.empty()) return;
    if (jobs.size() == 1) return jobs[0].stream->failing([&] { work(jobs); });
    try {
      work(jobs);
    } catch (const std::exception&) {
      const auto middle = jobs.begin() + static_cast<std::ptrdiff_t>(jobs.size() / 2);
      apart({jobs.begin(), middle}, work);
      apart({middle, jobs.end()}, work);
    }
  }

  std::shared_ptr<const Model> model_;
  std::shared_ptr<const Vad> vad_;
  double max_queue_s_;

  std::mutex decoding_;  // held by the decoding thread; protects the members up to `is_ended_`
  StreamState source_;
  Caches caches_;
  Vad::Past past_;
  bool has_taken_ = false, has_news_ = false;  // whether audio was taken, or results may have changed, since decoding began
  bool is_ended_ = false;                      // whether the end of the input was taken

  mutable std::mutex changing_;  // protects the remaining members
  std::condition_variable changed_;
  std::atomic<bool> is_cancelled_{false};
  std::deque<Floats> queue_;
  std::size_t num_queued_ = 0;  // in samples
  int rate_ = 0;                // rate of the input; 0: no input yet
  bool is_finished_ = false, is_speech_ = false;
  std::exception_ptr failure_;
  std::deque<Result> segments_;
  std::deque<SpeechEvent> speech_events_;
  Result result_;
};

}  // namespace u2moe::runtime
