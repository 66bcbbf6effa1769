/** From samples to the overlapping windows of features that chunks are computed from, for any split of the samples. */

import { FloatQueue } from './sound/floats.js';

/**
 * Windows begin every `chunkSize * subsampling` frames; the last may be shorter. Features are computed for the frames that
 * each window adds, so that how the samples arrived makes no difference, not even in the last bit.
 */
export class Windows {
  #samples = new FloatQueue(); // from #firstSample on
  #firstSample = 0;
  #features = new FloatQueue(); // from #firstFrame on
  #firstFrame = 0;
  #numComputed = 0;
  #numTaken = 0;
  #finished = false;

  /** @param computeFeatures from samples to features [frames, size] of their whole frames. */
  constructor({ model, features }, chunkSize, computeFeatures) {
    this.featureSize = model.feature_size;
    this.frameLen = Math.floor((features.sample_rate * features.frame_length_ms) / 1000);
    this.shiftLen = Math.floor((features.sample_rate * features.frame_shift_ms) / 1000);
    this.shortest = model.right_context + 1;
    this.stride = chunkSize * model.subsampling_rate;
    this.length = this.stride - model.subsampling_rate / (model.frame_reduction ?? 1) + this.shortest;
    this.computeFeatures = computeFeatures;
  }

  accept(samples) {
    this.#samples.append(samples);
  }

  finish() {
    this.#finished = true;
  }

  get #numFrames() {
    const num = this.#firstSample + this.#samples.length;
    return num < this.frameLen ? 0 : 1 + Math.floor((num - this.frameLen) / this.shiftLen);
  }

  /** Whether `take` would return a window. */
  get ready() {
    return this.#numFrames - this.#numTaken * this.stride >= (this.#finished ? this.shortest : this.length);
  }

  /** The next window [frames, size] and the features that it adds, {window, added}. */
  async take() {
    const begin = this.#numTaken * this.stride;
    const end = Math.min(begin + this.length, this.#numFrames);
    const added = await this.#extend(Math.max(end, this.#numComputed));
    const window = this.#features.slice((begin - this.#firstFrame) * this.featureSize, (end - this.#firstFrame) * this.featureSize);
    this.#numTaken += 1;
    const next = Math.min(begin + this.stride, this.#numComputed);
    this.#features.forget((next - this.#firstFrame) * this.featureSize);
    this.#firstFrame = next;
    return { window, added };
  }

  async #extend(end) {
    const first = this.#numComputed * this.shiftLen - this.#firstSample;
    const last = (end - 1) * this.shiftLen + this.frameLen - this.#firstSample;
    const added = end > this.#numComputed ? await this.computeFeatures(this.#samples.slice(first, last)) : new Float32Array(0);
    this.#features.append(added);
    this.#numComputed = end;
    const used = Math.min(end * this.shiftLen - this.#firstSample, this.#samples.length);
    this.#samples.forget(used);
    this.#firstSample += used;
    return added;
  }
}
