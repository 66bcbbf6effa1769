/* Speech recognition with a bundle of u2moe, in two passes, as audio comes or from whole recordings.
 *
 *     u2moe_recognizer recognizer;
 *     u2moe_stream stream;
 *     u2moe_result result;
 *     u2moe_result_view view;
 *     view.size = sizeof view;
 *     if (u2moe_recognizer_open("bundle", NULL, &recognizer)) fail(u2moe_error_message());
 *     u2moe_stream_create(recognizer, NULL, &stream);
 *     u2moe_stream_accept_waveform(stream, 48000, samples, num_samples);   // as often as there are some
 *     u2moe_stream_input_finished(stream);
 *     while (u2moe_stream_take_segment(stream, &result) == U2MOE_OK && result) {
 *       u2moe_result_get(result, &view);
 *       puts(view.text);
 *       u2moe_result_free(result);
 *     }
 *
 * Errors. Every function that can fail returns a `u2moe_error`; `u2moe_error_message` says in the same thread what was wrong.
 * Nothing that a program passes ends the process, apart from pointers to memory that is not there; want of memory might, at
 * places in onnxruntime that cannot report it, and with `num_threads` above 1 onnxruntime may wait for ever. After an error the
 * variables that a function would have set are unchanged.
 *
 * Handles. A handle is a number, never an address: one that is null, was freed, or is of another kind gives
 * U2MOE_INVALID_HANDLE. Each handle is freed once, in any order: a stream keeps what it needs of its recogniser, of hotwords,
 * of a language model and of a voice activity detector. Strings and arrays in results live until their result is freed, those of a recogniser until it is.
 *
 * Threads. Any function may be called in any thread. Recognisers, hotwords, language models and results may be used by many
 * threads at once. A stream is decoded by one thread at a time (U2MOE_STREAM_ERROR otherwise), while others feed it, cancel it and
 * take its results. The library starts a thread for each transcriber, and others only to read files while a recogniser opens;
 * onnxruntime starts some if `num_threads` is above 1.
 *
 * Structs. `size` is the size of the struct as the program knows it. `u2moe_..._init` sets it, and the defaults. Structs only grow,
 * at their end: programs that were built with an earlier header run with this library, and those with a later one than the library
 * are told so by U2MOE_INVALID_ARGUMENT. Text is UTF-8 that ends in a zero. */
#ifndef U2MOE_H
#define U2MOE_H

#include <stddef.h>
#include <stdint.h>

/* Of this header; u2moe_version and u2moe_api_version are those of the library. The second grows with each addition. */
#define U2MOE_VERSION "0.1.0"
#define U2MOE_VERSION_NUMBER 100 /* 10000 * major + 100 * minor + patch */
#define U2MOE_API_VERSION 4

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
  U2MOE_INVALID_ARGUMENT = 1,     /* a null pointer, an option out of range, a struct of another size */
  U2MOE_INVALID_HANDLE = 2,       /* null, freed, or of another kind */
  U2MOE_BUNDLE_ERROR = 3,         /* a bundle that is incomplete, of another version, or none */
  U2MOE_INTEGRITY_ERROR = 4,      /* a file of a bundle differs from its digest */
  U2MOE_AUDIO_ERROR = 5,          /* a sample rate or samples that cannot be used; nothing was taken */
  U2MOE_STREAM_ERROR = 6,         /* a stream after its end, after a failure, or used by another thread */
  U2MOE_PROVIDER_ERROR = 7,       /* onnxruntime: too old, a provider that is missing or does not start, or a failed run */
  U2MOE_KERNELS_ERROR = 8,        /* native kernels were asked for, or are needed, and cannot run */
  U2MOE_LANGUAGE_MODEL_ERROR = 9, /* a language model that is damaged, or none */
  U2MOE_OUT_OF_MEMORY = 10,
  U2MOE_INTERNAL_ERROR = 11,      /* a fault of this library */
  U2MOE_QUEUE_FULL = 12,          /* more audio would wait than may; nothing was taken */
  U2MOE_CANCELLED = 13,           /* a stream that was cancelled, until it is reset */
  U2MOE_SIGNATURE_ERROR = 14,     /* a bundle that none of the demanded keys has signed */
  U2MOE_GRAMMAR_ERROR = 15        /* a grammar that cannot be read, or has words that the vocabulary cannot write */
} u2moe_error;

