/** Silence around sources that begin or end in the middle of a sound; see runtime/audio/padding.py. */

import { concatenated } from './floats.js';

/** A feature frame is a sound if its samples span more than this. */
const SOUND = 1 / 256;

/** Adds silence before and after one source; any split of its samples gives the same. */
export class Padding {
  #silence;
  #frameLen;
  #hasBegun = false;
  #edge = new Float32Array(0); // all samples until it has begun, then the last ones

  constructor(paddingS, { sample_rate: rate, frame_length_ms: lengthMs }) {
    this.numBefore = 0;
    this.#silence = new Float32Array(Math.round(paddingS * rate));
    this.#frameLen = Math.floor((rate * lengthMs) / 1000);
  }

  /** Takes samples and returns those to recognise: none until they fill a feature frame. */
  accept(samples) {
    if (!this.#silence.length) return samples;
    this.#edge = concatenated(this.#edge, this.#hasBegun ? samples.subarray(-this.#frameLen) : samples);
    if (!this.#hasBegun && this.#edge.length >= this.#frameLen) return this.#begin();
    this.#edge = this.#edge.slice(-this.#frameLen); // a copy: programs fill their arrays again
    return this.#hasBegun ? samples : new Float32Array(0);
  }

  /** Ends the source and returns the last samples to recognise. */
  finish() {
    const rest = this.#hasBegun ? new Float32Array(0) : this.#begin();
    return isSound(this.#edge) ? concatenated(rest, this.#silence) : rest;
  }

  #begin() {
    this.#hasBegun = true;
    const samples = this.#edge;
    this.#edge = samples.slice(-this.#frameLen);
    if (!isSound(samples.subarray(0, this.#frameLen))) return samples;
    this.numBefore = this.#silence.length;
    return concatenated(this.#silence, samples);
  }
}

function isSound(samples) {
  let least = Infinity, most = -Infinity;
  for (const sample of samples) {
    least = Math.min(least, sample);
    most = Math.max(most, sample);
  }
  return most - least > SOUND;
}
