/* Two-pass speech recognition with a u2moe bundle, for live audio and for recordings.
 *
 *     u2moe_recognizer recognizer;
 *     u2moe_stream stream;
 *     u2moe_result result;
 *     u2moe_result_view view;
 *     view.size = sizeof view;
 *     if (u2moe_recognizer_open("bundle", NULL, &recognizer)) fail(u2moe_error_message());
 *     u2moe_stream_create(recognizer, NULL, &stream);
 *     u2moe_stream_accept_waveform(stream, 48000, samples, num_samples);   // repeat for each buffer
 *     u2moe_stream_input_finished(stream);
 *     while (u2moe_stream_take_segment(stream, &result) == U2MOE_OK && result) {
 *       u2moe_result_get(result, &view);
 *       puts(view.text);
 *       u2moe_result_free(result);
 *     }
 *
 * Errors. Every function that can fail returns a `u2moe_error`. `u2moe_error_message`, called in the same thread, describes the
 * failure. After an error, output arguments are unchanged. Invalid arguments never end the process, except invalid pointers.
 * If memory runs out where onnxruntime cannot report this, onnxruntime can end the process or, if `num_threads` is above
 * 1, hang.
 *
 * Handles. A handle is a number, not an address. A call with a null or freed handle, or with a handle of another kind, returns
 * U2MOE_INVALID_HANDLE. Free each handle once. The order does not matter: a stream keeps what it needs of its recogniser,
 * hotwords, language model and voice activity detector. Strings and arrays of a result or recogniser are valid until its handle
 * is freed.
 *
 * Threads. Any thread may call any function. Threads may share recognisers, hotwords, language models and results. Only one
 * thread at a time may decode a stream; a second one gets U2MOE_STREAM_ERROR. Meanwhile, other threads may feed and cancel the
 * stream and take its results. The library starts one thread for each transcriber, and short-lived threads that read files
 * while a recogniser opens. onnxruntime starts threads if `num_threads` is above 1.
 *
 * Structs. The member `size` is the size of the struct that the program was compiled with. `u2moe_..._init` sets `size` and the
 * defaults. New versions only append members. A program compiled with an older header therefore runs with this library. A
 * program compiled with a newer header gets U2MOE_INVALID_ARGUMENT.
 *
 * Text. All strings are UTF-8 and end with a zero byte. */
#ifndef U2MOE_H
#define U2MOE_H

#include <stddef.h>
#include <stdint.h>

/* Versions of this header. u2moe_version and u2moe_api_version return the versions of the library. Each addition increments the
 * API version. */
#define U2MOE_VERSION "0.1.0"
#define U2MOE_VERSION_NUMBER 100 /* 10000 * major + 100 * minor + patch */
#define U2MOE_API_VERSION 5

#if defined(_WIN32) && defined(U2MOE_SHARED)
#ifdef U2MOE_BUILDING
#define U2MOE_API __declspec(dllexport)
#else
#define U2MOE_API __declspec(dllimport)
#endif
#elif defined(__GNUC__)
#define U2MOE_API __attribute__((visibility("default")))
#else
#define U2MOE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum u2moe_error {
  U2MOE_OK = 0,
  U2MOE_INVALID_ARGUMENT = 1,     /* a null pointer, an option out of range, or a struct of the wrong size */
  U2MOE_INVALID_HANDLE = 2,       /* a handle that is null, freed, or of another kind */
  U2MOE_BUNDLE_ERROR = 3,         /* a bundle that is missing, incomplete or of another version */
  U2MOE_INTEGRITY_ERROR = 4,      /* a file of a bundle does not match its digest */
  U2MOE_AUDIO_ERROR = 5,          /* an invalid sample rate or invalid samples; no samples were accepted */
  U2MOE_STREAM_ERROR = 6,         /* a stream that is finished, has failed, or is used by another thread */
  U2MOE_PROVIDER_ERROR = 7,       /* onnxruntime is too old or lacks or cannot start a provider, or it or a runner failed */
  U2MOE_KERNELS_ERROR = 8,        /* native kernels are required but cannot run */
  U2MOE_LANGUAGE_MODEL_ERROR = 9, /* a language model that is damaged or not in a known format */
  U2MOE_OUT_OF_MEMORY = 10,
  U2MOE_INTERNAL_ERROR = 11,      /* a bug in this library */
  U2MOE_QUEUE_FULL = 12,          /* the queue would exceed its limit; no samples were accepted */
  U2MOE_CANCELLED = 13,           /* the stream was cancelled; reset it to use it again */
  U2MOE_SIGNATURE_ERROR = 14,     /* none of the accepted keys signed the bundle */
  U2MOE_GRAMMAR_ERROR = 15        /* a grammar with invalid syntax, or with words that the vocabulary cannot spell */
} u2moe_error;

