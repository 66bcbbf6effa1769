/** A queue of floats, and concatenation of arrays. */

const FEWEST = 1024;

/** Appended at the end, forgotten from the front. One array holds all, so that small pieces of audio leave no garbage. */
export class FloatQueue {
  #array = new Float32Array(FEWEST);
  #begin = 0;
  #end = 0;

  get length() {
    return this.#end - this.#begin;
  }

  append(values) {
    this.#makeRoom(values.length);
    this.#array.set(values, this.#end);
    this.#end += values.length;
  }

  /** A copy from index `begin` to `end` (exclusive). */
  slice(begin, end) {
    return this.view().slice(begin, end);
  }

  /** A view of all values, valid until the next `append`. */
  view() {
    return this.#array.subarray(this.#begin, this.#end);
  }

  /** Forget the first `num`. */
  forget(num) {
    this.#begin += Math.min(num, this.length);
  }

  #makeRoom(num) {
    if (this.#end + num <= this.#array.length) return;
    const kept = this.view();
    if (2 * (kept.length + num) > this.#array.length) this.#array = new Float32Array(2 * (kept.length + num));
    this.#array.set(kept);
    this.#begin = 0;
    this.#end = kept.length;
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
