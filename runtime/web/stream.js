/** Samples in, events out, as documented in `index.d.ts`. The work is done in `source.js`. */

import { AudioError } from './errors.js';
import { Source } from './source.js';

const LOUDEST = 8;

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

  acceptWaveform(sampleRate, samples) {
    this.#source.accept(sampleRate, asFloats(samples));
    return this.#decodeSoon();
  }

  inputFinished() {
    this.#source.finish();
    return this.#decodeSoon();
  }

  reset() {
    this.#source.discard();
    this.#source = this.#newSource();
  }

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
