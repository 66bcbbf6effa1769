/** The recogniser in a worker. */

import type { LoadOptions, Recognizer as Local } from './index.js';

/** In the worker, of a browser or of Node: answers the `Recognizer` of the page or program. */
export function serve(defaults: Pick<LoadOptions, 'ort' | 'sessionOptions' | 'wasm' | 'cache' | 'publicKeys' | 'verify'>): void;

/** What is used of a Worker of node:worker_threads. */
export interface NodeWorker {
  on(type: string, listener: (value: any) => void): unknown;
  postMessage(message: unknown, transfer?: any): void;
  terminate(): Promise<number>;
}

export interface WorkerOptions extends Omit<LoadOptions, 'ort' | 'verify'> {
  /** Whose script calls `serve`. */
  worker: Worker | NodeWorker;
}

/** As that of 'u2moe'. A wrong option of a stream is an event 'error' of the stream, and rejects its promises. */
export interface Recognizer extends Pick<Local, 'sampleRate' | 'createStream' | 'languageModel' | 'transcribe' | 'warmUp' | 'release'> {}
export class Recognizer {
  private constructor();
  /** `release` also ends the worker. */
  static fromBundle(source: string | URL, options: WorkerOptions): Promise<Recognizer>;
}
