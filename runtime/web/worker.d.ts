/** The recogniser in a worker. */

import type { LanguageModel, LanguageModelOptions, LoadOptions, Result, Stream, StreamOptions, TranscribeOptions } from './index.js';

/** In the worker: answers the `Recognizer` of the page. */
export function serve(defaults: Pick<LoadOptions, 'ort' | 'sessionOptions' | 'wasm' | 'cache'>): void;

export interface WorkerOptions extends Omit<LoadOptions, 'ort'> {
  /** Whose script calls `serve`. */
  worker: Worker;
}

/** As that of 'u2moe'. A wrong option of a stream is an event 'error' of the stream, and rejects its promises. */
export class Recognizer {
  private constructor();
  static fromBundle(source: string | URL, options: WorkerOptions): Promise<Recognizer>;
  readonly sampleRate: number;
  createStream(options?: StreamOptions): Stream;
  languageModel(content: Uint8Array | ArrayBuffer, options?: LanguageModelOptions): LanguageModel;
  transcribe(samples: Float32Array | Int16Array, sampleRate?: number, options?: TranscribeOptions): Promise<Result[]>;
  warmUp(options?: { signal?: AbortSignal | null }): Promise<void>;
  /** Frees the model, and ends the worker. */
  release(): Promise<void>;
}