typedef struct u2moe_recognizer_handle *u2moe_recognizer;
typedef struct u2moe_stream_handle *u2moe_stream;
typedef struct u2moe_result_handle *u2moe_result;
typedef struct u2moe_hotwords_handle *u2moe_hotwords;
typedef struct u2moe_language_model_handle *u2moe_language_model;
typedef struct u2moe_vad_handle *u2moe_vad;
typedef struct u2moe_transcriber_handle *u2moe_transcriber;

/* Message of this thread's last failed call. Valid until a call in this thread fails again. */
U2MOE_API const char *u2moe_error_message(void);
/* Name of an error code, such as "U2MOE_BUNDLE_ERROR". */
U2MOE_API const char *u2moe_error_name(u2moe_error error);
/* Version of the library, such as "0.1.0". */
U2MOE_API const char *u2moe_version(void);
U2MOE_API int32_t u2moe_api_version(void);
/* Execution providers that this onnxruntime was built with, as a JSON array of names. */
U2MOE_API u2moe_error u2moe_available_providers(const char **json);

#define U2MOE_LOG_INFO 1
#define U2MOE_LOG_WARNING 2
#define U2MOE_LOG_ERROR 3

/* Receives a log message. `origin` is "u2moe" or a part of onnxruntime. Errors that calls return are not logged. The callback must
 * not reset a stream: its caller may be the thread that decodes the stream, and would wait for itself. */
typedef void (*u2moe_log_callback)(void *context, int32_t severity, const char *origin, const char *message);

/* Send log messages of all threads to `callback`, one at a time. NULL, the default, discards them, so that onnxruntime writes
 * nothing to stderr. Messages of onnxruntime arrive only if no other part of the program created an OrtEnv earlier. When this
 * function returns, the previous callback is not running and will not be called again. */
U2MOE_API u2moe_error u2moe_set_log(u2moe_log_callback callback, void *context);

/* ---- Recognisers ---- */

/* An execution provider with its options as names and values. The CPU provider takes no options. */
typedef struct u2moe_provider {
  const char *name; /* "CUDAExecutionProvider" */
  const char *const *keys;
  const char *const *values;
  size_t num_options;
} u2moe_provider;

/* Verifies an Ed25519 signature (64 bytes) of a message with a public key (32 bytes). Returns nonzero for a valid signature. */
typedef int32_t (*u2moe_verify_signature)(void *context, const uint8_t *public_key, const uint8_t *message, size_t size,
                                          const uint8_t *signature);

/* A float32 tensor of `static.onnx`, in row-major order. `static.json` lists names and shapes. */
typedef struct u2moe_tensor {
  const char *name;
  const int64_t *shape;
  size_t rank; /* number of axes */
  float *data;
} u2moe_tensor;

/* Runs `static.onnx` for one stream, for example on an NPU. Reads the inputs, in the order of static.json, and writes all values
 * of the outputs: "output" and the caches. Returns 0, or another number if it failed. Tensors are valid until it returns. The
 * thread that decodes calls it; threads that decode streams of a recogniser at the same time call it at the same time. */
typedef int32_t (*u2moe_runner)(void *context, const u2moe_tensor *inputs, size_t num_inputs, const u2moe_tensor *outputs,
                                size_t num_outputs);

