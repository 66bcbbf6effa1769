/** From samples to the overlapping windows of features that chunks are computed from, for any split of the samples. */

/**
 * Windows begin every `chunkSize * subsampling` frames; the last may be shorter. Features are computed for the frames that
 * each window adds, so that how the samples arrived makes no difference, not even in the last bit.
 */
export class Windows {
  #samples = new Float32Array(0);
  #firstSample = 0;
  #features = new Float32Array(0);
  #firstFrame = 0;
  #numComputed = 0;
  #numTaken = 0;
  #finished = false;

  /** @param computeFeatures from samples to features [frames, mel] of their whole frames. */
  constructor({ model, features }, chunkSize, computeFeatures) {
    this.numBins = features.num_mel_bins;
    this.frameLen = Math.floor((features.sample_rate * features.frame_length_ms) / 1000);
    this.shiftLen = Math.floor((features.sample_rate * features.frame_shift_ms) / 1000);
    this.shortest = model.right_context + 1;
    this.stride = chunkSize * model.subsampling_rate;
    this.length = this.stride - model.subsampling_rate + this.shortest;
    this.computeFeatures = computeFeatures;
  }

  accept(samples) {
    this.#samples = concatenated(this.#samples, samples);
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

  /** The next window [frames, mel] and the features that it adds, {window, added}. */
  async take() {
    const begin = this.#numTaken * this.stride;
    const end = Math.min(begin + this.length, this.#numFrames);
    const added = await this.#extend(Math.max(end, this.#numComputed));
    const window = this.#features.slice((begin - this.#firstFrame) * this.numBins, (end - this.#firstFrame) * this.numBins);
    this.#numTaken += 1;
    const next = Math.min(begin + this.stride, this.#numComputed);
    this.#features = this.#features.slice((next - this.#firstFrame) * this.numBins);
    this.#firstFrame = next;
    return { window, added };
  }

  async #extend(end) {
    const first = this.#numComputed * this.shiftLen - this.#firstSample;
    const last = (end - 1) * this.shiftLen + this.frameLen - this.#firstSample;
    const added = end > this.#numComputed ? await this.computeFeatures(this.#samples.slice(first, last)) : new Float32Array(0);
    this.#features = concatenated(this.#features, added);
    this.#numComputed = end;
    const kept = Math.min(end * this.shiftLen - this.#firstSample, this.#samples.length);
    this.#samples = this.#samples.slice(kept);
    this.#firstSample += kept;
    return added;
  }
}

/** Typed arrays one after the other. */
export function concatenated(...parts) {
  const filled = parts.filter((part) => part.length);
  if (filled.length === 1) return filled[0];
  const all = new Float32Array(filled.reduce((sum, part) => sum + part.length, 0));
  let place = 0;
  for (const part of filled) {
    all.set(part, place);
    place += part.length;
  }
  return all;
}
