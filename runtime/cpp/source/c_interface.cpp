// The C interface: handles, structs and error codes around `Stream`. No exception leaves this file.
#include <any>
#include <mutex>
#include <new>
#include <system_error>

#include "transcriber.hpp"
#include "u2moe.h"

namespace u2moe::runtime {
namespace {

thread_local std::string the_message;

// Keep the message of an error, and return its code. If there is not enough memory for the message, only the code is kept.
u2moe_error failed(u2moe_error code, const char* message) noexcept {
  try {
    the_message = legible(message);
  } catch (...) {
    the_message.clear();
  }
  return code;
}

template <class Work>
u2moe_error guarded(Work work) noexcept {
  try {
    work();
    return U2MOE_OK;
  } catch (const Error& error) {
    return failed(error.code(), error.what());
  } catch (const std::bad_alloc&) {
    return failed(U2MOE_OUT_OF_MEMORY, "out of memory");
  } catch (const ort::Failure& error) {
    return failed(U2MOE_PROVIDER_ERROR, error.what());
  } catch (const std::system_error& error) {
    return failed(U2MOE_OUT_OF_MEMORY, error.what());  // a thread could not start
  } catch (const std::exception& error) {
    return failed(U2MOE_INTERNAL_ERROR, error.what());
  } catch (...) {
    return failed(U2MOE_INTERNAL_ERROR, "unknown");
  }
}

// ---- Objects of handles ----

struct Recognizer {
  std::shared_ptr<const Model> model;
  std::string description;
};

// A result, and its arrays as the C interface needs them.
struct OpenResult {
  explicit OpenResult(Result made) : result(std::move(made)) {
    for (const Word& word : result.words) words.push_back({word.text.c_str(), word.start, word.end, word.confidence});
    for (const Word& phrase : result.phrases) phrases.push_back({phrase.text.c_str(), phrase.start, phrase.end, phrase.confidence});
    for (const Alternative& each : result.nbest) {
      nbest.push_back({each.text.c_str(), each.score, each.ctc_score, each.attention_score, each.language_score, each.tokens.data(), each.tokens.size()});
      nbest_times.push_back(each.times.empty() ? nullptr : each.times.data());
    }
  }
  OpenResult(const OpenResult&) = delete;
  OpenResult& operator=(const OpenResult&) = delete;

  const char* json() const {
    std::call_once(is_written_, [this] { json_ = as_json(result); });
    return json_.c_str();
  }

  const Result result;
  std::vector<u2moe_word> words, phrases;
  std::vector<u2moe_alternative> nbest;
  std::vector<const double*> nbest_times;

 private:
  mutable std::once_flag is_written_;
  mutable std::string json_;
};

// Type of the object behind a handle, and the object's name in messages.
template <class Handle>
struct Meaning;
template <> struct Meaning<u2moe_recognizer> { using Object = std::shared_ptr<const Recognizer>; static constexpr const char* kName = "recognizer"; };
template <> struct Meaning<u2moe_hotwords> { using Object = std::shared_ptr<const ContextGraph>; static constexpr const char* kName = "hotwords"; };
template <> struct Meaning<u2moe_language_model> { using Object = std::shared_ptr<const Fusion>; static constexpr const char* kName = "language model"; };
template <> struct Meaning<u2moe_vad> { using Object = std::shared_ptr<const Vad>; static constexpr const char* kName = "voice activity detector"; };
template <> struct Meaning<u2moe_stream> { using Object = std::shared_ptr<Stream>; static constexpr const char* kName = "stream"; };
template <> struct Meaning<u2moe_result> { using Object = std::shared_ptr<const OpenResult>; static constexpr const char* kName = "result"; };
template <> struct Meaning<u2moe_transcriber> { using Object = std::shared_ptr<Transcriber>; static constexpr const char* kName = "transcriber"; };

template <class Handle>
using ObjectOf = typename Meaning<Handle>::Object;

// Objects by handle. Handles are numbers that are never reused, so a freed handle is not found. If one thread frees an object
// while a call in another thread uses it, the object lives until that call returns.
class Registry {
 public:
  template <class Handle>
  void add(ObjectOf<Handle> object, Handle* handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    objects_.emplace(++last_, std::move(object));
    *handle = reinterpret_cast<Handle>(last_);
  }

