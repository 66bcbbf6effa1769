/** Speech recognition with u2moe bundles in browsers and Node, with onnxruntime-web or onnxruntime-node. */

/** Base class of all errors of this module. `cause` is the underlying error of another library, such as onnxruntime, if any. */
export class U2moeError extends Error {}
/** The files are not a bundle, or this module cannot run the bundle. */
export class BundleError extends U2moeError {}
/** A file does not match its digest in the manifest. The message says what to do; `cause` says how the file differs. */
export class IntegrityError extends BundleError {}
/** None of `publicKeys` has signed the bundle. The signature is missing, was made by another key, or signs another manifest. */
export class SignatureError extends BundleError {}
/** The file is not a language model, or it is damaged. */
export class LanguageModelError extends U2moeError {}
/** The grammar cannot be parsed, or contains words that the vocabulary cannot spell. */
export class GrammarError extends U2moeError {}
/** A graph failed in onnxruntime, or returned invalid outputs. The message names the file of the graph. */
export class InferenceError extends U2moeError {}
/** The samples or the sample rate are invalid. */
export class AudioError extends U2moeError {}
/** With these samples, more than `maxQueueS` seconds of audio would be waiting. None of the samples were accepted. */
export class AudioOverflowError extends AudioError {}
/** The state of the stream or recogniser does not allow this call. */
export class StreamError extends U2moeError {}
/** The microphone cannot be opened, or has stopped. The message tells the user what to do. */
export class MicrophoneError extends U2moeError {
  readonly reason: 'insecure' | 'refused' | 'missing' | 'busy' | 'failed';
}

/** A word, its times in seconds from the start of the audio, and its confidence between 0 and 1. */
export interface Word {
  word: string;
  start: number;
  end: number;
  confidence: number;
}

/** A phrase of a grammar. Its confidence is the lowest confidence of its words. */
export type Phrase = Omit<Word, 'word'> & { phrase: string };

/** A hypothesis of the n-best list. */
export interface Alternative {
  text: string;
  tokens: number[];
  /** Time of each token's peak in seconds; empty if only the decoder found the hypothesis. */
  times: number[];
  /** Combined score of the two passes; without a second pass, the score of the first pass. */
  score: number;
  ctcScore: number;
  /** Score of the second pass; 0 if there is none. */
  attentionScore: number;
  /** Score of the language model; 0 if there is none. */
  languageScore: number;
}

/** The result of an utterance. A partial result may still change. It has only text, tokens, times, committed words and
 * phrases. */
export interface Result {
  text: string;
  isFinal: boolean;
  /** Index among the utterances with words, from 0. */
  segment: number;
  start: number;
  end: number;
  tokens: number[];
  /** Time of each token's peak in seconds. */
  times: number[];
  words: Word[];
  /** Mean confidence of the words. */
  confidence: number;
  /** Score of the best alternative. */
  score: number;
  /** Alternatives with distinct texts, best first. */
  nbest: Alternative[];
  /** The part of the text, from its beginning, that no later partial result changes. In a final result, the whole text. */
  committed: string;
  /** Number of words in `committed`. */
  numCommitted: number;
  /** Time in seconds up to which the first pass makes no more changes. */
  committedEnd: number;
  /** In a final result, number of differences from the words that the first pass committed: changed, missing or new words. */
  revised: number;
  /** Recognised phrases of the grammar. In a partial result, only those that no later partial result of the segment removes. */
  phrases: Phrase[];
}

/** A rule that ends the utterance when all its conditions are met. Times are in seconds. */
export interface EndpointRule {
  // declared: EndpointRule
  /** Whether the utterance must contain a frame that is not silence. Default: false. */
  mustContainNonsilence?: boolean;
  /** Minimum silence at the end, in seconds. Default: 0.0. */
  minTrailingSilence?: number;
  /** Minimum length of the utterance in seconds, including silence. Default: 0.0. */
  minUtteranceLength?: number;
  // end
}

/** When utterances end. Rules replace the defaults; null disables a rule. */
export interface EndpointConfig {
  rule1?: EndpointRule | null;
  rule2?: EndpointRule | null;
  rule3?: EndpointRule | null;
  /** With full context, shortest pause in seconds at which a recording longer than 30 s is split; null: never. Default: 0.5. */
  pause?: number | null;
  /** Threshold for the language model's probability of a sentence end. If the probability reaches it, rule 2's
   * minimum silence is halved; otherwise, the silence is multiplied by 1.5. null: the probability is not used.
   * Default: null. */
  turn?: number | null;
}

