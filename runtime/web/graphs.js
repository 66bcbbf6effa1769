/** The graphs of a bundle as functions on typed arrays, without stream state. */

import { graphFiles } from './bundle.js';
import { BundleError, InferenceError, StreamError, U2moeError } from './errors.js';

/** There is only one thread: the mode 'parallel' just keeps onnxruntime from searching for reusable buffers. When the encoder's
 * session is created, that search would take ten times as long as everything else. */
const WEB_ASSEMBLY = { executionProviders: ['wasm'], executionMode: 'parallel' };

/** Maximum number of token-frame or token-token pairs per decoder call. It limits the memory that attention uses. */
const MOST_PAIRS = 2 ** 22;

/** A session of onnxruntime-web or onnxruntime-node. Errors name the file and the inputs. */
export class Graph {
  #running = new Set();

  constructor(ort, file, session) {
    Object.assign(this, { ort, file, session });
  }

  /** Run the graph on inputs {type, data, dims}. Return its output tensors by name, among them `outputs`. They have the dims of
   * `outputs`, since the core reads that many numbers; -1 stands for any size. */
  async run(inputs, outputs) {
    if (!this.session) throw new StreamError('the recogniser of this stream has been released');
    let running, found;
    try {
      const feeds = Object.entries(inputs).map(([name, { type, data, dims }]) => [name, new this.ort.Tensor(type, data, dims)]);
      running = this.session.run(Object.fromEntries(feeds));
      this.#running.add(running);
      found = await running;
    } catch (error) {
      const given = Object.entries(inputs).map(([name, { type, dims }]) => `${name} ${type} [${dims.join(', ')}]`);
      throw this.error(`onnxruntime failed on ${given.join(', ')}: ${error?.message ?? error}`, error);
    } finally {
      this.#running.delete(running);
    }
    for (const [name, dims] of Object.entries(outputs)) {
      const own = found[name]?.dims ?? [];
      if (own.length === dims.length && dims.every((size, axis) => size < 0 || size === own[axis])) continue;
      throw this.error(`output ${name} is [${own.join(', ')}], expected [${dims.join(', ')}]`);
    }
    return found;
  }

  error(message, cause) {
    return new InferenceError(`${this.file}: ${message}`, cause === undefined ? {} : { cause });
  }

  /** Release the session once pending runs have ended, because they would otherwise use freed memory. */
  async release() {
    const session = this.session;
    this.session = null;
    await Promise.allSettled(this.#running);
    await session?.release();
  }
}

/** The graphs of a bundle, shared by all streams. */
export class Graphs {
  constructor(graphs, model) {
    Object.assign(this, { graphs, model });
  }

  /**
   * Create the sessions one after another, beginning with the smallest graph while other files are still loading. If a session
   * fails or the signal is aborted, release all sessions.
   *
   * @param files a map from names to promises of contents.
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
      enableMemPattern: false, // patterns would be stored for each of the many combinations of input sizes
      ...sessionOptions,
    };
    const weights = await files.get(`${file}.data`);
    if (weights) options.externalData = [{ path: `${file}.data`, data: weights }];
    const content = await files.get(file);
    files.delete(file);
    try {
      return new Graph(ort, file, await ort.InferenceSession.create(content, options));
    } catch (cause) {
      const message = String(cause?.message ?? cause);
      if (/SIMD/.test(message)) throw new U2moeError('WebAssembly SIMD is not supported: use a browser of 2023 or later, or Node 16.4 or later', { cause });
      if (/no available backend/.test(message)) throw new U2moeError(`onnxruntime failed to start: ${message}`, { cause });
      throw new BundleError(`${file}: onnxruntime refuses it: ${message}`, { cause });
    }
  }

  /** Release all sessions, even if one fails. */
  async release() {
    const released = await Promise.allSettled(Object.values(this.graphs).map((graph) => graph.release()));
    const failed = released.find(({ status }) => status === 'rejected');
    if (failed) throw new U2moeError(`onnxruntime failed to release a graph: ${failed.reason?.message}`, { cause: failed.reason });
  }

