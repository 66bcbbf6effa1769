/** The graphs of a bundle as functions on typed arrays. Holds no state of streams. */

import { graphFiles } from './bundle.js';
import { BundleError, InferenceError, StreamError, U2moeError } from './errors.js';

/**
 * Not parallel: there is one thread. But onnxruntime then plans no reuse of buffers, and its search for buffers to reuse
 * takes ten times as long as all the rest of creating the encoder's session.
 */
const WEB_ASSEMBLY = { executionProviders: ['wasm'], executionMode: 'parallel' };

/** Attention takes memory for each pair of a token and a frame: long utterances are scored in several calls. */
const MOST_PAIRS = 2 ** 22;

/** One session of onnxruntime-web or onnxruntime-node. Its errors say which file and what it was given. */
export class Graph {
  #ort;
  #file;
  #session;
  #running = new Set();

  constructor(ort, file, session) {
    this.#ort = ort;
    this.#file = file;
    this.#session = session;
  }

  /** The tensors that the graph gives for inputs {type, data, dims}; those in `outputs` are there. */
  async run(inputs, outputs) {
    if (!this.#session) throw new StreamError('the recogniser of this stream is released');
    let running, found;
    try {
      const feeds = Object.entries(inputs).map(([name, { type, data, dims }]) => [name, new this.#ort.Tensor(type, data, dims)]);
      running = this.#session.run(Object.fromEntries(feeds));
      this.#running.add(running);
      found = await running;
    } catch (error) {
      const given = Object.entries(inputs).map(([name, { type, dims }]) => `${name} ${type} [${dims.join(', ')}]`);
      throw this.error(`onnxruntime fails for ${given.join(', ')}: ${error?.message ?? error}`, error);
    } finally {
      this.#running.delete(running);
    }
    const missing = outputs.find((name) => !found[name]);
    if (missing) throw this.error(`gives ${Object.keys(found).join(', ')}, expected ${missing}`);
    return found;
  }

  error(message, cause) {
    return new InferenceError(`${this.#file}: ${message}`, cause === undefined ? {} : { cause });
  }

  /** Once what runs has ended: onnxruntime would go on with memory that is no longer its own. */
  async release() {
    const session = this.#session;
    this.#session = null;
    await Promise.allSettled(this.#running);
    await session?.release();
  }
}

/** The graphs of a bundle, shared by all streams. */
export class Graphs {
  #graphs;
  #model;

  constructor(graphs, model) {
    this.#graphs = graphs;
    this.#model = model;
  }

  /**
   * Create the sessions of the graphs in `files`, a map from names to promises of contents, one after another: onnxruntime starts
   * with the smallest while the others are still on their way. None is left when one fails or the signal is aborted.
   */
  static async create(ort, files, manifest, { sessionOptions = {}, signal } = {}) {
    const graphs = {};
    try {
      for (const [name, file] of graphFiles(manifest)) {
        signal?.throwIfAborted();
        graphs[name] = await Graphs.#open(ort, files, file, sessionOptions);
      }
    } catch (error) {
      await Promise.allSettled(Object.values(graphs).map((graph) => graph.release()));
      throw error;
    }
    return new Graphs(graphs, manifest.model);
  }

  static async #open(ort, files, file, sessionOptions) {
    const options = {
      ...(!sessionOptions.executionProviders && WEB_ASSEMBLY),
      graphOptimizationLevel: file.endsWith('.ort') ? 'disabled' : 'all',
      enableMemPattern: false, // it remembers each combination of sizes, and chunks, utterances and n-best lists have many
      ...sessionOptions,
    };
    const weights = await files.get(`${file}.data`);
    if (weights) options.externalData = [{ path: `${file}.data`, data: weights }];
    const content = await files.get(file);
    files.delete(file);
    try {
      return new Graph(ort, file, await ort.InferenceSession.create(content, options));
    } catch (error) {
      throw refusal(file, error);
    }
  }

  /** Frees all sessions, also where one fails. */
  async release() {
    const released = await Promise.allSettled(Object.values(this.#graphs).map((graph) => graph.release()));
    const failed = released.find(({ status }) => status === 'rejected');
    if (failed) throw new U2moeError(`onnxruntime does not release a graph: ${failed.reason?.message}`, { cause: failed.reason });
  }

  /** Features [frames, mel] of samples. */
  async features(samples) {
    const { features } = await this.#graphs.features.run({ samples: float(samples, [1, samples.length]) }, ['features']);
    return features.data;
  }

  /** Caches of a stream before its first chunk: {offset, tensors}, of which the manifest lists the tensors. */
  start() {
    const zeros = (dims) => float(new Float32Array(product(dims)), dims);
    return { offset: 0, tensors: this.#model.caches.map(({ num_blocks: blocks, shape }) => zeros([blocks, 1, ...shape])) };
  }

  /** Encode one chunk: encoder output [time, dim], and the caches for the next chunk. */
  async encode(window, caches, required) {
    const { feature_size: width, caches: layout, streaming } = this.#model, numFrames = window.length / width;
    const feeds = { chunk: float(window, [1, numFrames, width]), chunk_lens: int([numFrames], [1]) };
    if (streaming) Object.assign(feeds, { offset: int([caches.offset], [1]), required_cache_size: int([required], []) });
    layout.forEach(({ name }, index) => { feeds[name] = caches.tensors[index]; });
    const results = layout.map(({ name }) => `r_${name}`);
    const found = await this.#graphs.encoder.run(feeds, ['output', ...(streaming ? ['next_offset'] : []), ...results]);
    const tensors = results.map((name) => float(found[name].data, found[name].dims));
    return { output: found.output.data, caches: { offset: Number(found.next_offset?.data[0] ?? 0), tensors } };
  }

  /** The caches of a stream that begins anew with its last `numFrames` encoder frames. */
  lastOf(caches, numFrames) {
    const tensors = this.#model.caches.map(({ shape, rate }, index) => {
      const { data, dims } = caches.tensors[index], axis = 2 + shape.indexOf(0);
      if (axis < 2 || dims[axis] <= Math.ceil(numFrames * rate)) return caches.tensors[index];
      const length = Math.ceil(numFrames * rate), width = product(dims.slice(axis + 1)), rows = product(dims.slice(0, axis));
      const last = new Float32Array(rows * length * width);
      for (let row = 0; row < rows; row += 1) {
        const end = (row + 1) * dims[axis] * width;
        last.set(data.subarray(end - length * width, end), row * length * width);
      }
      return float(last, dims.map((size, place) => (place === axis ? length : size)));
    });
    return { offset: numFrames, tensors };
  }

  /** Log-probabilities [time, vocab] of encoder output [time, dim]. */
  async ctc(encoderOut) {
    const dim = this.#model.output_size;
    const feeds = { encoder_out: float(encoderOut, [1, encoderOut.length / dim, dim]) };
    const found = await this.#graphs.ctc.run(feeds, ['log_probs']);
    return withNumbers(this.#graphs.ctc, found.log_probs.data);
  }

  /** Scores, rows, width, number of decoders: of hypotheses [rows, longest] by each decoder [rows, width], and of next tokens [rows, vocab]. */
  async score(encoderOut, hyps, lens) {
    const { output_size: dim } = this.#model, numFrames = encoderOut.length / dim, longest = hyps.length / lens.length;
    const encoded = float(encoderOut, [1, numFrames, dim]), given = { score: [], r_score: [], next_log_probs: [] };
    const numRows = Math.max(1, Math.floor(MOST_PAIRS / (longest * Math.max(numFrames, longest))));
    for (let begin = 0; begin < lens.length; begin += numRows) {
      const part = lens.subarray(begin, begin + numRows), num = part.length;
      const found = await this.#graphs.decoder.run({
        hyps: { type: 'int64', data: hyps.subarray(begin * longest, (begin + num) * longest), dims: [1, num, longest] },
        hyps_lens: { type: 'int64', data: part, dims: [1, num] },
        encoder_out: encoded,
        encoder_lens: int([numFrames], [1]),
      }, ['score']);
      for (const [name, parts] of Object.entries(given)) if (found[name]) parts.push(withNumbers(this.#graphs.decoder, found[name].data));
    }
    const scores = Float32Array.from(Object.values(given).flat().flatMap((part) => [...part]));
    return [scores, lens.length, longest + 1, given.r_score.length ? 2 : 1];
  }
}

export const product = (numbers) => numbers.reduce((total, number) => total * number, 1);
export const float = (data, dims) => ({ type: 'float32', data, dims });
export const int = (values, dims) => ({ type: 'int64', data: BigInt64Array.from(values, BigInt), dims });

function withNumbers(graph, values) {
  if (values.some(Number.isNaN)) throw graph.error('gives values that are no numbers: its weights are damaged');
  return values;
}

function refusal(file, cause) {
  const message = String(cause?.message ?? cause);
  if (/SIMD/.test(message)) return new U2moeError('WebAssembly with SIMD is missing: browsers since 2023 have it, Node since 16.4', { cause });
  if (/no available backend/.test(message)) return new U2moeError(`onnxruntime does not start: ${message}`, { cause });
  return new BundleError(`${file}: onnxruntime refuses it: ${message}`, { cause });
}