export interface LanguageModelOptions {
  // declared: LanguageModelOptions
  /** Weight of the model's log-probabilities relative to those of the CTC head, 0 to 100. Default: 0.5. */
  weight?: number;
  /** Bonus per word, -100 to 100. Default: 0.5. */
  wordBonus?: number;
  /** Added to the log-probability of out-of-vocabulary words, before weighting, -1000 to 0. Default: -5.0. */
  unknownScore?: number;
  /** Factor applied to the model's score in the second pass, 0 to 100. Default: 1.0. */
  rescoringWeight?: number;
  /** Default: "token" if any word of the model contains U+2581, otherwise "word". */
  level?: 'word' | 'token' | null;
  // end
}

/** An n-gram model for streams of one recogniser. */
export class LanguageModel {
  private constructor();
}

export interface VadOptions {
  ort: LoadOptions['ort'];
  sessionOptions?: Record<string, unknown>;
  // declared: VadOptions
  /** Speech begins when its probability reaches this. Default: 0.5. */
  threshold?: number;
  /** Speech ends when its probability falls below this. Default: 0.35. */
  endThreshold?: number;
  /** Seconds of silence that end a span of speech. Default: 0.6. */
  minSilence?: number;
  /** Seconds of silence kept on either side of a span. Default: 0.3. */
  padding?: number;
  // end
}

/** Voice activity detection with silero VAD 5 or 6. The caller provides its ONNX file. Needs onnxruntime 1.22 or later. */
export class Vad {
  private constructor();
  /** @param content content of the ONNX file. */
  static open(content: Uint8Array | ArrayBuffer, options: VadOptions): Promise<Vad>;
  release(): Promise<void>;
}

export interface StreamOptions {
  /** Phrases to prefer, each optionally with a weight above 0 and at most 100. Default: those of the bundle. */
  hotwords?: ReadonlyArray<string | readonly [string, number]> | null;
  /**
   * The only phrases to recognise, with slots and '[unk]' as in Python. Cannot be combined with hotwords or a language
   * model. Default: null.
   */
  grammar?: readonly string[] | null;
  /** Rules that end utterances. true: those of the bundle, or else Kaldi's. false: only the end of the input ends
   * them. Default: true. */
  endpoint?: boolean | EndpointConfig | null;
  /** Encoder frames per chunk. 'full': full context, in windows of 30 s. Default: as in training, or 16. */
  chunkSize?: number | 'full' | null;
  // declared: DecodingOptions
  /** Weight of the first pass in rescoring. Default: that of the bundle. */
  ctcWeight?: number | null;
  /** Weight of the right-to-left decoder in rescoring. Default: that of the bundle. */
  reverseWeight?: number | null;
  /** Prefixes kept by a beam search, and maximum length of the n-best list. Default: that of the bundle. */
  beamSize?: number | null;
  /** Seconds of silence (zeros) added before a source that begins mid-sound, and after one that ends mid-sound. Default: that
   * of the bundle. */
  paddingS?: number | null;
  /** Subtracted from the blank's score before the softmax of the first pass, for fewer deletions and more insertions. Default:
   * that of the bundle. */
  blankPenalty?: number | null;
  /** Default: attention_rescoring if the model has a decoder, otherwise ctc_prefix_beam. */
  search?: 'attention_rescoring' | 'ctc_prefix_beam' | 'ctc_greedy' | 'attention' | null;
  /** The attention search divides scores by the length raised to this power. Default: 0.0. */
  lengthPenalty?: number;
  /** Chunks of left context; -1: all. Default: -1. */
  numLeftChunks?: number;
  // end
  /** Maximum seconds of audio that may wait. If more would wait, `acceptWaveform` throws an AudioOverflowError. Default:
   * null, no limit. */
  maxQueueS?: number | null;
  /** Voice activity detector. Each speech segment that it finds is recognised as a separate source. Not available in
   * 'u2moe/worker'. */
  vad?: Vad | null;
  /** Language model; null: none. Default: that of the bundle, if any. */
  languageModel?: LanguageModel | null;
  /** Write English with digits and sentence case, as in "At 10:30". Default: false, the spoken form. */
  written?: boolean;
}

export interface StreamEventMap {
  partial: CustomEvent<Result>;
  final: CustomEvent<Result>;
  error: CustomEvent<Error>;
}