typedef struct u2moe_recognizer_options {
  size_t size;
  int32_t num_threads; /* threads within one operator; default 1 */
  /* "native": the kernels in this library; an error if they cannot run. "onnxruntime": onnxruntime's own kernels. "auto":
   * native kernels for each graph that they can run, except float32 graphs. NULL: the value of the environment variable
   * U2MOE_KERNELS, or "auto". */
  const char *kernels;
  const u2moe_provider *providers; /* in order of preference; a missing provider is an error; NULL: the CPU */
  size_t num_providers;
  void *session_options; /* OrtSessionOptions of the caller, used unchanged; the members above must have their defaults.
                          * NULL: none */
  /* Accepted public keys in PEM format. One of them must have signed the manifest (`u2moe sign`); otherwise opening fails with
   * U2MOE_SIGNATURE_ERROR. The signature is checked before anything else in the bundle is read. NULL: no check. */
  const char *const *public_keys;
  size_t num_public_keys;
  u2moe_verify_signature verify_signature; /* NULL: OpenSSL, if the library was built with -DU2MOE_SIGNATURES=ON */
  void *verify_context;
  /* Runs the encoder of a bundle of fixed shape in place of onnxruntime; static.onnx is not opened. `runner_context` must be
   * valid until the recogniser and all its streams and transcribers are freed. NULL: onnxruntime */
  u2moe_runner runner;
  void *runner_context;
} u2moe_recognizer_options;

/* A file of a bundle in memory. */
typedef struct u2moe_file {
  const char *name; /* "bundle.json" */
  const void *content;
  size_t size;
} u2moe_file;

U2MOE_API u2moe_error u2moe_recognizer_options_init(u2moe_recognizer_options *options, size_t size);
/* Open a bundle. `options` NULL: the defaults. Each file is read once and compared with its digest. */
U2MOE_API u2moe_error u2moe_recognizer_open(const char *folder, const u2moe_recognizer_options *options,
                                            u2moe_recognizer *recognizer);
/* Open a bundle from files in memory. The caller may free the files afterwards. */
U2MOE_API u2moe_error u2moe_recognizer_open_memory(const u2moe_file *files, size_t num_files,
                                                   const u2moe_recognizer_options *options, u2moe_recognizer *recognizer);
/* Sample rate of the model in Hz. Streams resample audio of other rates. */
U2MOE_API u2moe_error u2moe_recognizer_sample_rate(u2moe_recognizer recognizer, int32_t *sample_rate);
/* Describe the recogniser as JSON: versions, providers, sizes, and the instruction set of the native kernels or the reason why
 * they are not used. The field `warnings` lists ignored features of a newer bundle. Valid until the recogniser is freed. */
U2MOE_API u2moe_error u2moe_recognizer_describe(u2moe_recognizer recognizer, const char **json);
/* Text of a token, as in tokens.txt. `token` is from 0 to vocab_size - 1. Valid until the recogniser is freed. */
U2MOE_API u2moe_error u2moe_recognizer_token(u2moe_recognizer recognizer, int32_t token, const char **text);
U2MOE_API u2moe_error u2moe_recognizer_free(u2moe_recognizer recognizer);
/* Compare every file of a bundle with its digest, without loading a model. */
U2MOE_API u2moe_error u2moe_verify(const char *folder);

/* ---- Hotwords, language models and voice activity detectors (streams may share them) ---- */

/* A phrase to prefer, in any letter case, and its bonus per token. The bonus is a log-probability above 0 and at most 100; 0
 * stands for the default, 1.5. */
typedef struct u2moe_hotword {
  const char *phrase;
  double weight;
} u2moe_hotword;

U2MOE_API u2moe_error u2moe_hotwords_create(u2moe_recognizer recognizer, const u2moe_hotword *phrases, size_t num_phrases,
                                            u2moe_hotwords *hotwords);
