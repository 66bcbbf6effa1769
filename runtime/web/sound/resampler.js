/**
 * Changes the sample rate of one channel, incrementally: any split gives the same samples.
 *
 * To the last bit those of the Python runtime for systems without soxr (runtime/audio/resampling.py): numbers are rounded to single
 * precision where numpy rounds them, and added in its order. Otherwise the noise of rounding would differ in bands that are
 * empty, as above the old rate's half, where features are logarithms of nothing else.
 */

import { FloatQueue } from './floats.js';

const LOWEST_RATE = 1000;
const HIGHEST_RATE = 384000;
/** Zero crossings of the sinc on either side: 90 dB of attenuation beyond a transition of a tenth of the band. */
const NUM_CROSSINGS = 32;
const ROLL_OFF = 0.945;
const KAISER_BETA = 9;
const MOST_PHASES = 2048;
const LONGEST_RUN = 128; // products that numpy adds without halving them first

const { fround } = Math;

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
      taken[index] = sumOfProducts(all, first, filter, 0, filter.length);
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
    filter = new Float32Array(2 * this.reach);
    for (let tap = 0; tap < filter.length; tap += 1) {
      const distance = tap - this.reach + 1 - phase / this.targetRate;
      const share = distance / this.reach; // in [-1, 1]
      const angle = Math.PI * (this.cutoff * distance);
      const sinc = angle === 0 ? 1 : Math.sin(angle) / angle;
      const window = bessel(KAISER_BETA * Math.sqrt(1 - share * share)) / bessel(KAISER_BETA);
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
  for (let k = 1; term > 1e-18 * total; k += 1) {
    term *= (x / (2 * k)) ** 2;
    total += term;
  }
  return total;
}

/** Of `num` samples and factors, in numpy's order: pairwise, from eight sums side by side. `num` is even, and at least 64. */
function sumOfProducts(samples, start, factors, begin, num) {
  if (num > LONGEST_RUN) {
    const half = num / 2 - ((num / 2) % 8);
    const rest = sumOfProducts(samples, start + half, factors, begin + half, num - half);
    return fround(sumOfProducts(samples, start, factors, begin, half) + rest);
  }
  // Names rather than an array: they stay in registers.
  let s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0;
  const whole = num - (num % 8);
  for (let tap = 0; tap < whole; tap += 8) {
    const x = start + tap, f = begin + tap;
    s0 = fround(s0 + fround(samples[x] * factors[f]));
    s1 = fround(s1 + fround(samples[x + 1] * factors[f + 1]));
    s2 = fround(s2 + fround(samples[x + 2] * factors[f + 2]));
    s3 = fround(s3 + fround(samples[x + 3] * factors[f + 3]));
    s4 = fround(s4 + fround(samples[x + 4] * factors[f + 4]));
    s5 = fround(s5 + fround(samples[x + 5] * factors[f + 5]));
    s6 = fround(s6 + fround(samples[x + 6] * factors[f + 6]));
    s7 = fround(s7 + fround(samples[x + 7] * factors[f + 7]));
  }
  const left = fround(fround(s0 + s1) + fround(s2 + s3)), right = fround(fround(s4 + s5) + fround(s6 + s7));
  let sum = fround(left + right);
  for (let tap = whole; tap < num; tap += 1) sum = fround(sum + fround(samples[start + tap] * factors[begin + tap]));
  return sum;
}