typedef struct u2moe_recognizer_handle *u2moe_recognizer;
typedef struct u2moe_stream_handle *u2moe_stream;
typedef struct u2moe_result_handle *u2moe_result;
typedef struct u2moe_hotwords_handle *u2moe_hotwords;
typedef struct u2moe_language_model_handle *u2moe_language_model;
typedef struct u2moe_vad_handle *u2moe_vad;
typedef struct u2moe_transcriber_handle *u2moe_transcriber;

/* What was wrong in the last call of this thread that failed; valid until the next one that fails. */
U2MOE_API const char *u2moe_error_message(void);
/* "U2MOE_BUNDLE_ERROR" for U2MOE_BUNDLE_ERROR. */
U2MOE_API const char *u2moe_error_name(u2moe_error error);
/* "0.1.0" */
U2MOE_API const char *u2moe_version(void);
U2MOE_API int32_t u2moe_api_version(void);
/* Execution providers of this onnxruntime, as a JSON array of names. */
U2MOE_API u2moe_error u2moe_available_providers(const char **json);

#define U2MOE_LOG_INFO 1
#define U2MOE_LOG_WARNING 2
#define U2MOE_LOG_ERROR 3

/* A message that is no error of a call, by "u2moe" or a part of onnxruntime, which otherwise writes nothing. */
typedef void (*u2moe_log_callback)(void *context, int32_t severity, const char *origin, const char *message);

/* Where messages of all threads go, one at a time; NULL: nowhere. Those of onnxruntime only come if no other part of the program
 * has made an OrtEnv before. The callback before runs no more when this returns. */
U2MOE_API u2moe_error u2moe_set_log(u2moe_log_callback callback, void *context);

/* ---- Recognisers ---- */

/* An execution provider and its options, in pairs of names and values; that of the CPU takes none. */
typedef struct u2moe_provider {
  const char *name; /* "CUDAExecutionProvider" */
  const char *const *keys;
  const char *const *values;
  size_t num_options;
} u2moe_provider;

/* Whether a signature (64 bytes) of a message is by a key of Ed25519 (32 bytes): not 0 if so. */
typedef int32_t (*u2moe_verify_signature)(void *context, const uint8_t *public_key, const uint8_t *message, size_t size,
                                          const uint8_t *signature);

typedef struct u2moe_recognizer_options {
  size_t size;
  int32_t num_threads; /* within one operator; 1 */
  /* "native": the kernels in this library, or an error. "onnxruntime": its own. "auto": native where they can run a graph,
   * except in float32. NULL: the environment variable U2MOE_KERNELS, or "auto". */
  const char *kernels;
  const u2moe_provider *providers; /* in order of preference, with no silent fall-back; none: the CPU */
  size_t num_providers;
  void *session_options; /* an OrtSessionOptions of the caller, used unchanged instead of all of these; or NULL */
  /* Who may have signed the bundle, in PEM: one of the keys must have signed its manifest (`u2moe sign`), which is seen to before
   * anything of it is read, or the bundle is U2MOE_SIGNATURE_ERROR. NULL: anybody, or nobody. */
  const char *const *public_keys;
  size_t num_public_keys;
  u2moe_verify_signature verify_signature; /* NULL: OpenSSL, if the library was built with -DU2MOE_SIGNATURES=ON */
  void *verify_context;
} u2moe_recognizer_options;

/* A file of a bundle in memory. */
typedef struct u2moe_file {
  const char *name; /* "bundle.json" */
  const void *content;
  size_t size;
} u2moe_file;

U2MOE_API u2moe_error u2moe_recognizer_options_init(u2moe_recognizer_options *options, size_t size);
/* `options` NULL: the defaults. Every file is compared with its digest and read once. */
U2MOE_API u2moe_error u2moe_recognizer_open(const char *folder, const u2moe_recognizer_options *options,
                                            u2moe_recognizer *recognizer);
