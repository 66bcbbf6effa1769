/** Checks of what programs give. */

import { AudioError, AudioOverflowError, BundleError } from './errors.js';

export const tag = (value) => Object.prototype.toString.call(value);

/** @throws AudioError it is no sample rate. */
export function checkRate(rate) {
  if (Number.isInteger(rate) && rate >= 1000 && rate <= 384000) return;
  const shown = typeof rate === 'string' ? `'${rate}'` : typeof rate === 'number' ? rate : tag(rate);
  throw new AudioError(`sample rate must be a whole number between 1000 and 384000 Hz, got ${shown}`);
}

/**
 * Samples in [-1, 1].
 *
 * @throws AudioError these are no samples.
 */
export function floats(samples) {
  if (samples instanceof Float32Array) return samples;
  if (!(samples instanceof Int16Array)) throw new AudioError(`samples must be a Float32Array in [-1, 1] or an Int16Array, got ${tag(samples)}`);
  const found = new Float32Array(samples.length); // `from` would make an object of each sample
  for (let index = 0; index < samples.length; index += 1) found[index] = samples[index] / 32768;
  return found;
}

/** The bytes of a file that a program has read. */
export function bytesOf(content, name, Kind = BundleError) {
  if (ArrayBuffer.isView(content)) return new Uint8Array(content.buffer, content.byteOffset, content.byteLength);
  if (tag(content) === '[object ArrayBuffer]') return new Uint8Array(content);
  throw new Kind(`${name} must be a Uint8Array or an ArrayBuffer, got ${tag(content)}`);
}

/** @throws TypeError it is not onnxruntime. */
export function checkRuntime(ort) {
  if (!ort?.InferenceSession) throw new TypeError("ort must be the module 'onnxruntime-web' or 'onnxruntime-node'");
}

/** @throws RangeError a program gave something else for a language model. */
export function refuseModel(model) {
  throw new RangeError(`languageModel must be what languageModel() of this recogniser returned, got ${tag(model)}`);
}

/** Counts the audio of a stream that is not recognised yet. */
export class Queue {
  #maxS;
  #waiting = { num: 0 }; // samples

  /** @param maxS seconds that may wait; undefined or null: any number. */
  constructor(maxS = null) {
    if (maxS !== null && !(typeof maxS === 'number' && maxS > 0)) throw new RangeError(`maxQueueS must be a number above 0, or null, got ${String(maxS)}`);
    this.#maxS = maxS;
  }

  /** Samples wait until what `start` gives a promise of. @throws AudioOverflowError more would wait than may: nothing is started. */
  hold(sampleRate, { length }, start) {
    const waiting = this.#waiting, shown = (num) => `${(num / sampleRate).toFixed(2)} s`;
    if (this.#maxS !== null && (waiting.num + length) / sampleRate > this.#maxS) {
      throw new AudioOverflowError(`${shown(waiting.num)} of audio are waiting to be recognised: ${shown(length)} more would be above the limit of ${this.#maxS} s`);
    }
    const work = start(), leave = () => { waiting.num -= length; };
    waiting.num += length;
    work.then(leave, leave);
    return work;
  }

  clear() {
    this.#waiting = { num: 0 };
  }
}
