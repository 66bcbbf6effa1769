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
 * threads at once; a stream by one at a time (U2MOE_STREAM_ERROR otherwise). The library starts threads to read files while a
 * recogniser opens, and no others; onnxruntime starts some if `num_threads` is above 1.
 *
 * Structs. `size` is the size of the struct as the program knows it. `u2moe_..._init` sets it, and the defaults.
 * Text is UTF-8 that ends in a zero. */
#ifndef U2MOE_H
#define U2MOE_H

#include <stddef.h>
#include <stdint.h>

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
  U2MOE_INTERNAL_ERROR = 11       /* a fault of this library */
} u2moe_error;

typedef struct u2moe_recognizer_handle *u2moe_recognizer;
typedef struct u2moe_stream_handle *u2moe_stream;
typedef struct u2moe_result_handle *u2moe_result;
typedef struct u2moe_hotwords_handle *u2moe_hotwords;
typedef struct u2moe_language_model_handle *u2moe_language_model;
typedef struct u2moe_vad_handle *u2moe_vad;

/* Message of this thread's last failed call; valid until its next failure. */
U2MOE_API const char *u2moe_error_message(void);
/* "U2MOE_BUNDLE_ERROR" for U2MOE_BUNDLE_ERROR. */
U2MOE_API const char *u2moe_error_name(u2moe_error error);
/* "0.1.0" */
U2MOE_API const char *u2moe_version(void);
/* Execution providers of this onnxruntime, as a JSON array of names. */
U2MOE_API u2moe_error u2moe_available_providers(const char **json);

/* ---- Recognisers ---- */

/* An execution provider and its options, in pairs of names and values; that of the CPU takes none. */
typedef struct u2moe_provider {
  const char *name; /* "CUDAExecutionProvider" */
  const char *const *keys;
  const char *const *values;
  size_t num_options;
} u2moe_provider;

typedef struct u2moe_recognizer_options {
  size_t size;
  int32_t num_threads; /* within one operator; 1 */
  /* "native": the kernels in this library, or an error. "onnxruntime": its own. "auto": native where they can run a graph,
   * except in float32. NULL: the environment variable U2MOE_KERNELS, or "auto". */
  const char *kernels;
  const u2moe_provider *providers; /* in order of preference, with no silent fall-back; none: the CPU */
  size_t num_providers;
  void *session_options; /* an OrtSessionOptions of the caller, used unchanged instead of all of these; or NULL */
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
/* Description of the recogniser, as JSON: versions, kernels with their instruction set or why there are none, providers, sizes, and
 * warnings: what is lost of a bundle that a newer version wrote. */
U2MOE_API u2moe_error u2moe_recognizer_describe(u2moe_recognizer recognizer, const char **json);
U2MOE_API u2moe_error u2moe_recognizer_free(u2moe_recognizer recognizer);

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
  double word_bonus;         /* added per word, -100 to 100; 0.5 */
  double unknown_score;      /* added to the log-probability of out-of-vocabulary words before weight, -1000 to 0; -5 */
  double rescoring_weight;   /* factor on the score of the model in the second pass; 1 */
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

/* Options that are not set are as in the bundle, otherwise as in the library: a beam of 10, Kaldi's endpoint rules, no
 * hotwords, no language model. The bundle's hotwords and language model are ignored by searches that have no beam. */
typedef struct u2moe_stream_options {
  size_t size;
  /* Encoder frames of a chunk; 0: as in training, or 16. U2MOE_FULL_CONTEXT: whole recordings, up to 30 seconds
   * encoded at once; results come later and are better. It needs endpoint rules. */
  int32_t chunk_size;
  int32_t num_left_chunks;   /* chunks of left context; -1: all */
  const char *search;        /* "attention_rescoring", "ctc_prefix_beam", "ctc_greedy" or "attention" (the decoder alone, at
                              the end of an utterance); NULL: rescoring if there is a decoder, else prefix beam */
  int32_t beam_size;         /* prefixes kept by a beam search, and maximum length of the n-best list; 0: as in the bundle */
  double ctc_weight;         /* weight of the first pass in rescoring; negative: as in the bundle */
  double reverse_weight;     /* weight of the right-to-left decoder in rescoring; negative: as in the bundle */
  double length_penalty;     /* exponent of the length by which scores of attention are divided; 0 */
  double padding_s;          /* seconds of silence (zeros) that the model hears before a source that begins in the middle of a
                              * sound, and after one that ends so; negative: as in the bundle */
  int32_t endpoint;          /* whether utterances end by the rules; 0: the input is one utterance */
  u2moe_endpoint_rule rules[3];
  double pause;              /* with full context, quiet seconds that cut recordings of more than 30 s; 0: none, else at least 0.4;
                              * negative: as in the bundle */
  u2moe_hotwords hotwords;             /* NULL: those of the bundle; or U2MOE_NO_HOTWORDS */
  u2moe_language_model language_model; /* NULL: that of the bundle; or U2MOE_NO_LANGUAGE_MODEL */
  u2moe_vad vad;                       /* each speech segment is recognised as a source of its own; or NULL */
  int32_t written;           /* whether English is written with digits and small letters: "at 10:30"; 0 */
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
/* Discard everything and begin a new source; also after a failure. */
U2MOE_API u2moe_error u2moe_stream_reset(u2moe_stream stream);
U2MOE_API u2moe_error u2moe_stream_free(u2moe_stream stream);

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
} u2moe_result_view;

U2MOE_API u2moe_error u2moe_result_get(u2moe_result result, u2moe_result_view *view);
/* The same as JSON, with the names that Python's results have. */
U2MOE_API u2moe_error u2moe_result_json(u2moe_result result, const char **json);
U2MOE_API u2moe_error u2moe_result_free(u2moe_result result);

#ifdef __cplusplus
}
#endif

#endif /* U2MOE_H */