/* Create hotwords from lines of the form "phrase" or "phrase :weight". Empty lines and lines beginning with "#" are skipped. */
U2MOE_API u2moe_error u2moe_hotwords_parse(u2moe_recognizer recognizer, const char *lines, u2moe_hotwords *hotwords);
U2MOE_API u2moe_error u2moe_hotwords_free(u2moe_hotwords hotwords);

/* How a search uses a language model. See LanguageModelOptions in Python. */
typedef struct u2moe_language_model_options {
  size_t size;
  double weight;             /* weight of the model's log-probabilities relative to those of the CTC head, 0 to 100; 0.5 */
  double word_bonus;         /* bonus per word, -100 to 100; 0.5 */
  double unknown_score;      /* added to the log-probability of out-of-vocabulary words, before weighting, -1000 to 0; -5 */
  double rescoring_weight;   /* factor applied to the model's score in the second pass, 0 to 100; 1 */
  const char *level;         /* "word" or "token"; NULL: the level of the model */
} u2moe_language_model_options;

U2MOE_API u2moe_error u2moe_language_model_options_init(u2moe_language_model_options *options, size_t size);
/* Open a compact file written by `u2moe lm build`, or an uncompressed ARPA file. */
U2MOE_API u2moe_error u2moe_language_model_open(u2moe_recognizer recognizer, const char *file,
                                                const u2moe_language_model_options *options, u2moe_language_model *model);
U2MOE_API u2moe_error u2moe_language_model_open_memory(u2moe_recognizer recognizer, const void *content, size_t size,
                                                       const u2moe_language_model_options *options,
                                                       u2moe_language_model *model);
U2MOE_API u2moe_error u2moe_language_model_free(u2moe_language_model model);

/* Options for finding the beginning and end of speech. */
typedef struct u2moe_vad_options {
  size_t size;
  double threshold;          /* speech begins when its probability reaches this; 0.5 */
  double end_threshold;      /* speech ends when its probability falls below this; 0.35 */
  double min_silence;        /* seconds of silence that end a span of speech; 0.6 */
  double padding;            /* seconds of silence kept on either side of a span; 0.3 */
} u2moe_vad_options;

U2MOE_API u2moe_error u2moe_vad_options_init(u2moe_vad_options *options, size_t size);
/* Open an ONNX file of silero VAD 5 or 6. */
U2MOE_API u2moe_error u2moe_vad_open(const char *file, const u2moe_vad_options *options, u2moe_vad *vad);
U2MOE_API u2moe_error u2moe_vad_free(u2moe_vad vad);

/* ---- Streams ---- */

/* A rule that ends an utterance. The rule fires when the utterance is long enough, ends with enough silence and, if required,
 * contains speech. If both durations are 0, the rule is off. A negative value stands for the bundle's value. */
typedef struct u2moe_endpoint_rule {
  int32_t must_contain_nonsilence;
  double min_trailing_silence; /* seconds */
  double min_utterance_length; /* seconds */
} u2moe_endpoint_rule;

#define U2MOE_FULL_CONTEXT (-1)
#define U2MOE_NO_HOTWORDS ((u2moe_hotwords)(intptr_t)-1)
#define U2MOE_NO_LANGUAGE_MODEL ((u2moe_language_model)(intptr_t)-1)

/* An option that is not set has the value of the bundle. If the bundle does not set it either, the library's default applies: a
 * beam of 10, Kaldi's endpoint rules, no hotwords and no language model. Searches without a beam ignore the bundle's hotwords
 * and language model. */