  template <class Handle>
  ObjectOf<Handle> find(Handle handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return *place(handle).second;
  }

  template <class Handle>
  void remove(Handle handle) {
    ObjectOf<Handle> object;  // declared before the lock, so destroyed after unlocking
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto [found, pointer] = place(handle);
    object = std::move(*pointer);
    objects_.erase(found);
  }

 private:
  using Objects = std::unordered_map<std::uintptr_t, std::any>;

  template <class Handle>
  std::pair<Objects::iterator, ObjectOf<Handle>*> place(Handle handle) {
    const std::string name = Meaning<Handle>::kName;
    if (!handle) throw InvalidHandle(name + " is null");
    const auto found = objects_.find(reinterpret_cast<std::uintptr_t>(handle));
    if (found == objects_.end()) throw InvalidHandle(name + " was freed or is not a handle");
    auto* const object = std::any_cast<ObjectOf<Handle>>(&found->second);
    if (!object) throw InvalidHandle("handle is of another kind, expected " + name);
    return {found, object};
  }

  std::mutex mutex_;
  Objects objects_;
  std::uintptr_t last_ = 0;
};

// never destroyed: threads may outlive `main`
Registry& registry() {
  static Registry* const all = new Registry;
  return *all;
}

// Call `work` with the object that a handle refers to. The object lives at least until `work` returns.
template <class Handle, class Work>
u2moe_error with(Handle handle, Work work) {
  return guarded([&] { std::invoke(work, *registry().find(handle)); });
}

template <class Handle>
u2moe_error freed(Handle handle) {
  return guarded([&] { registry().remove(handle); });
}

// ---- Arguments ----

template <class T>
T* needed(T* pointer, const char* name) {
  if (!pointer) throw InvalidArgument(std::string(name) + " is null");
  return pointer;
}

// An array may be null if it is empty.
template <class T>
const T* array(const T* items, std::size_t num, const char* name) {
  return num ? needed(items, name) : items;
}

// Check the size of a struct. Structs of earlier versions are shorter; options missing from them take their defaults.
void check_size(std::size_t found, std::size_t expected, const char* name, std::size_t least = sizeof(std::size_t)) {
  if (found >= least && found <= expected && found % sizeof(void*) == 0) return;
  throw InvalidArgument(std::string(name) + ": size is " + std::to_string(found) + ", expected " + std::to_string(expected) +
                        ": call its init function, and compile with the u2moe.h of this library (" U2MOE_VERSION ")");
}

// Default options, as the init function sets them, and the name of their struct in messages.
template <class T>
struct Defaults {
  T options;
  const char* name;

  static void copy(const T& from, T& to, std::size_t size, const char* name) {
    check_size(size, sizeof(T), name);
    std::memcpy(&to, &from, size);
    to.size = size;
  }

  u2moe_error init(T* to, std::size_t size) const {
    return guarded([&] { copy(options, *needed(to, name), size, name); });
  }