/* The same for files in memory, which may be freed afterwards. */
U2MOE_API u2moe_error u2moe_recognizer_open_memory(const u2moe_file *files, size_t num_files,
                                                   const u2moe_recognizer_options *options, u2moe_recognizer *recognizer);
/* Sample rate of the model in Hz. Streams resample from any other. */
U2MOE_API u2moe_error u2moe_recognizer_sample_rate(u2moe_recognizer recognizer, int32_t *sample_rate);
/* What computes the graphs, as JSON: versions, kernels with their instruction set or why there are none, providers, sizes, and
 * warnings: what is lost of a bundle that a newer version wrote. */
U2MOE_API u2moe_error u2moe_recognizer_describe(u2moe_recognizer recognizer, const char **json);
/* The text of a token, from 0 to vocab_size - 1, as tokens.txt has it; valid until the recogniser is freed. */
U2MOE_API u2moe_error u2moe_recognizer_token(u2moe_recognizer recognizer, int32_t token, const char **text);
U2MOE_API u2moe_error u2moe_recognizer_free(u2moe_recognizer recognizer);
/* Compare every file of a bundle with its digest, and start nothing. */
U2MOE_API u2moe_error u2moe_verify(const char *folder);

/* ---- Hotwords, language models and voice activity detectors, for any number of streams ---- */

/* A phrase to prefer, in any letter case, and its bonus for each token: a log-probability above 0, at most 100; 0: 1.5. */
typedef struct u2moe_hotword {
  const char *phrase;
  double weight;
} u2moe_hotword;

U2MOE_API u2moe_error u2moe_hotwords_create(u2moe_recognizer recognizer, const u2moe_hotword *phrases, size_t num_phrases,
                                            u2moe_hotwords *hotwords);
/* From lines of "phrase" or "phrase :weight"; "# ..." and empty lines are skipped. */
U2MOE_API u2moe_error u2moe_hotwords_parse(u2moe_recognizer recognizer, const char *lines, u2moe_hotwords *hotwords);
U2MOE_API u2moe_error u2moe_hotwords_free(u2moe_hotwords hotwords);

/* How searches use a language model; see LanguageModelOptions in Python. */
typedef struct u2moe_language_model_options {
  size_t size;
  double weight;             /* weight of its log-probabilities relative to those of the CTC head, 0 to 100; 0.5 */
  double word_bonus;         /* bonus per word, -100 to 100; 0.5 */
  double unknown_score;      /* added to the log-probability of out-of-vocabulary words before weight, -1000 to 0; -5 */
  double rescoring_weight;   /* factor on the model's score in the second pass, 0 to 100; 1 */
  const char *level;         /* "word", "token", or NULL: as the model */
} u2moe_language_model_options;

U2MOE_API u2moe_error u2moe_language_model_options_init(u2moe_language_model_options *options, size_t size);
/* From a compact file, as `u2moe lm build` writes it, or an ARPA file (not compressed). */
U2MOE_API u2moe_error u2moe_language_model_open(u2moe_recognizer recognizer, const char *file,
                                                const u2moe_language_model_options *options, u2moe_language_model *model);
U2MOE_API u2moe_error u2moe_language_model_open_memory(u2moe_recognizer recognizer, const void *content, size_t size,
                                                       const u2moe_language_model_options *options,
                                                       u2moe_language_model *model);
U2MOE_API u2moe_error u2moe_language_model_free(u2moe_language_model model);

/* When speech begins and ends. */
typedef struct u2moe_vad_options {
  size_t size;
  double threshold;          /* speech begins when its probability reaches this; 0.5 */
  double end_threshold;      /* speech ends when its probability falls below this; 0.35 */
  double min_silence;        /* seconds of silence that end a span of speech; 0.6 */
  double padding;            /* seconds of silence kept on either side of a span; 0.3 */
} u2moe_vad_options;

U2MOE_API u2moe_error u2moe_vad_options_init(u2moe_vad_options *options, size_t size);
/* From the file of silero VAD 5 or 6 as ONNX. */
U2MOE_API u2moe_error u2moe_vad_open(const char *file, const u2moe_vad_options *options, u2moe_vad *vad);
U2MOE_API u2moe_error u2moe_vad_free(u2moe_vad vad);

