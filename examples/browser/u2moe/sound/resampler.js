/** Changes the sample rate of one channel, incrementally: any split gives the same samples. */

import { FloatQueue } from './floats.js';

const LOWEST_RATE = 1000;
const HIGHEST_RATE = 384000;
/** Zero crossings of the sinc on either side: 90 dB of attenuation beyond a transition of a tenth of the band. */
const NUM_CROSSINGS = 32;
const ROLL_OFF = 0.945;
const KAISER_BETA = 9;
const MOST_PHASES = 2048;

/** A windowed sinc at the times of the new samples; n samples become round(n * targetRate / sourceRate). */
export class Resampler {
  #kept = new FloatQueue(); // samples that new ones need, from index #start on
  #start;
  #numReceived = 0;
  #numReturned = 0;
  #phases = new Map();

  constructor(sourceRate, targetRate) {
    if (!(sourceRate >= LOWEST_RATE && sourceRate <= HIGHEST_RATE)) {
      throw new RangeError(`sample rate must be between ${LOWEST_RATE} and ${HIGHEST_RATE} Hz, got ${sourceRate}`);
    }
    this.sourceRate = sourceRate;
    this.targetRate = targetRate;
    const scale = Math.min(1, targetRate / sourceRate) * ROLL_OFF;
    this.cutoff = scale;
    this.reach = Math.ceil(NUM_CROSSINGS / scale);
    this.#kept.append(new Float32Array(this.reach)); // silence before the first sample
    this.#start = -this.reach;
  }

  /** The next samples at the target rate; some are held back for the filter. */
  accept(samples) {
    if (this.sourceRate === this.targetRate) return samples;
    this.#numReceived += samples.length;
    return this.#take(samples, Math.floor(((this.#numReceived - this.reach) * this.targetRate) / this.sourceRate));
  }

  /** The samples that were held back. */
  finish() {
    if (this.sourceRate === this.targetRate) return new Float32Array(0);
    const total = Math.round((this.#numReceived * this.targetRate) / this.sourceRate);
    return this.#take(new Float32Array(2 * this.reach), total);
  }

  /** The next of the first `total` new samples. */
  #take(samples, total) {
    this.#kept.append(samples);
    const all = this.#kept.view(), num = Math.max(total - this.#numReturned, 0);
    const taken = new Float32Array(num);
    for (let index = 0; index < num; index += 1) {
      const place = (this.#numReturned + index) * this.sourceRate;
      const whole = Math.floor(place / this.targetRate);
      const filter = this.#filter(place - whole * this.targetRate);
      const first = whole - this.reach + 1 - this.#start;
      let sum = 0;
      for (let tap = 0; tap < filter.length; tap += 1) sum += filter[tap] * all[first + tap];
      taken[index] = sum;
    }
    this.#numReturned += num;
    const next = Math.floor((this.#numReturned * this.sourceRate) / this.targetRate) - this.reach + 1;
    const used = Math.min(Math.max(next - this.#start, 0), all.length);
    this.#kept.forget(used);
    this.#start += used;
    return taken;
  }

  /** The filter for a new sample `phase / targetRate` source samples after an old one. */
  #filter(phase) {
    let filter = this.#phases.get(phase);
    if (filter) return filter;
    filter = new Float64Array(2 * this.reach);
    for (let tap = 0; tap < filter.length; tap += 1) {
      const distance = tap - this.reach + 1 - phase / this.targetRate;
      const share = distance / this.reach;
      const angle = Math.PI * distance * this.cutoff;
      const sinc = angle === 0 ? 1 : Math.sin(angle) / angle;
      const window = Math.abs(share) >= 1 ? 0 : bessel(KAISER_BETA * Math.sqrt(1 - share * share)) / bessel(KAISER_BETA);
      filter[tap] = this.cutoff * sinc * window;
    }
    if (this.#phases.size >= MOST_PHASES) this.#phases.clear();
    this.#phases.set(phase, filter);
    return filter;
  }
}

/** The modified Bessel function of the first kind, order 0. */
function bessel(x) {
  let total = 1, term = 1;
  for (let k = 1; term > 1e-12 * total; k += 1) {
    term *= (x / (2 * k)) ** 2;
    total += term;
  }
  return total;
}