  // Return the program's options. Options that the program did not set or does not know have their defaults.
  T with(const T* given) const {
    T found = options;
    if (given) copy(*given, found, given->size, name);
    return found;
  }
};

template <class Numbers, class T>
T with_defaults(T options) {
  options.size = sizeof(T);
  Numbers::each([&](const char*, auto own, const Range& range, auto given) {
    options.*given = Numbers().*own;
    if (range.in_bundle) options.*given = range.least >= 1 ? 0 : -1;
  });
  return options;
}

// Read numbers, except those that stand for the bundle's default: 0 if valid values begin at 1, otherwise negatives.
template <class Numbers, class T>
void read_numbers(const T& options, Numbers& numbers) {
  Numbers::each([&](const char*, auto own, const Range& range, auto given) {
    const auto value = options.*given;
    if (!range.in_bundle || (range.least >= 1 ? value != 0 : !(value < 0))) numbers.*own = value;
  });
}

const Defaults<u2moe_recognizer_options> kRecognizerOptions{
    {sizeof(u2moe_recognizer_options), 1, nullptr, nullptr, 0, nullptr, nullptr, 0, nullptr, nullptr, nullptr, nullptr},
    "u2moe_recognizer_options"};
const Defaults<u2moe_language_model_options> kLanguageModelOptions{with_defaults<LanguageModelNumbers>(u2moe_language_model_options{}),
                                                                   "u2moe_language_model_options"};
const Defaults<u2moe_vad_options> kVadOptions{with_defaults<VadNumbers>(u2moe_vad_options{}), "u2moe_vad_options"};
const Defaults<u2moe_stream_options> kStreamOptions = [] {
  auto options = with_defaults<StreamNumbers>(u2moe_stream_options{});
  options.endpoint = 1;
  for (u2moe_endpoint_rule& rule : options.rules) rule = {-1, -1, -1};
  options.pause = options.turn = -1;
  options.max_queue_s = 10;
  return Defaults<u2moe_stream_options>{options, "u2moe_stream_options"};
}();
const Defaults<u2moe_transcriber_callbacks> kCallbacks{{sizeof(u2moe_transcriber_callbacks), nullptr, nullptr, nullptr, nullptr, nullptr},
                                                       "u2moe_transcriber_callbacks"};

// The accepted public keys and the function that verifies signatures. None: signatures are not checked.
std::optional<Demanded> demanded_of(const u2moe_recognizer_options& options) {
  if (!options.public_keys) return std::nullopt;
  Demanded demanded{{}, options.verify_signature ? nullptr : built_in_verify()};
  for (std::size_t i = 0; i < options.num_public_keys; ++i) demanded.public_keys.emplace_back(needed(options.public_keys[i], "public key"));
  if (options.verify_signature) {
    demanded.verify = [verify = options.verify_signature, context = options.verify_context](const Signatures::Signed& given, const std::string& message) {
      const auto bytes = [](const std::string& text) { return reinterpret_cast<const std::uint8_t*>(text.data()); };
      return verify(context, bytes(given.first), bytes(message), message.size(), bytes(given.second)) != 0;
    };
  }
  return demanded;
}

Settings settings_of(const u2moe_recognizer_options& options) {
  std::vector<Provider> providers;
  array(options.providers, options.num_providers, "providers");
  for (std::size_t i = 0; i < options.num_providers; ++i) {
    const u2moe_provider& each = options.providers[i];
    Provider& provider = providers.emplace_back(Provider{needed(each.name, "name of a provider"), {}});
    array(each.keys, each.num_options, "keys of a provider");
    array(each.values, each.num_options, "values of a provider");
    for (std::size_t k = 0; k < each.num_options; ++k) {
      provider.options.emplace_back(needed(each.keys[k], "key of a provider"), needed(each.values[k], "value of a provider"));
    }
  }
  Settings settings(options.num_threads, options.kernels ? options.kernels : "", std::move(providers),
                    static_cast<const OrtSessionOptions*>(options.session_options));
  if (!options.runner) return settings;
  settings.runner = [run = options.runner, context = options.runner_context](const auto& inputs, const auto& outputs) {
    return run(context, inputs.data(), inputs.size(), outputs.data(), outputs.size());
  };
  return settings;
}

StreamOptions options_of(const u2moe_stream_options& options, const Model& model) {
  const Manifest& m = model.bundle.manifest();
  StreamOptions found(m);
  read_numbers<StreamNumbers>(options, found);
  found.chunk_size = options.chunk_size;
  if (options.search) found.search = search_of(options.search);
  found.endpoint = options.endpoint != 0;
  if (!(options.pause < 0)) found.pause = options.pause;
  if (!(options.turn < 0)) found.turn = options.turn;
  found.written = options.written != 0;
  for (std::size_t i = 0; i < found.rules.size(); ++i) {
    const u2moe_endpoint_rule& rule = options.rules[i];
    EndpointRule own = m.rules[i].value_or(EndpointRule{});
    if (rule.must_contain_nonsilence >= 0) own.must_contain_nonsilence = rule.must_contain_nonsilence != 0;
    if (!(rule.min_trailing_silence < 0)) own.min_trailing_silence = rule.min_trailing_silence;
    if (!(rule.min_utterance_length < 0)) own.min_utterance_length = rule.min_utterance_length;
    found.rules[i] = own;
    if (own.min_trailing_silence == 0 && own.min_utterance_length == 0) found.rules[i] = std::nullopt;
  }
  if (options.grammar) {
    const std::lock_guard<std::mutex> lock(model.mutex);
    found.grammar = model.grammars.find(grammar_lines(options.grammar), model.bundle.vocabulary(), m.blank);
  }
  if (found.has_beam() && !found.grammar) found.hotwords = model.hotwords;
  if (found.has_beam() && !found.grammar) found.language_model = model.language_model;
  if (options.hotwords == U2MOE_NO_HOTWORDS) found.hotwords = nullptr;
  else if (options.hotwords) found.hotwords = registry().find(options.hotwords);
  if (options.language_model == U2MOE_NO_LANGUAGE_MODEL) found.language_model = nullptr;
  else if (options.language_model) found.language_model = registry().find(options.language_model);
  return found;
}

std::shared_ptr<Stream> new_stream(u2moe_recognizer recognizer, const u2moe_stream_options* given, bool needs_endpoint) {
  const auto owner = registry().find(recognizer);
  u2moe_stream_options options = kStreamOptions.with(given);
  if (needs_endpoint) options.endpoint = 1;
  check_range("max_queue_s", options.max_queue_s, 1e-9, 1e9);
  const auto vad = options.vad ? registry().find(options.vad) : nullptr;
  return std::make_shared<Stream>(owner->model, options_of(options, *owner->model), vad, options.max_queue_s);
}

std::string description_of(const Model& model) {
  const Kernels kernels = model.graphs.kernels();
  const auto refused = json_list(kernels.refused, [](const auto& each) { return json_text(each.first + ": " + each.second); });
  const Manifest& m = model.bundle.manifest();
  std::vector<std::string> providers;
  for (const Provider& provider : model.settings.providers()) providers.push_back(provider.name);
  return "{\"version\": " + json_text(std::string(U2MOE_VERSION)) + ", \"onnxruntime\": " + json_text(ort::version()) +
         ", \"native_kernels\": " + (kernels.native ? "true" : "false") + ", \"isa\": " + json_text(kernels.isa) + ", \"reason\": " +
         json_text(kernels.reason) + ", \"refused\": " + refused + ", \"providers\": " + json_text(providers) + ", \"warnings\": " + json_text(m.warnings) + ", \"sample_rate\": " + std::to_string(m.sample_rate) +
         ", \"vocab_size\": " + std::to_string(m.vocab_size) + ", \"can_stream\": " + (m.streaming ? "true" : "false") +
         ", \"has_decoder\": " + (m.has_decoder ? "true" : "false") + "}";
}

void open_recognizer(Location location, const u2moe_recognizer_options* options, u2moe_recognizer* recognizer) {
  needed(recognizer, "recognizer");
  const u2moe_recognizer_options read = kRecognizerOptions.with(options);
  const auto model = std::make_shared<const Model>(std::move(location), settings_of(read), demanded_of(read));
  for (const std::string& warning : model->bundle.manifest().warnings) Log::all().write(U2MOE_LOG_WARNING, "u2moe", warning);
  const std::string description = description_of(*model);
  Log::all().write(U2MOE_LOG_INFO, "u2moe", "loaded: " + description);
  registry().add(std::make_shared<const Recognizer>(Recognizer{model, description}), recognizer);
}

void open_language_model(u2moe_recognizer recognizer, const std::string& content, const std::string& source,
                         const u2moe_language_model_options* given, u2moe_language_model* model) {
  needed(model, "model");
  const auto owner = registry().find(recognizer);
  const u2moe_language_model_options found = kLanguageModelOptions.with(given);
  LanguageModelOptions options;
  read_numbers<LanguageModelNumbers>(found, options);
  if (found.level) options.level = found.level;
  registry().add(std::make_shared<const Fusion>(Ngrams::parse(content, source), options, owner->model->bundle.vocabulary(), source), model);
}

void create_hotwords(u2moe_recognizer recognizer, const std::vector<Hotword>& phrases, u2moe_hotwords* hotwords) {
  const auto owner = registry().find(recognizer);
  registry().add(std::make_shared<const ContextGraph>(phrases, owner->model->bundle.vocabulary()), needed(hotwords, "hotwords"));
}

Floats floats(const float* samples, std::size_t num) { return array(samples, num, "samples") ? Floats(samples, samples + num) : Floats(); }

Floats floats(const int16_t* samples, std::size_t num) {
  array(samples, num, "samples");
  Floats found(num);
  std::transform(samples, samples + num, found.begin(), [](int16_t each) { return static_cast<float>(each) / 32768.0F; });
  return found;
}

Stream& stream_of(Stream& stream) { return stream; }
Stream& stream_of(Transcriber& transcriber) { return transcriber.stream(); }

template <class Handle, class Sample>
u2moe_error feed(Handle handle, int sample_rate, const Sample* samples, std::size_t num) {
  return with(handle, [&](auto& it) { stream_of(it).feed(sample_rate, floats(samples, num)); });
}

// Ask the object behind a handle for a value, and write that value to the program's variable.
template <class Handle, class Ask, class T>
u2moe_error tell(Handle handle, T* place, const char* name, Ask ask) {
  return with(handle, [&](auto& it) { *needed(place, name) = std::invoke(ask, it); });
}

void give(Result result, u2moe_result* handle) { registry().add(std::make_shared<const OpenResult>(std::move(result)), handle); }

Events events_of(const u2moe_transcriber_callbacks& calls) {
  Events events;
  events.on_result = [calls](Result result) {
    const auto call = result.is_final ? calls.on_final : calls.on_partial;
    if (!call) return;
    u2moe_result handle = nullptr;
    give(std::move(result), &handle);
    call(calls.context, handle);
    u2moe_result_free(handle);
  };
  events.on_speech = [calls](SpeechEvent event) {
    if (calls.on_speech) calls.on_speech(calls.context, event.is_speech, event.time);
  };
  events.on_failure = [calls](const std::exception_ptr& failure) {
    const u2moe_error error = guarded([&] { std::rethrow_exception(failure); });
    if (calls.on_error) calls.on_error(calls.context, error, the_message.c_str());
  };
  return events;
}

}  // namespace
}  // namespace u2moe::runtime