typedef struct u2moe_stream_options {
  size_t size;
  /* Encoder frames per chunk. 0: as in training, or 16 if the model was trained with several sizes. U2MOE_FULL_CONTEXT: encode
   * up to 30 seconds of a recording at once. This is more accurate but delays results, and needs endpoint rules. */
  int32_t chunk_size;
  int32_t num_left_chunks;   /* chunks of left context; -1: all */
  const char *search;        /* "attention_rescoring", "ctc_prefix_beam", "ctc_greedy", or "attention": a search with only the
                              * decoder at the end of an utterance; NULL: "attention_rescoring" if the bundle has a decoder,
                              * otherwise "ctc_prefix_beam" */
  int32_t beam_size;         /* prefixes kept by a beam search, and maximum length of the n-best list; 0: as in the bundle */
  double ctc_weight;         /* weight of the first pass in rescoring; negative: as in the bundle */
  double reverse_weight;     /* weight of the right-to-left decoder in rescoring; negative: as in the bundle */
  double length_penalty;     /* the attention search divides scores by the length raised to this power; 0 */
  double padding_s;          /* seconds of silence (zeros) added before a source that begins mid-sound, and after one that ends
                              * mid-sound; negative: as in the bundle */
  int32_t endpoint;          /* nonzero: the endpoint rules end utterances; 0: the whole input is one utterance */
  u2moe_endpoint_rule rules[3];
  double pause;              /* with full context, shortest pause in seconds at which a recording longer than 30 s is split;
                              * 0: never; otherwise, at least 0.4; negative: as in the bundle */
  u2moe_hotwords hotwords;             /* NULL: hotwords of the bundle; U2MOE_NO_HOTWORDS: none */
  u2moe_language_model language_model; /* NULL: language model of the bundle; U2MOE_NO_LANGUAGE_MODEL: none */
  u2moe_vad vad;                       /* recognises each speech segment as a separate source; NULL: no detector */
  int32_t written;           /* nonzero: write English with digits and sentence case, as in "At 10:30"; default 0 */
  double blank_penalty;      /* subtracted from the blank's score before the softmax of the first pass, for fewer deletions and
                              * more insertions; negative: as in the bundle */
  double max_queue_s;        /* seconds of audio that may wait in u2moe_stream_feed and u2moe_transcriber_feed; default 10 */
  double turn;               /* if the language model's probability of a sentence end reaches this, the second rule needs half
                              * its silence, otherwise 1.5 times its silence; 0: off; negative: as in the bundle */
  const char *grammar;       /* lines of phrases to which recognition is restricted, in place of hotwords and a language model;
                              * (a | b): alternatives; [a]: optional words; <name>: a slot, defined by <name> = one | two;
                              * [unk]: other words are allowed; lines that begin with "#" are skipped; NULL: no grammar.
                              * Invalid grammars return U2MOE_GRAMMAR_ERROR */
} u2moe_stream_options;

U2MOE_API u2moe_error u2moe_stream_options_init(u2moe_stream_options *options, size_t size);
/* Create a stream for one audio source. `options` NULL: the defaults. */
U2MOE_API u2moe_error u2moe_stream_create(u2moe_recognizer recognizer, const u2moe_stream_options *options,
                                          u2moe_stream *stream);
/* Append mono samples in [-1, 1] and recognise all complete chunks. The results do not depend on how the audio is split into
 * calls. The first call sets the rate of the stream, 1000 to 384000 Hz; later calls must use the same rate. */
U2MOE_API u2moe_error u2moe_stream_accept_waveform(u2moe_stream stream, int32_t sample_rate, const float *samples,
                                                   size_t num_samples);
U2MOE_API u2moe_error u2moe_stream_accept_waveform_int16(u2moe_stream stream, int32_t sample_rate, const int16_t *samples,
                                                         size_t num_samples);
/* Finish the input and recognise the remaining audio. */
U2MOE_API u2moe_error u2moe_stream_input_finished(u2moe_stream stream);
/* Take the final result of the next utterance that has words. Each result is returned once. If none is ready, `result` becomes
 * NULL. */
U2MOE_API u2moe_error u2moe_stream_take_segment(u2moe_stream stream, u2moe_result *result);
/* Partial result of the current utterance: text, tokens and times of the first pass, which may still change. After the end of
 * the input, the result is final and may be empty. */
U2MOE_API u2moe_error u2moe_stream_get_result(u2moe_stream stream, u2moe_result *result);
/* Set `is_endpoint` to 1 if u2moe_stream_take_segment has a result, otherwise to 0. */
U2MOE_API u2moe_error u2moe_stream_is_endpoint(u2moe_stream stream, int32_t *is_endpoint);

