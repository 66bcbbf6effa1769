/** The recogniser in a worker. */

import type { LoadOptions, Recognizer as Local } from './index.js';

/** In the worker: answers the `Recognizer` of the page. */
export function serve(defaults: Pick<LoadOptions, 'ort' | 'sessionOptions' | 'wasm' | 'cache'>): void;

export interface WorkerOptions extends Omit<LoadOptions, 'ort'> {
  /** Whose script calls `serve`. */
  worker: Worker;
}

/** As that of 'u2moe'. A wrong option of a stream is an event 'error' of the stream, and rejects its promises. */
export interface Recognizer extends Pick<Local, 'sampleRate' | 'createStream' | 'languageModel' | 'transcribe' | 'warmUp' | 'release'> {}
export class Recognizer {
  private constructor();
  /** `release` also ends the worker. */
  static fromBundle(source: string | URL, options: WorkerOptions): Promise<Recognizer>;
}