using namespace u2moe::runtime;  // NOLINT: this file implements the C interface

const char* u2moe_error_message(void) { return the_message.c_str(); }

const char* u2moe_error_name(u2moe_error error) {
  static const char* const names[] = {
      "U2MOE_OK", "U2MOE_INVALID_ARGUMENT", "U2MOE_INVALID_HANDLE", "U2MOE_BUNDLE_ERROR", "U2MOE_INTEGRITY_ERROR", "U2MOE_AUDIO_ERROR",
      "U2MOE_STREAM_ERROR", "U2MOE_PROVIDER_ERROR", "U2MOE_KERNELS_ERROR", "U2MOE_LANGUAGE_MODEL_ERROR", "U2MOE_OUT_OF_MEMORY", "U2MOE_INTERNAL_ERROR",
      "U2MOE_QUEUE_FULL", "U2MOE_CANCELLED", "U2MOE_SIGNATURE_ERROR", "U2MOE_GRAMMAR_ERROR"};
  const auto index = static_cast<std::size_t>(error);
  return index < sizeof names / sizeof *names ? names[index] : "unknown";
}

const char* u2moe_version(void) { return U2MOE_VERSION; }

int32_t u2moe_api_version(void) { return U2MOE_API_VERSION; }

u2moe_error u2moe_set_log(u2moe_log_callback callback, void* context) {
  return guarded([&] { Log::all().set(callback, context); });
}

