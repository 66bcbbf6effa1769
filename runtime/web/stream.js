/** The public interface of one source of audio: samples in, events out. The work is done in `source.js`. */

import { AudioError } from './errors.js';
import { Source } from './source.js';

const LOUDEST = 8;

/**
 * A stream of audio. Listen to its events: `partial` and `final`, whose `detail` is a result, and `error`, whose `detail` is
 * the error by which recognition has failed. Created by `Recognizer.createStream`.
 */
export class Stream extends EventTarget {
  #settings;
  #source;
  #work = Promise.resolve();

  /** @param settings {graphs, manifest, vocabulary, options, context} of each `Source`. */
  constructor(settings) {
    super();
    this.#settings = settings;
    this.#source = this.#newSource();
  }

  /**
   * Append samples of one channel, Float32Array in [-1, 1] or Int16Array, any length, at a rate that stays the same. They are
   * recognised in the background; wait for the promise in order not to read a file faster than it can be recognised.
   */
  acceptWaveform(sampleRate, samples) {
    this.#source.accept(sampleRate, asFloats(samples));
    return this.#decodeSoon();
  }

  /** Finish the input. The promise is fulfilled when the last result has been found. */
  inputFinished() {
    this.#source.finish();
    return this.#decodeSoon();
  }

  /**
   * Discard everything, also a failure: the next samples start a new source at time zero. No event of the old one follows, and
   * promises that wait for it are fulfilled; the graph that is running ends first.
   */
  reset() {
    this.#source.discard();
    this.#source = this.#newSource();
  }

  /** The partial result of the current utterance. */
  get result() {
    return this.#source.result;
  }

  #newSource() {
    return new Source(this.#settings, (type, detail) => this.dispatchEvent(new CustomEvent(type, { detail })));
  }

  #decodeSoon() {
    const source = this.#source, decode = () => source.decode();
    this.#work = this.#work.then(decode, decode); // a source that has failed fails again, another does not
    this.#work.catch(() => {}); // it is an event, too: nobody has to wait for the promise
    return this.#work;
  }
}

function asFloats(samples) {
  if (samples instanceof Int16Array) {
    const floats = new Float32Array(samples.length); // `from` would make an object of each sample
    for (let index = 0; index < samples.length; index += 1) floats[index] = samples[index] / 32768;
    return floats;
  }
  if (!(samples instanceof Float32Array)) throw new AudioError('samples must be a Float32Array in [-1, 1] or an Int16Array');
  for (const sample of samples) {
    if (!(Math.abs(sample) <= LOUDEST)) throw new AudioError(`samples hold ${sample}, expected floats in [-1, 1]`);
  }
  return samples;
}
