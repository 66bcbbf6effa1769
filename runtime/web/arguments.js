/** Argument checks and abort signals. */

import { AudioError, BundleError } from './errors.js';

export const tag = (value) => Object.prototype.toString.call(value);

/** @throws AudioError the sample rate is not a whole number between 1000 and 384000 Hz. */
export function checkRate(rate) {
  if (Number.isInteger(rate) && rate >= 1000 && rate <= 384000) return;
  const shown = typeof rate === 'string' ? `'${rate}'` : typeof rate === 'number' ? rate : tag(rate);
  throw new AudioError(`sample rate must be a whole number between 1000 and 384000 Hz, got ${shown}`);
}

/**
 * Convert samples to a Float32Array in [-1, 1].
 *
 * @throws AudioError `samples` is neither a Float32Array nor an Int16Array.
 */
export function floats(samples) {
  const kind = tag(samples); // not `instanceof`: an array of a frame has other classes
  if (kind === '[object Float32Array]') return samples.subarray(); // throws a TypeError if its memory was transferred
  if (kind !== '[object Int16Array]') throw new AudioError(`samples must be a Float32Array in [-1, 1] or an Int16Array, got ${kind}`);
  return new Float32Array(samples.subarray()).map((sample) => sample / 32768); // `from` would allocate an object for each sample
}

/** Return the content of a file as a Uint8Array. `name` describes the content in messages. */
export function bytesOf(content, name, Kind = BundleError) {
  if (ArrayBuffer.isView(content)) return new Uint8Array(content.buffer, content.byteOffset, content.byteLength);
  if (tag(content) === '[object ArrayBuffer]') return new Uint8Array(content);
  throw new Kind(`${name} must be a Uint8Array or an ArrayBuffer, got ${tag(content)}`);
}

/** @throws TypeError `ort` is not an onnxruntime module. */
export function checkRuntime(ort) {
  if (!ort?.InferenceSession) throw new TypeError("ort must be the module 'onnxruntime-web' or 'onnxruntime-node'");
}

/** Refuse `model`, which does not come from this recogniser's `languageModel`. @throws RangeError always. */
export function refuseModel(model) {
  throw new RangeError(`languageModel must come from languageModel() of this recogniser, got ${tag(model)}`);
}

/**
 * Await `start()`, but reject with the signal's reason as soon as the signal is aborted. The work itself may continue, since
 * onnxruntime cannot be interrupted.
 *
 * @param signal AbortSignal of the caller, undefined or null. If it is already aborted, `start` is not called.
 * @param cancel called once, with the promise of `start()`, if the signal is aborted before the work ends.
 */
export async function untilAborted(signal, start, cancel) {
  if (signal === undefined || signal === null) return start();
  if (typeof signal.throwIfAborted !== 'function') throw new TypeError(`signal must be an AbortSignal, got ${signal}`);
  signal.throwIfAborted();
  const work = start();
  return new Promise((resolve, reject) => {
    const abort = () => { reject(signal.reason); cancel(work); };
    signal.addEventListener('abort', abort, { once: true });
    work.finally(() => signal.removeEventListener('abort', abort)).then(resolve, reject); // a signal may outlive many calls
  });
}
