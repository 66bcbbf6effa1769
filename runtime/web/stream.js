/** Streams, and the methods shared by all recognisers, whether in a page or in a worker. `index.d.ts` documents them. */

import { checkRate, floats, untilAborted } from './arguments.js';
import { AudioOverflowError } from './errors.js';

export class Stream extends EventTarget {
  #open;
  #source;
  #maxQueueS;
  #waiting = { num: 0 }; // number of samples of the source that are not recognised yet

  /**
   * @param open called with a function that emits events; returns a source {accept, finish, discard, result}. `discard` may
   *   return the next source.
   * @param maxQueueS maximum seconds of audio that may wait; undefined or null: no limit.
   */
  constructor(open, maxQueueS = null) {
    super();
    if (maxQueueS !== null && !(typeof maxQueueS === 'number' && maxQueueS > 0)) throw new RangeError(`maxQueueS must be a number above 0, or null, got ${String(maxQueueS)}`);
    this.#maxQueueS = maxQueueS;
    this.#open = () => open((type, detail) => this.dispatchEvent(new CustomEvent(type, { detail })));
    this.#source = this.#open();
  }

  acceptWaveform(sampleRate, samples) {
    checkRate(sampleRate);
    const all = floats(samples), waiting = this.#waiting, shown = (num) => `${(num / sampleRate).toFixed(2)} s`;
    if (this.#maxQueueS !== null && (waiting.num + all.length) / sampleRate > this.#maxQueueS) {
      throw new AudioOverflowError(`${shown(waiting.num)} of audio is waiting to be recognised: ${shown(all.length)} more would exceed the limit of ${this.#maxQueueS} s`);
    }
    const done = this.#source.accept(sampleRate, all), leave = () => { waiting.num -= all.length; };
    waiting.num += all.length;
    done.then(leave, leave); // handles rejections, since callers may ignore the promise: failures are also events
    return done;
  }

  inputFinished() {
    const done = this.#source.finish();
    done.catch(() => {});
    return done;
  }

  reset() {
    this.#waiting = { num: 0 };
    this.#source = this.#source.discard() ?? this.#open();
  }

  get result() {
    return this.#source.result;
  }
}

/** Methods that all recognisers share, written in terms of `createStream`. */
export class Streaming {
  async transcribe(samples, sampleRate = this.sampleRate, { signal, ...options } = {}) {
    checkRate(sampleRate);
    const all = floats(samples), num = all.length, segments = []; // `length` is 0 after a transfer
    let stream;
    const transcribe = async () => {
      stream = this.createStream(options);
      stream.addEventListener('final', ({ detail }) => segments.push(detail));
      for (let start = 0; start < num && !signal?.aborted; start += sampleRate) {
        await stream.acceptWaveform(sampleRate, all.subarray(start, start + sampleRate));
      }
      if (!signal?.aborted) await stream.inputFinished();
      return segments;
    };
    return untilAborted(signal, transcribe, () => stream.reset());
  }

  async warmUp({ signal } = {}) {
    const noise = Float32Array.from({ length: this.sampleRate }, () => Math.random() * 0.2 - 0.1);
    await this.transcribe(noise, this.sampleRate, { signal });
  }
}
