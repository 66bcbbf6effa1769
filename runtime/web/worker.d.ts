/** The recogniser in a worker. */

import type { LoadOptions, Recognizer as Local } from './index.js';

/** Answer calls from a `Recognizer` in the page or main thread. Call this function in a browser's or Node's worker. */
export function serve(defaults: Pick<LoadOptions, 'ort' | 'sessionOptions' | 'wasm' | 'cache' | 'publicKeys' | 'verify'>): void;

/** The part of a Worker of node:worker_threads that this module uses. */
export interface NodeWorker {
  on(type: string, listener: (value: any) => void): unknown;
  postMessage(message: unknown, transfer?: any): void;
  terminate(): Promise<number>;
}

export interface WorkerOptions extends Omit<LoadOptions, 'ort' | 'verify'> {
  /** A worker whose script calls `serve`. */
  worker: Worker | NodeWorker;
}

/** Same interface as in 'u2moe'. An invalid option of a stream causes an 'error' event of the stream and rejects its
 * promises. */
export interface Recognizer extends Pick<Local, 'sampleRate' | 'createStream' | 'languageModel' | 'transcribe' | 'warmUp' | 'release'> {}
export class Recognizer {
  private constructor();
  /** Load a bundle in the worker. `release` also terminates the worker. */
  static fromBundle(source: string | URL, options: WorkerOptions): Promise<Recognizer>;
}