/* ---- Streams ---- */

/* Ends an utterance that has the minimum length and trailing silence and, if required, contains speech. Both 0: no rule.
 * A negative value: as in the bundle. */
typedef struct u2moe_endpoint_rule {
  int32_t must_contain_nonsilence;
  double min_trailing_silence; /* seconds */
  double min_utterance_length; /* seconds */
} u2moe_endpoint_rule;

#define U2MOE_FULL_CONTEXT (-1)
#define U2MOE_NO_HOTWORDS ((u2moe_hotwords)(intptr_t)-1)
#define U2MOE_NO_LANGUAGE_MODEL ((u2moe_language_model)(intptr_t)-1)

/* What is not given is as in the bundle, and if that says nothing as in the library: a beam of 10, Kaldi's endpoint rules, no
 * hotwords, no language model. The bundle's hotwords and language model are ignored by searches that have no beam. */
typedef struct u2moe_stream_options {
  size_t size;
  /* Encoder frames of a chunk; 0: as in training, or 16. U2MOE_FULL_CONTEXT: whole recordings, of which up to 30 seconds
   * are encoded at once; results come later and are better. It needs endpoint rules. */
  int32_t chunk_size;
  int32_t num_left_chunks;   /* chunks of left context; -1: all */
  const char *search;        /* "attention_rescoring", "ctc_prefix_beam", "ctc_greedy" or "attention" (the decoder alone, at
                              the end of an utterance); NULL: rescoring if there is a decoder, else prefix beam */
  int32_t beam_size;         /* prefixes kept by a beam search, and maximum length of the n-best list; 0: as in the bundle */
  double ctc_weight;         /* weight of the first pass in rescoring; negative: as in the bundle */
  double reverse_weight;     /* weight of the right-to-left decoder in rescoring; negative: as in the bundle */
  double length_penalty;     /* power of the length by which attention divides scores; 0 */
  double padding_s;          /* seconds of silence (zeros) added before a source that begins in the middle of a sound, and after
                              * one that ends in it; negative: as in the bundle */
  int32_t endpoint;          /* whether utterances end by the rules; 0: the input is one utterance */
  u2moe_endpoint_rule rules[3];
  double pause;              /* with full context, quiet seconds that cut recordings of more than 30 s; 0: none, else at least 0.4;
                              * negative: as in the bundle */
  u2moe_hotwords hotwords;             /* NULL: those of the bundle; or U2MOE_NO_HOTWORDS */
  u2moe_language_model language_model; /* NULL: that of the bundle; or U2MOE_NO_LANGUAGE_MODEL */
  u2moe_vad vad;                       /* each speech segment is recognised as a source of its own; or NULL */
  int32_t written;           /* whether English is written with digits and small letters: "at 10:30"; 0 */
  double blank_penalty;      /* subtracted from the score of the blank before the softmax in the first pass: fewer deletions,
                              * more insertions; negative: as in the bundle */
  double max_queue_s;        /* seconds of audio that may wait in u2moe_stream_feed and u2moe_transcriber_feed; 10 */
  double turn;               /* the language model's probability of the end of a sentence from which the second rule needs half of
                              * its silence, below half as much again; 0: silence alone decides; negative: as in the bundle */
  const char *grammar;       /* all that may be said, in place of hotwords and a language model, as lines: phrases with (a | b) and
                              * [a], which may be left out; slots, <name> = one | two; and [unk], if other words may be said, too;
                              * "# ..." is skipped; NULL: anything. A wrong one is U2MOE_GRAMMAR_ERROR */
} u2moe_stream_options;

U2MOE_API u2moe_error u2moe_stream_options_init(u2moe_stream_options *options, size_t size);
/* `options` NULL: the defaults. */
U2MOE_API u2moe_error u2moe_stream_create(u2moe_recognizer recognizer, const u2moe_stream_options *options,
                                          u2moe_stream *stream);
/* Append samples of one channel, in [-1, 1], and recognise what is complete. Any split gives the same results. The first rate,
 * 1000 to 384000 Hz, applies to the whole stream. */