/* The beginning (`is_speech` nonzero) or end of speech, `time` seconds after the first sample of the stream. */
typedef struct u2moe_speech_event {
  size_t size; /* set it before the call */
  int32_t is_speech;
  double time;
} u2moe_speech_event;

/* Take the next event of the voice activity detector. Each event is returned once. If none is ready, `is_taken` becomes 0. */
U2MOE_API u2moe_error u2moe_stream_take_speech_event(u2moe_stream stream, u2moe_speech_event *event, int32_t *is_taken);
/* Set `is_speech` to 1 while the voice activity detector detects speech, otherwise to 0. Always 0 without a detector. */
U2MOE_API u2moe_error u2moe_stream_is_speech(u2moe_stream stream, int32_t *is_speech);
/* Discard everything and begin a new source. Also works after a failure. Waits while another thread decodes the stream. */
U2MOE_API u2moe_error u2moe_stream_reset(u2moe_stream stream);
U2MOE_API u2moe_error u2moe_stream_free(u2moe_stream stream);

/* ---- Feeding and decoding separately ---- */

/* Queue samples and return. The function only copies the samples, so an audio callback may call it. If more than max_queue_s
 * seconds would wait, it accepts no samples and returns U2MOE_QUEUE_FULL. */
U2MOE_API u2moe_error u2moe_stream_feed(u2moe_stream stream, int32_t sample_rate, const float *samples, size_t num_samples);
U2MOE_API u2moe_error u2moe_stream_feed_int16(u2moe_stream stream, int32_t sample_rate, const int16_t *samples, size_t num_samples);
/* Finish the input. The next u2moe_decode_streams recognises the remaining audio. */
U2MOE_API u2moe_error u2moe_stream_feed_finished(u2moe_stream stream);
/* Seconds of audio in the queue. */
U2MOE_API u2moe_error u2moe_stream_queued(u2moe_stream stream, double *seconds);
/* Recognise all queued audio of the streams, in batches. The streams may belong to several recognisers. Each stream gets the
 * same results as it would alone. A failed or cancelled stream does not affect other streams. Returns the error of the first
 * failed stream; u2moe_stream_failure returns the error of a given stream. */
U2MOE_API u2moe_error u2moe_decode_streams(const u2moe_stream *streams, size_t num_streams);
/* Error that ended recognition of a stream, or U2MOE_OK. */
U2MOE_API u2moe_error u2moe_stream_failure(u2moe_stream stream);
/* Discard queued audio, and have the thread that decodes the stream stop within one chunk. Does not wait for that thread. Until
 * the stream is reset, feeding and decoding return U2MOE_CANCELLED. */
U2MOE_API u2moe_error u2moe_stream_cancel(u2moe_stream stream);

/* Callbacks of a transcriber. Its thread calls them, one at a time. Results are freed when the callback returns. Any callback
 * may be NULL. Callbacks may call any function. If a callback calls u2moe_transcriber_wait or u2moe_transcriber_free for its
 * own transcriber, the call does not wait. */
typedef struct u2moe_transcriber_callbacks {
  size_t size;
  void *context; /* first argument of the callbacks */
  void (*on_partial)(void *context, u2moe_result result); /* new text of the current utterance; "" if no words remain */
  void (*on_final)(void *context, u2moe_result result);   /* final result of each utterance with words, in order */
  void (*on_error)(void *context, u2moe_error error, const char *message); /* recognition failed and the transcriber ended */
  void (*on_speech)(void *context, int32_t is_speech, double time);        /* speech began or ended at `time`, according to the
                                                                            * voice activity detector */
} u2moe_transcriber_callbacks;

U2MOE_API u2moe_error u2moe_transcriber_callbacks_init(u2moe_transcriber_callbacks *callbacks, size_t size);
/* Create a transcriber. It recognises one source in its own thread, and always ends utterances by endpoint rules. `options`
 * NULL: the defaults. Free it before `main` returns, because onnxruntime cannot run after that. */