u2moe_error u2moe_available_providers(const char** json) {
  return guarded([&] {
    static const std::string* const all = new std::string(json_text(ort::available_providers()));
    *needed(json, "json") = all->c_str();
  });
}

u2moe_error u2moe_recognizer_options_init(u2moe_recognizer_options* options, size_t size) { return kRecognizerOptions.init(options, size); }
u2moe_error u2moe_language_model_options_init(u2moe_language_model_options* options, size_t size) { return kLanguageModelOptions.init(options, size); }
u2moe_error u2moe_vad_options_init(u2moe_vad_options* options, size_t size) { return kVadOptions.init(options, size); }
u2moe_error u2moe_stream_options_init(u2moe_stream_options* options, size_t size) { return kStreamOptions.init(options, size); }
u2moe_error u2moe_transcriber_callbacks_init(u2moe_transcriber_callbacks* callbacks, size_t size) { return kCallbacks.init(callbacks, size); }

u2moe_error u2moe_recognizer_free(u2moe_recognizer recognizer) { return freed(recognizer); }
u2moe_error u2moe_hotwords_free(u2moe_hotwords hotwords) { return freed(hotwords); }
u2moe_error u2moe_language_model_free(u2moe_language_model model) { return freed(model); }
u2moe_error u2moe_vad_free(u2moe_vad vad) { return freed(vad); }
u2moe_error u2moe_stream_free(u2moe_stream stream) { return freed(stream); }
u2moe_error u2moe_result_free(u2moe_result result) { return freed(result); }

