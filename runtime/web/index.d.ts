/** Speech recognition with a u2moe bundle in browsers and in Node, on onnxruntime-web or onnxruntime-node. */

/** Base of all errors of this module. `cause` is the error of another library, such as onnxruntime, if there is one. */
export class U2moeError extends Error {}
/** Not a bundle, or one that this module cannot run. */
export class BundleError extends U2moeError {}
/** A file differs from its digest in the manifest: its message says what to do, its cause how it differs. */
export class IntegrityError extends BundleError {}
/** None of the demanded keys has signed the bundle: there is no signature, or it is of another manifest, or by somebody else. */
export class SignatureError extends BundleError {}
/** A language model that is damaged, or none. */
export class LanguageModelError extends U2moeError {}
/** A grammar that cannot be read or used. */
export class GrammarError extends U2moeError {}
/** onnxruntime failed while it ran a graph, or gave what no graph of a bundle gives; names the file of the graph. */
export class InferenceError extends U2moeError {}
/** Invalid samples or sample rate. */
export class AudioError extends U2moeError {}
/** More audio would wait than `maxQueueS` allows; nothing was taken. */
export class AudioOverflowError extends AudioError {}
/** A stream was used in a state that does not allow it. */
export class StreamError extends U2moeError {}
/** The microphone cannot be opened; the message says what its user can do. */
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

/** A phrase of a grammar, and the least confidence of its words. */
export type Phrase = Omit<Word, 'word'> & { phrase: string };

/** One hypothesis of the n-best list. */
export interface Alternative {
  text: string;
  tokens: number[];
  /** Seconds at which each token peaks; none where only the decoder searched. */
  times: number[];
  /** Of both passes, or of the first if there is no second. */
  score: number;
  ctcScore: number;
  /** 0 without a second pass. */
  attentionScore: number;
  /** 0 without a language model. */
  languageScore: number;
}

/** The result of an utterance. A partial one, which may still change, has text, tokens and times, and what is committed. */
export interface Result {
  text: string;
  isFinal: boolean;
  /** Number of the utterance among those with words. */
  segment: number;
  start: number;
  end: number;
  tokens: number[];
  /** Seconds at which each token peaks. */
  times: number[];
  words: Word[];
  /** Mean confidence of the words. */
  confidence: number;
  /** Of the best alternative. */
  score: number;
  /** Alternatives, best first, each text once. */
  nbest: Alternative[];
  /** The beginning of the text that no later partial result of this segment changes; all of a final text. */
  committed: string;
  /** Number of its words. */
  numCommitted: number;
  /** Seconds before which the first pass changes nothing any more. */
  committedEnd: number;
  /** In a final result, how many of the words that the first pass had committed are now others, missing or new. */
  revised: number;
  /** Of a grammar; in a partial result, those that no later result of this segment takes back. */
  phrases: Phrase[];
}

/** A rule fires when all its conditions hold; seconds. */
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

/** Rules that replace the defaults; null disables one. */
export interface EndpointConfig {
  rule1?: EndpointRule | null;
  rule2?: EndpointRule | null;
  rule3?: EndpointRule | null;
  /** With full context, the shortest pause that ends an utterance of a long recording, in seconds; null: none does. Default: 0.5. */
  pause?: number | null;
  /** The language model's probability of the end of a sentence from which rule 2 needs half of its silence, below half as much
   * again; null: silence alone decides. Default: null. */
  turn?: number | null;
}

export interface LanguageModelOptions {
  // declared: LanguageModelOptions
  /** Weight of its log-probabilities relative to those of the CTC head, 0 to 100. Default: 0.5. */
  weight?: number;
  /** Bonus per word, -100 to 100. Default: 0.5. */
  wordBonus?: number;
  /** Added to the log-probability of out-of-vocabulary words before weight, -1000 to 0. Default: -5.0. */
  unknownScore?: number;
  /** Factor on the model's score in the second pass, 0 to 100. Default: 1.0. */
  rescoringWeight?: number;
  /** Default: tokens if any of its words contains U+2581, else words. */
  level?: 'word' | 'token' | null;
  // end
}

/** An n-gram model for one recogniser. */
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

/** Voice activity detection with silero VAD 5 or 6, which the user provides. Needs onnxruntime 1.22 or newer. */
export class Vad {
  private constructor();
  /** @param content the graph. */
  static open(content: Uint8Array | ArrayBuffer, options: VadOptions): Promise<Vad>;
  release(): Promise<void>;
}

