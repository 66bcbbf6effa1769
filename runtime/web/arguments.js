/** What programs give: checks, and signals that cancel. */

import { AudioError, BundleError } from './errors.js';

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

/**
 * What `start` gives a promise of, or the signal's reason as soon as it is aborted, since onnxruntime cannot be interrupted.
 *
 * @param signal of the program; undefined or null: there is none. If it is aborted, nothing is started.
 * @param cancel called once with the promise when the signal is aborted before the work has ended.
 */
export async function untilAborted(signal, start, cancel) {
  if (signal === undefined || signal === null) return start();
  if (typeof signal.throwIfAborted !== 'function') throw new TypeError(`signal must be an AbortSignal, got ${signal}`);
  signal.throwIfAborted();
  const work = start();
  return new Promise((resolve, reject) => {
    const abort = () => { reject(signal.reason); cancel(work); };
    signal.addEventListener('abort', abort, { once: true });
    work.finally(() => signal.removeEventListener('abort', abort)).then(resolve, reject); // it may live longer than many calls
  });
}