u2moe_error u2moe_recognizer_open(const char* folder, const u2moe_recognizer_options* options, u2moe_recognizer* recognizer) {
  return guarded([&] { open_recognizer(std::string(needed(folder, "folder")), options, recognizer); });
}

u2moe_error u2moe_recognizer_open_memory(const u2moe_file* files, size_t num_files, const u2moe_recognizer_options* options,
                                         u2moe_recognizer* recognizer) {
  return guarded([&] {
    std::map<std::string, std::string> contents;
    array(files, num_files, "files");
    for (std::size_t i = 0; i < num_files; ++i) {
      const char* const content = static_cast<const char*>(files[i].content);
      contents[needed(files[i].name, "name of a file")].assign(array(content, files[i].size, "content of a file"), files[i].size);
    }
    open_recognizer(std::move(contents), options, recognizer);
  });
}

u2moe_error u2moe_recognizer_sample_rate(u2moe_recognizer recognizer, int32_t* sample_rate) {
  return tell(recognizer, sample_rate, "sample_rate", [](const Recognizer& it) { return it.model->bundle.manifest().sample_rate; });
}

u2moe_error u2moe_recognizer_describe(u2moe_recognizer recognizer, const char** json) {
  return tell(recognizer, json, "json", [](const Recognizer& it) { return it.description.c_str(); });
}

u2moe_error u2moe_recognizer_token(u2moe_recognizer recognizer, int32_t token, const char** text) {
  return tell(recognizer, text, "text", [token](const Recognizer& it) {
    const std::vector<std::string>& tokens = it.model->bundle.vocabulary().texts();
    check_range("token", token, 0, static_cast<double>(tokens.size()) - 1);
    return tokens[static_cast<std::size_t>(token)].c_str();
  });
}

u2moe_error u2moe_verify(const char* folder) {
  return guarded([&] { Bundle(std::string(needed(folder, "folder"))).verify(); });
}

u2moe_error u2moe_hotwords_create(u2moe_recognizer recognizer, const u2moe_hotword* phrases, size_t num_phrases, u2moe_hotwords* hotwords) {
  return guarded([&] {
    std::vector<Hotword> all;
    array(phrases, num_phrases, "phrases");
    for (std::size_t i = 0; i < num_phrases; ++i) {
      Hotword& hotword = all.emplace_back(Hotword{needed(phrases[i].phrase, "phrase")});
      if (phrases[i].weight != 0) hotword.weight = phrases[i].weight;
    }
    create_hotwords(recognizer, all, hotwords);
  });
}