export interface StreamOptions {
  /** Phrases to prefer, each alone or with a weight above 0 and at most 100. Default: those of the bundle. */
  hotwords?: ReadonlyArray<string | readonly [string, number]> | null;
  /** All that may be said, in place of hotwords and a language model: phrases, slots and '[unk]', as for Python. Default: null, anything. */
  grammar?: readonly string[] | null;
  /** When an utterance ends; false: only with the input. Default: true, the rules of the bundle, or Kaldi's. */
  endpoint?: boolean | EndpointConfig | null;
  /** Encoder frames per chunk. Default: as in training, or 16. 'full': whole utterances, of recordings in windows of 30 s. */
  chunkSize?: number | 'full' | null;
  // declared: DecodingOptions
  /** Weight of the first pass in rescoring. Default: that of the bundle. */
  ctcWeight?: number | null;
  /** Weight of the right-to-left decoder in rescoring. Default: that of the bundle. */
  reverseWeight?: number | null;
  /** Prefixes kept by a beam search, and maximum length of the n-best list. Default: that of the bundle. */
  beamSize?: number | null;
  /** Seconds of silence (zeros) added before a source that begins in the middle of a sound, and after one that ends in it.
   * Default: that of the bundle. */
  paddingS?: number | null;
  /** Subtracted from the score of the blank before the softmax in the first pass: fewer deletions, more insertions. Default:
   * that of the bundle. */
  blankPenalty?: number | null;
  /** Default: rescoring if the model has a decoder, otherwise prefix beam. */
  search?: 'attention_rescoring' | 'ctc_prefix_beam' | 'ctc_greedy' | 'attention' | null;
  /** Power of the length by which attention divides scores. Default: 0.0. */
  lengthPenalty?: number;
  /** Chunks of left context; -1: all. Default: -1. */
  numLeftChunks?: number;
  // end
  /** Seconds of audio that may wait to be recognised; more at once is an AudioOverflowError. Default: null, any number. */
  maxQueueS?: number | null;
  /** Each speech segment that it finds is recognised as a source of its own. Not in 'u2moe/worker'. */
  vad?: Vad | null;
  /** Default: that of the bundle, if it has one; null: none. */
  languageModel?: LanguageModel | null;
  /** English with digits and small letters: "at 10:30". Default: false, as it is spoken. */
  written?: boolean;
}

export interface StreamEventMap {
  partial: CustomEvent<Result>;
  final: CustomEvent<Result>;
  error: CustomEvent<Error>;
}

/** Recognises one source after another, and tells of results and of the failure of recognition by events. */
export class Stream extends EventTarget {
  private constructor();
  /** The result of the current utterance so far. */
  readonly result: Result;
  /**
   * Append samples of one channel, in [-1, 1] or int16, any length, at a rate that stays the same. The promise is fulfilled
   * when they have been recognised as far as possible: whoever reads a file waits for it before reading on. Where audio comes by itself,
   * `maxQueueS` bounds what waits.
   */
  acceptWaveform(sampleRate: number, samples: Float32Array | Int16Array): Promise<void>;
  /** Finish the input. The promise is fulfilled when the last result has been found. */
  inputFinished(): Promise<void>;
  /**
   * Discard everything, also a failure: the next samples start a new source at time zero, at any rate. At once: no event of the
   * old source follows, and promises that wait for it are fulfilled. Listeners and options stay.
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
  /** The module 'onnxruntime-web' (or 'onnxruntime-web/wasm') or 'onnxruntime-node'. */
  ort: { InferenceSession: unknown; Tensor: unknown };
  /** Name of a Cache to keep the files in, where there is the Cache API; null for none. Default: 'u2moe'. */
  cache?: string | null;
  onProgress?: (progress: { loaded: number; total: number }) => void;
  /** core.wasm, where it does not lie beside the module: bytes, or compiled. */
  wasm?: BufferSource | WebAssembly.Module;
  /** For `InferenceSession.create`. */
  sessionOptions?: Record<string, unknown>;
  /** Who may have signed the bundle: Ed25519 keys in PEM, of which one must have signed its manifest (`u2moe sign`). Default: anybody. */
  publicKeys?: string[];
  /** Whether a signature of 64 bytes is by a key of 32, where WebCrypto has no Ed25519. In a worker, of `serve`. */
  verify?: (signed: { publicKey: Uint8Array; message: Uint8Array; signature: Uint8Array }) => boolean | Promise<boolean>;
  /** Ends loading: the promise is rejected with its reason at once, requests are cancelled, and sessions are freed. */
  signal?: AbortSignal | null;
}

export interface TranscribeOptions extends StreamOptions {
  /** Ends recognition: the promise is rejected with its reason at once, and nothing more is computed. */
  signal?: AbortSignal | null;
}

/** Where files of a bundle come from, if not from a URL. */
export interface BundleReader {
  /** The signal is that of `LoadOptions`. */
  read(name: string, options: { signal?: AbortSignal }): Promise<Uint8Array>;
}

/** Recognises speech with the model of a bundle. Any number of streams share it. */
export class Recognizer {
  private constructor();
  /** Load the bundle in the folder at a URL, or in a reader; every file is compared with its sha256 in the manifest. */
  static fromBundle(source: string | URL | BundleReader, options: LoadOptions): Promise<Recognizer>;
  /** The model's sample rate in Hz. Streams take any. */
  readonly sampleRate: number;
  createStream(options?: StreamOptions): Stream;
  /** An ARPA file or a compact one of `u2moe lm build`, for streams of this recogniser. */
  languageModel(content: Uint8Array | ArrayBuffer, options?: LanguageModelOptions): LanguageModel;
  /** Final results of samples at a rate (default: the model's), as a stream gives them. */
  transcribe(samples: Float32Array | Int16Array, sampleRate?: number, options?: TranscribeOptions): Promise<Result[]>;
  /** Recognise a second of noise, so that the first audio takes no longer than later audio. */
  warmUp(options?: { signal?: AbortSignal | null }): Promise<void>;
  /** Free the memory of the model, once the graphs that are running have ended. */
  release(): Promise<void>;
}

/** Changes the sample rate of one channel, incrementally: any split gives the same samples. */
export class Resampler {
  private constructor();
  /** Rejected with an AudioError for a rate beyond 1000 to 384000 Hz. */
  static create(sourceRate: number, targetRate: number): Promise<Resampler>;
  accept(samples: Float32Array): Float32Array;
  finish(): Float32Array;
  /** Frees its memory at once; otherwise that happens when it is collected. */
  free(): void;
}