U2MOE_API u2moe_error u2moe_stream_accept_waveform(u2moe_stream stream, int32_t sample_rate, const float *samples,
                                                   size_t num_samples);
U2MOE_API u2moe_error u2moe_stream_accept_waveform_int16(u2moe_stream stream, int32_t sample_rate, const int16_t *samples,
                                                         size_t num_samples);
/* Finish the input, and recognise the rest. */
U2MOE_API u2moe_error u2moe_stream_input_finished(u2moe_stream stream);
/* The final result of the next utterance that has words, each once; NULL in `result`: there is none now. */
U2MOE_API u2moe_error u2moe_stream_take_segment(u2moe_stream stream, u2moe_result *result);
/* The result so far of the current utterance: text, tokens and times of the first pass, which may change. Final after the
 * input is finished, and perhaps empty. */
U2MOE_API u2moe_error u2moe_stream_get_result(u2moe_stream stream, u2moe_result *result);
/* Whether an utterance has ended, so that u2moe_stream_take_segment gives one. */
U2MOE_API u2moe_error u2moe_stream_is_endpoint(u2moe_stream stream, int32_t *is_endpoint);

/* Speech begins or ends, `time` seconds from the first sample of the stream. */
typedef struct u2moe_speech_event {
  size_t size; /* set it before the call */
  int32_t is_speech;
  double time;
} u2moe_speech_event;

/* The next event of the voice activity detector, each once; `is_taken` 0: there is none now. */
U2MOE_API u2moe_error u2moe_stream_take_speech_event(u2moe_stream stream, u2moe_speech_event *event, int32_t *is_taken);
/* Whether the voice activity detector hears speech; 0 without one. */
U2MOE_API u2moe_error u2moe_stream_is_speech(u2moe_stream stream, int32_t *is_speech);
/* Discard everything and begin a new source; also after a failure. Waits while another thread decodes. */
U2MOE_API u2moe_error u2moe_stream_reset(u2moe_stream stream);
U2MOE_API u2moe_error u2moe_stream_free(u2moe_stream stream);

/* ---- Feeding and decoding apart ---- */

/* Append samples to a queue, and return: this takes no longer than to copy them, so that an audio callback may call it. All are taken or,
 * if more than max_queue_s would wait (U2MOE_QUEUE_FULL), none. */
U2MOE_API u2moe_error u2moe_stream_feed(u2moe_stream stream, int32_t sample_rate, const float *samples, size_t num_samples);
U2MOE_API u2moe_error u2moe_stream_feed_int16(u2moe_stream stream, int32_t sample_rate, const int16_t *samples, size_t num_samples);
/* Finish the input, which the next u2moe_decode_streams recognises. */
U2MOE_API u2moe_error u2moe_stream_feed_finished(u2moe_stream stream);
/* Seconds that wait. */
U2MOE_API u2moe_error u2moe_stream_queued(u2moe_stream stream, double *seconds);
/* Recognise all that waits in streams of any recognisers, in batches: with the results that each has alone. A stream that fails or is
 * cancelled leaves the others as they are; the error is that of the first, and u2moe_stream_failure tells which. */
U2MOE_API u2moe_error u2moe_decode_streams(const u2moe_stream *streams, size_t num_streams);
/* The error by which recognition of a stream has failed; U2MOE_OK: it has not. */
U2MOE_API u2moe_error u2moe_stream_failure(u2moe_stream stream);
/* End what another thread decodes within one chunk, and discard what waits; does not wait for it. The stream then gives
 * U2MOE_CANCELLED until it is reset. */
U2MOE_API u2moe_error u2moe_stream_cancel(u2moe_stream stream);

/* Called in a thread of the library, of each transcriber one at a time; results are freed when a callback returns. Any may be NULL.
 * They may call what they like; waiting for their own transcriber returns at once. */
typedef struct u2moe_transcriber_callbacks {
  size_t size;
  void *context; /* their first argument */
  void (*on_partial)(void *context, u2moe_result result); /* the text of the current utterance has changed; "": there was none after all */
  void (*on_final)(void *context, u2moe_result result);   /* each utterance with words once, in order */
  void (*on_error)(void *context, u2moe_error error, const char *message); /* recognition has failed, and the transcriber has ended */
  void (*on_speech)(void *context, int32_t is_speech, double time);        /* the voice activity detector hears that speech begins or ends */
} u2moe_transcriber_callbacks;