u2moe_error u2moe_hotwords_parse(u2moe_recognizer recognizer, const char* lines, u2moe_hotwords* hotwords) {
  return guarded([&] { create_hotwords(recognizer, parse_hotwords(needed(lines, "lines")), hotwords); });
}

u2moe_error u2moe_language_model_open(u2moe_recognizer recognizer, const char* file, const u2moe_language_model_options* options,
                                      u2moe_language_model* model) {
  return guarded([&] { open_language_model(recognizer, content_of<LanguageModelError>(needed(file, "file")), file, options, model); });
}

u2moe_error u2moe_language_model_open_memory(u2moe_recognizer recognizer, const void* content, size_t size,
                                             const u2moe_language_model_options* options, u2moe_language_model* model) {
  return guarded([&] {
    const char* const first = array(static_cast<const char*>(content), size, "content");
    open_language_model(recognizer, size ? std::string(first, size) : "", "language model", options, model);
  });
}

u2moe_error u2moe_vad_open(const char* file, const u2moe_vad_options* options, u2moe_vad* vad) {
  return guarded([&] {
    needed(vad, "vad");
    VadOptions chosen;
    read_numbers<VadNumbers>(kVadOptions.with(options), chosen);
    registry().add(std::make_shared<const Vad>(content_of<BundleError>(needed(file, "file")), file, chosen), vad);
  });
}

u2moe_error u2moe_stream_create(u2moe_recognizer recognizer, const u2moe_stream_options* options, u2moe_stream* stream) {
  return guarded([&] { registry().add(new_stream(recognizer, options, false), needed(stream, "stream")); });
}

u2moe_error u2moe_stream_accept_waveform(u2moe_stream stream, int32_t sample_rate, const float* samples, size_t num_samples) {
  return with(stream, [&](Stream& it) { it.accept_waveform(sample_rate, array(samples, num_samples, "samples"), num_samples); });
}

u2moe_error u2moe_stream_accept_waveform_int16(u2moe_stream stream, int32_t sample_rate, const int16_t* samples, size_t num_samples) {
  return with(stream, [&](Stream& it) { it.accept_waveform(sample_rate, floats(samples, num_samples).data(), num_samples); });
}

u2moe_error u2moe_stream_feed(u2moe_stream stream, int32_t sample_rate, const float* samples, size_t num_samples) {
  return feed(stream, sample_rate, samples, num_samples);
}

u2moe_error u2moe_stream_feed_int16(u2moe_stream stream, int32_t sample_rate, const int16_t* samples, size_t num_samples) {
  return feed(stream, sample_rate, samples, num_samples);
}

u2moe_error u2moe_decode_streams(const u2moe_stream* streams, size_t num_streams) {
  return guarded([&] {
    array(streams, num_streams, "streams");
    std::vector<std::shared_ptr<Stream>> kept;
    std::vector<Stream*> all;
    for (std::size_t i = 0; i < num_streams; ++i) all.push_back(kept.emplace_back(registry().find(streams[i])).get());
    Stream::decode(std::move(all));
  });
}

u2moe_error u2moe_stream_feed_finished(u2moe_stream stream) { return with(stream, [](Stream& it) { it.finish(); }); }
u2moe_error u2moe_stream_queued(u2moe_stream stream, double* seconds) { return tell(stream, seconds, "seconds", &Stream::queued_s); }
u2moe_error u2moe_stream_failure(u2moe_stream stream) { return with(stream, &Stream::check_failure); }
u2moe_error u2moe_stream_cancel(u2moe_stream stream) { return with(stream, &Stream::cancel); }
u2moe_error u2moe_stream_reset(u2moe_stream stream) { return with(stream, &Stream::reset); }
u2moe_error u2moe_stream_input_finished(u2moe_stream stream) { return with(stream, &Stream::input_finished); }

u2moe_error u2moe_stream_take_segment(u2moe_stream stream, u2moe_result* result) {
  return with(stream, [&](Stream& it) {
    needed(result, "result");
    if (std::optional<Result> segment = it.take_segment()) give(std::move(*segment), result);
    else *result = nullptr;
  });
}