U2MOE_API u2moe_error u2moe_transcriber_create(u2moe_recognizer recognizer, const u2moe_stream_options *options,
                                               const u2moe_transcriber_callbacks *callbacks, u2moe_transcriber *transcriber);
/* Same as u2moe_stream_feed. */
U2MOE_API u2moe_error u2moe_transcriber_feed(u2moe_transcriber transcriber, int32_t sample_rate, const float *samples, size_t num_samples);
U2MOE_API u2moe_error u2moe_transcriber_feed_int16(u2moe_transcriber transcriber, int32_t sample_rate, const int16_t *samples,
                                                   size_t num_samples);
U2MOE_API u2moe_error u2moe_transcriber_queued(u2moe_transcriber transcriber, double *seconds);
/* Finish the input without waiting. */
U2MOE_API u2moe_error u2moe_transcriber_input_finished(u2moe_transcriber transcriber);
/* Finish the input. Wait until all of it is recognised and the last callback has returned. Return the error that ended
 * recognition, or U2MOE_OK. */
U2MOE_API u2moe_error u2moe_transcriber_wait(u2moe_transcriber transcriber);
/* Have the transcriber stop within one chunk, and return at once. Audio not yet recognised is dropped. No further callback
 * begins. */
U2MOE_API u2moe_error u2moe_transcriber_cancel(u2moe_transcriber transcriber);
/* Cancel remaining work, wait for the running callback, and free the transcriber. If a callback of the transcriber calls this,
 * the function does not wait, and that callback is the last one. */
U2MOE_API u2moe_error u2moe_transcriber_free(u2moe_transcriber transcriber);

/* ---- Results ---- */

typedef struct u2moe_word {
  const char *text;
  double start, end; /* seconds after the first sample of the stream */
  double confidence; /* 0 to 1; calibrated if the bundle has a calibration */
} u2moe_word;

typedef struct u2moe_alternative {
  const char *text;
  double score;           /* score by which alternatives are sorted, best first */
  double ctc_score;       /* score of the first pass; 0 if only the decoder searched */
  double attention_score; /* score of the second pass; 0 if only the first pass ran */
  double language_score;  /* score of the language model, included in ctc_score */
  const int32_t *tokens;
  size_t num_tokens;
} u2moe_alternative;

typedef struct u2moe_result_view {
  size_t size; /* set it before the call */
  const char *text;
  int32_t is_final;
  int32_t segment;  /* index of the utterance, counting only utterances with words */
  double start, end; /* seconds after the first sample of the stream */
  double confidence; /* mean over the words; 0 without words */
  const int32_t *tokens;
  const double *times; /* time of each token's peak in seconds */
  size_t num_tokens, num_times;
  const u2moe_word *words;
  size_t num_words;
  const u2moe_alternative *nbest; /* best first; empty in a partial result */
  size_t num_nbest;
  double score;                      /* score of the best alternative; 0 in a partial result */
  const double *const *nbest_times;  /* for each alternative, the time of each token's peak in seconds; NULL for an alternative
                                      * that only the decoder found */
  const char *committed;   /* prefix of `text` that no later partial result of this segment changes; the whole text if final */
  int32_t num_committed;   /* number of words in `committed` */
  int32_t revised;         /* in a final result, number of changes to committed words by the second pass */
  double committed_end;    /* time in seconds up to which the first pass makes no more changes */
  const u2moe_word *phrases; /* recognised phrases of the grammar; if partial, only phrases that no later partial result
                              * of this segment removes */
  size_t num_phrases;
} u2moe_result_view;

U2MOE_API u2moe_error u2moe_result_get(u2moe_result result, u2moe_result_view *view);
/* The result as JSON, with the field names of the Python class. Valid until the result is freed. */
U2MOE_API u2moe_error u2moe_result_json(u2moe_result result, const char **json);
U2MOE_API u2moe_error u2moe_result_free(u2moe_result result);

#ifdef __cplusplus
}
#endif

#endif /* U2MOE_H */