/** Recognises one source at a time, and emits results and failures as events. */
export class Stream extends EventTarget {
  private constructor();
  /** Partial result of the current utterance; after the end of the input, the last result. */
  readonly result: Result;
  /**
   * Append any number of samples of one channel: floats in [-1, 1], or int16. The sample rate must not change within a
   * source. The promise is fulfilled when all complete chunks are recognised. For a file read in blocks, await the promise
   * after each block. For live audio, limit the queue with `maxQueueS`.
   */
  acceptWaveform(sampleRate: number, samples: Float32Array | Int16Array): Promise<void>;
  /** Finish the input. The promise is fulfilled after the last result. */
  inputFinished(): Promise<void>;
  /**
   * Discard the source and any failure. The next samples start a new source at time zero, with any sample rate. The old source
   * emits no more events, and its pending promises are fulfilled. Listeners and options stay.
   */
  reset(): void;
  addEventListener<K extends keyof StreamEventMap>(
    type: K, listener: (event: StreamEventMap[K]) => void, options?: boolean | AddEventListenerOptions,
  ): void;
  addEventListener(
    type: string, listener: EventListenerOrEventListenerObject | null, options?: boolean | AddEventListenerOptions,
  ): void;
  removeEventListener<K extends keyof StreamEventMap>(
    type: K, listener: (event: StreamEventMap[K]) => void, options?: boolean | EventListenerOptions,
  ): void;
  removeEventListener(
    type: string, listener: EventListenerOrEventListenerObject | null, options?: boolean | EventListenerOptions,
  ): void;
}

export interface LoadOptions {
  /** The module 'onnxruntime-web', 'onnxruntime-web/wasm' or 'onnxruntime-node'. */
  ort: { InferenceSession: unknown; Tensor: unknown };
  /** Name of the Cache in which files are stored, if the Cache API is available; null: do not cache. Default: 'u2moe'. */
  cache?: string | null;
  onProgress?: (progress: { loaded: number; total: number }) => void;
  /** core.wasm, as bytes or as a compiled module. Needed only if the file is not in the folder of this module. */
  wasm?: BufferSource | WebAssembly.Module;
  /** Options for `InferenceSession.create`. */
  sessionOptions?: Record<string, unknown>;
  /** Ed25519 keys in PEM. One of them must have signed the manifest (`u2moe sign`). Default: no signature is required. */
  publicKeys?: string[];
  /** Returns whether a signature (64 bytes) is valid for a public key (32 bytes). Needed only if WebCrypto does
   * not support Ed25519. With a worker, pass this function to `serve`. */
  verify?: (signed: { publicKey: Uint8Array; message: Uint8Array; signature: Uint8Array }) => boolean | Promise<boolean>;
  /** Cancels loading. The promise rejects at once with the signal's reason, requests are cancelled, and sessions are freed. */
  signal?: AbortSignal | null;
}

export interface TranscribeOptions extends StreamOptions {
  /** Cancels recognition. The promise rejects at once with the signal's reason, and no further graph runs. */
  signal?: AbortSignal | null;
}

/** Reads the files of a bundle that has no URL. */
export interface BundleReader {
  /** Read a file. `signal` comes from `LoadOptions`. */
  read(name: string, options: { signal?: AbortSignal }): Promise<Uint8Array>;
}

/** Recognises speech with the model of a bundle. Any number of streams share the model. */
export class Recognizer {
  private constructor();
  /** Load a bundle from the URL of its folder or from a reader. Each file must match its SHA-256 in the manifest. */
  static fromBundle(source: string | URL | BundleReader, options: LoadOptions): Promise<Recognizer>;
  /** Sample rate of the model in Hz. Streams accept any rate from 1000 to 384000 Hz. */
  readonly sampleRate: number;
  createStream(options?: StreamOptions): Stream;
  /** Load a language model for streams of this recogniser, from an ARPA file or a compact file written by `u2moe lm build`. */
  languageModel(content: Uint8Array | ArrayBuffer, options?: LanguageModelOptions): LanguageModel;
  /** Recognise a whole recording, and return its final results. Default sample rate: the model's. */
  transcribe(samples: Float32Array | Int16Array, sampleRate?: number, options?: TranscribeOptions): Promise<Result[]>;
  /** Recognise a second of noise, so that the first audio is recognised as fast as later audio. */
  warmUp(options?: { signal?: AbortSignal | null }): Promise<void>;
  /** Free the model's memory once no graph is running. */
  release(): Promise<void>;
}

/** Resamples one channel in parts. Any split of the input produces the same samples. */
export class Resampler {
  private constructor();
  /** Create a resampler. Rejects with an AudioError if a rate is not between 1000 and 384000 Hz. */
  static create(sourceRate: number, targetRate: number): Promise<Resampler>;
  accept(samples: Float32Array): Float32Array;
  finish(): Float32Array;
  /** Free the resampler's memory now, rather than at garbage collection. */
  free(): void;
}
