/** Voice activity detection with silero VAD 5 or 6, which the user provides. */

import { checkNames } from './core.js';
import { VAD_OPTIONS } from './declared.js';
import { BundleError, InferenceError } from './errors.js';

const CONTEXT_LEN = 64; // samples before a window that are also input
const RATE = 16000;

export class Vad {
  #ort;
  #session;
  #states;

  /** @param content the graph. @param options {threshold, endThreshold, minSilence, padding}, `ort` and `sessionOptions`. */
  static async open(content, { ort, sessionOptions = {}, ...options }) {
    checkNames(options, VAD_OPTIONS);
    const vad = new Vad();
    vad.options = options;
    vad.#ort = ort;
    try {
      vad.#session = await ort.InferenceSession.create(content, sessionOptions);
      const states = vad.#session.inputMetadata.filter(({ name }) => name !== 'input' && name !== 'sr');
      vad.#states = states.map(({ name, shape }) => ({ name, dims: shape.map((size) => (size > 0 ? size : 1)) }));
      await vad.probability(new Float32Array(512), vad.start());
    } catch (error) {
      throw new BundleError(`this is not silero VAD 5 or 6: ${error?.message ?? error}`, { cause: error });
    }
    return vad;
  }

  /** What it keeps of the samples before a window. */
  start() {
    const states = this.#states.map(({ dims }) => new Float32Array(dims.reduce((total, size) => total * size, 1)));
    return { context: new Float32Array(CONTEXT_LEN), states };
  }

  /** The probability that a window is speech. */
  async probability(window, past) {
    const row = new Float32Array(CONTEXT_LEN + window.length), { Tensor } = this.#ort;
    row.set(past.context);
    row.set(window, CONTEXT_LEN);
    const feeds = { input: new Tensor('float32', row, [1, row.length]) };
    if (this.#session.inputNames.includes('sr')) feeds.sr = new Tensor('int64', BigInt64Array.of(BigInt(RATE)), []);
    this.#states.forEach(({ name, dims }, index) => { feeds[name] = new Tensor('float32', past.states[index], dims); });
    let found;
    try {
      found = await this.#session.run(feeds);
    } catch (error) {
      throw new InferenceError(`voice activity detection: onnxruntime fails: ${error?.message ?? error}`, { cause: error });
    }
    const [probability, ...states] = this.#session.outputNames.map((name) => found[name].data);
    past.states = states;
    past.context = row.slice(-CONTEXT_LEN);
    return probability[0];
  }

  release() {
    return this.#session.release();
  }
}