u2moe_error u2moe_stream_get_result(u2moe_stream stream, u2moe_result* result) {
  return with(stream, [&](Stream& it) { give(it.result(), needed(result, "result")); });
}

u2moe_error u2moe_stream_is_endpoint(u2moe_stream stream, int32_t* is_endpoint) {
  return tell(stream, is_endpoint, "is_endpoint", &Stream::has_segments);
}

u2moe_error u2moe_stream_is_speech(u2moe_stream stream, int32_t* is_speech) { return tell(stream, is_speech, "is_speech", &Stream::is_speech); }

u2moe_error u2moe_stream_take_speech_event(u2moe_stream stream, u2moe_speech_event* event, int32_t* is_taken) {
  return with(stream, [&](Stream& it) {
    check_size(needed(event, "event")->size, sizeof *event, "u2moe_speech_event", sizeof *event);
    needed(is_taken, "is_taken");
    const std::optional<SpeechEvent> found = it.take_speech_event();
    *is_taken = found.has_value();
    if (found) *event = {sizeof *event, found->is_speech, found->time};
  });
}

u2moe_error u2moe_transcriber_create(u2moe_recognizer recognizer, const u2moe_stream_options* options,
                                     const u2moe_transcriber_callbacks* callbacks, u2moe_transcriber* transcriber) {
  return guarded([&] {
    needed(transcriber, "transcriber");
    const Events events = events_of(kCallbacks.with(callbacks));
    registry().add(std::make_shared<Transcriber>(new_stream(recognizer, options, true), events), transcriber);
  });
}

u2moe_error u2moe_transcriber_feed(u2moe_transcriber transcriber, int32_t sample_rate, const float* samples, size_t num_samples) {
  return feed(transcriber, sample_rate, samples, num_samples);
}

u2moe_error u2moe_transcriber_feed_int16(u2moe_transcriber transcriber, int32_t sample_rate, const int16_t* samples, size_t num_samples) {
  return feed(transcriber, sample_rate, samples, num_samples);
}

u2moe_error u2moe_transcriber_queued(u2moe_transcriber transcriber, double* seconds) {
  return tell(transcriber, seconds, "seconds", [](const Transcriber& it) { return it.stream().queued_s(); });
}

u2moe_error u2moe_transcriber_input_finished(u2moe_transcriber transcriber) {
  return with(transcriber, [](Transcriber& it) { it.stream().finish(); });
}

u2moe_error u2moe_transcriber_wait(u2moe_transcriber transcriber) {
  return with(transcriber, [](Transcriber& it) {
    it.stream().finish(true);
    it.wait();
    it.stream().check_failure();
  });
}

u2moe_error u2moe_transcriber_cancel(u2moe_transcriber transcriber) { return with(transcriber, &Transcriber::cancel); }

u2moe_error u2moe_transcriber_free(u2moe_transcriber transcriber) {
  return guarded([&] {
    const std::shared_ptr<Transcriber> owned = registry().find(transcriber);
    owned->cancel();
    owned->wait();
    registry().remove(transcriber);
  });
}

u2moe_error u2moe_result_get(u2moe_result result, u2moe_result_view* view) {
  return with(result, [&](const OpenResult& open) {
    const Result& it = open.result;
    const std::size_t size = needed(view, "view")->size;
    check_size(size, sizeof *view, "u2moe_result_view", offsetof(u2moe_result_view, score));
    const u2moe_result_view all = {size, it.text.c_str(), it.is_final, it.segment, it.start, it.end, it.confidence,
             it.tokens.data(), it.times.data(), it.tokens.size(), it.times.size(), open.words.data(), open.words.size(),
             open.nbest.data(), open.nbest.size(), it.score, open.nbest_times.data(), it.committed.c_str(), it.num_committed,
             it.revised, it.committed_end, open.phrases.data(), open.phrases.size()};
    std::memcpy(view, &all, size);
  });
}

u2moe_error u2moe_result_json(u2moe_result result, const char** json) {
  return tell(result, json, "json", &OpenResult::json);
}