  /** Return the caches of a stream before its first chunk: {offset, tensors}, in the manifest's order. */
  start() {
    const zeros = (dims) => float(new Float32Array(product(dims)), dims);
    return { offset: 0, tensors: this.model.caches.map(({ num_blocks: blocks, shape }) => zeros([blocks, 1, ...shape])) };
  }

  /** Encode one chunk. Return the encoder output [time, dim], and the caches for the next chunk. */
  async encode(window, caches, required) {
    const { feature_size: width, caches: layout, streaming } = this.model, numFrames = window.length / width;
    const feeds = { chunk: float(window, [1, numFrames, width]), chunk_lens: int([numFrames], [1]) };
    if (streaming) Object.assign(feeds, { offset: int([caches.offset], [1]), required_cache_size: int([required], []) });
    layout.forEach(({ name }, index) => { feeds[name] = caches.tensors[index]; });
    const { right_context: context, subsampling_rate: rate, output_size: dim } = this.model;
    const outputs = { output: [1, Math.floor((numFrames - context - 1) / rate) + 1, dim], ...(streaming && { next_offset: [1] }) };
    layout.forEach(({ name, num_blocks: blocks, shape }) => { outputs[`r_${name}`] = [blocks, 1, ...shape.map((size) => size || -1)]; });
    const found = await this.graphs.encoder.run(feeds, outputs);
    const tensors = layout.map(({ name }) => found[`r_${name}`]).map(({ data, dims }) => float(data, dims));
    return { output: found.output.data, caches: { offset: Number(found.next_offset?.data[0] ?? 0), tensors } };
  }

  /** Return `caches` for a new utterance, reduced to their last `numFrames` encoder frames. */
  lastOf(caches, numFrames) {
    const tensors = this.model.caches.map(({ shape, rate }, index) => {
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

  /** Compute the log-probabilities [time, vocab] for encoder output [time, dim]. */
  async ctc(encoderOut) {
    const { output_size: dim, vocab_size: vocab } = this.model, numFrames = encoderOut.length / dim;
    const found = await this.graphs.ctc.run({ encoder_out: float(encoderOut, [1, numFrames, dim]) }, { log_probs: [1, numFrames, vocab] });
    return withNumbers(this.graphs.ctc, found.log_probs.data);
  }

  /**
   * Score hypotheses [rows, longest] with the decoders.
   *
   * @returns [scores, rows, width, number of decoders]. `scores` has the scores [rows, width] of each decoder, then the
   *   log-probabilities [rows, vocab] of next tokens.
   */
  async score(encoderOut, hyps, lens) {
    const { output_size: dim, vocab_size: vocab, decoder } = this.model;
    const numFrames = encoderOut.length / dim, longest = hyps.length / lens.length, isBidirectional = decoder === 'bitransformer';
    const encoded = float(encoderOut, [1, numFrames, dim]), given = { score: [], r_score: [], next_log_probs: [] };
    const numRows = Math.max(1, Math.floor(MOST_PAIRS / (longest * Math.max(numFrames, longest))));
    for (let begin = 0; begin < lens.length; begin += numRows) {
      const part = lens.subarray(begin, begin + numRows), num = part.length, score = [1, num, longest + 1];
      const found = await this.graphs.decoder.run({
        hyps: { type: 'int64', data: hyps.subarray(begin * longest, (begin + num) * longest), dims: [1, num, longest] },
        hyps_lens: { type: 'int64', data: part, dims: [1, num] },
        encoder_out: encoded,
        encoder_lens: int([numFrames], [1]),
      }, { score, ...(isBidirectional && { r_score: score }), next_log_probs: [1, num, vocab] });
      for (const [name, parts] of Object.entries(given)) if (found[name]) parts.push(withNumbers(this.graphs.decoder, found[name].data));
    }
    const scores = Float32Array.from(Object.values(given).flat().flatMap((part) => [...part]));
    return [scores, lens.length, longest + 1, isBidirectional ? 2 : 1];
  }
}

export const product = (numbers) => numbers.reduce((total, number) => total * number, 1);
export const float = (data, dims) => ({ type: 'float32', data, dims });
export const int = (values, dims) => ({ type: 'int64', data: BigInt64Array.from(values, BigInt), dims });

function withNumbers(graph, values) {
  if (values.some(Number.isNaN)) throw graph.error('returned NaN: its weights are damaged');
  return values;
}
