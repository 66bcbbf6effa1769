/** Voice activity detection with silero VAD 5 or 6. The caller provides the graph. */

import { checkRuntime } from './arguments.js';
import { checkNames } from './core.js';
import { VAD_OPTIONS } from './declared.js';
import { BundleError } from './errors.js';
import { Graph, float, int, product } from './graphs.js';

const CONTEXT_LEN = 64; // samples before a window that are also part of the input
const RATE = 16000;
/** Layouts of silero VAD 5 and 6: the sorted names of a graph's inputs, and its number of outputs. */
const LAYOUTS = { 'input, sr, state': 2, 'input, state': 2, 'c, h, input': 3 };

export class Vad {
  #graph;
  #inputs;
  #outputs;
  #states;

  /** @param content the ONNX file. @param options {threshold, endThreshold, minSilence, padding}, `ort` and
   * `sessionOptions`. */
  static async open(content, { ort, sessionOptions = {}, ...options } = {}) {
    checkRuntime(ort);
    checkNames(options, VAD_OPTIONS);
    const vad = Object.assign(new Vad(), { options });
    try {
      const session = await ort.InferenceSession.create(content, sessionOptions), inputs = [...session.inputNames].sort().join(', ');
      vad.#graph = new Graph(ort, 'voice activity detection', session);
      vad.#inputs = session.inputNames;
      vad.#outputs = session.outputNames;
      if (LAYOUTS[inputs] !== vad.#outputs.length) throw new Error(`its inputs are ${inputs}, its outputs ${vad.#outputs.join(', ')}`);
      const states = session.inputMetadata.filter(({ name }) => name !== 'input' && name !== 'sr');
      vad.#states = states.map(({ name, shape }) => ({ name, dims: shape.map((size) => (size > 0 ? size : 1)) }));
      const past = vad.start(), lengths = past.states.map(({ length }) => length);
      const probability = await vad.probability(new Float32Array(512), past);
      if (!(probability >= 0 && probability <= 1)) throw new Error(`its probability for silence is ${probability}`);
      if (past.states.some(({ length }, index) => length !== lengths[index])) throw new Error('the sizes of its states change');
    } catch (error) {
      await vad.#graph?.release();
      throw new BundleError(`this is not silero VAD 5 or 6: ${error?.message ?? error}`, { cause: error });
    }
    return vad;
  }

  /** Return the state at the beginning: the samples before the first window, and the states of the graph. */
  start() {
    return { context: new Float32Array(CONTEXT_LEN), states: this.#states.map(({ dims }) => new Float32Array(product(dims))) };
  }

  /** Return the probability that a window is speech. Update the state `past`. */
  async probability(window, past) {
    const row = new Float32Array(CONTEXT_LEN + window.length);
    row.set(past.context);
    row.set(window, CONTEXT_LEN);
    const feeds = { input: float(row, [1, row.length]) };
    if (this.#inputs.includes('sr')) feeds.sr = int([RATE], []);
    this.#states.forEach(({ name, dims }, index) => { feeds[name] = float(past.states[index], dims); });
    const found = await this.#graph.run(feeds, {}), [probability, ...states] = this.#outputs.map((name) => found[name].data);
    if (probability.length !== 1) throw this.#graph.error(`returned ${probability.length} probabilities for a window`);
    past.states = states;
    past.context = row.slice(-CONTEXT_LEN);
    return probability[0];
  }

  release() {
    return this.#graph.release();
  }
}