U2MOE_API u2moe_error u2moe_transcriber_callbacks_init(u2moe_transcriber_callbacks *callbacks, size_t size);
/* Recognises one source in a thread of its own. Utterances always end by endpoint rules. `options` NULL: the defaults. */
U2MOE_API u2moe_error u2moe_transcriber_create(u2moe_recognizer recognizer, const u2moe_stream_options *options,
                                               const u2moe_transcriber_callbacks *callbacks, u2moe_transcriber *transcriber);
/* As u2moe_stream_feed. */
U2MOE_API u2moe_error u2moe_transcriber_feed(u2moe_transcriber transcriber, int32_t sample_rate, const float *samples, size_t num_samples);
U2MOE_API u2moe_error u2moe_transcriber_feed_int16(u2moe_transcriber transcriber, int32_t sample_rate, const int16_t *samples,
                                                   size_t num_samples);
U2MOE_API u2moe_error u2moe_transcriber_queued(u2moe_transcriber transcriber, double *seconds);
/* Finish the input without waiting. */
U2MOE_API u2moe_error u2moe_transcriber_input_finished(u2moe_transcriber transcriber);
/* Finish the input, and wait until all of it is recognised and the last callback has returned. Gives the error that has ended it. */
U2MOE_API u2moe_error u2moe_transcriber_wait(u2moe_transcriber transcriber);
/* End within one chunk, without waiting and without results of what is not recognised yet: no other callback begins. */
U2MOE_API u2moe_error u2moe_transcriber_cancel(u2moe_transcriber transcriber);
/* Cancel what is left, wait for the last callback, and free it. A callback of its own may do so, which is then the last. */
U2MOE_API u2moe_error u2moe_transcriber_free(u2moe_transcriber transcriber);

/* ---- Results ---- */

typedef struct u2moe_word {
  const char *text;
  double start, end; /* seconds from the first sample of the stream */
  double confidence; /* 0 to 1; calibrated if the bundle is */
} u2moe_word;

typedef struct u2moe_alternative {
  const char *text;
  double score;           /* by which alternatives are sorted */
  double ctc_score;       /* of the first pass; 0 without one */
  double attention_score; /* of the second pass; 0 without one */
  double language_score;  /* of the language model, part of ctc_score */
  const int32_t *tokens;
  size_t num_tokens;
} u2moe_alternative;

typedef struct u2moe_result_view {
  size_t size; /* set it before the call */
  const char *text;
  int32_t is_final;
  int32_t segment;  /* number of the utterance among those with words */
  double start, end; /* seconds from the first sample of the stream */
  double confidence; /* mean of the words; 0 without words */
  const int32_t *tokens;
  const double *times; /* seconds at which each token peaks */
  size_t num_tokens, num_times;
  const u2moe_word *words;
  size_t num_words;
  const u2moe_alternative *nbest; /* best first; none in a partial result */
  size_t num_nbest;
  double score;                      /* of the best alternative; 0 in a partial result */
  const double *const *nbest_times;  /* seconds at which each token of each alternative peaks; NULL where only the decoder searched */
  const char *committed;   /* the beginning of `text` that no later partial result of this segment changes; all of a final text */
  int32_t num_committed;   /* its words */
  int32_t revised;         /* in a final result, how many of the words that the first pass had committed are now others, missing or new */
  double committed_end;    /* seconds before which the first pass changes nothing any more */
  const u2moe_word *phrases; /* of a grammar; in a partial result, those that no later result of this segment takes back */
  size_t num_phrases;
} u2moe_result_view;

U2MOE_API u2moe_error u2moe_result_get(u2moe_result result, u2moe_result_view *view);
/* The same as JSON, with the names that Python's results have. */
U2MOE_API u2moe_error u2moe_result_json(u2moe_result result, const char **json);
U2MOE_API u2moe_error u2moe_result_free(u2moe_result result);

#ifdef __cplusplus
}
#endif

#endif /* U2MOE_H */
