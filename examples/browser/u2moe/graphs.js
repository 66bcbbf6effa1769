/** The graphs of a bundle as functions on typed arrays. Holds no state of streams. */

import { BundleError, U2moeError } from './errors.js';

/**
 * Not parallel: there is one thread. But onnxruntime then plans no reuse of buffers, and its search for buffers to reuse
 * takes ten times as long as all the rest of creating the encoder's session.
 */
const WEB_ASSEMBLY = { executionProviders: ['wasm'], executionMode: 'parallel' };

/** Sessions of onnxruntime-web or onnxruntime-node. */
export class Graphs {
  #ort;
  #sessions;
  #model;

  constructor(ort, sessions, model) {
    this.#ort = ort;
    this.#sessions = sessions;
    this.#model = model;
  }

  /**
   * Create the sessions of the graphs in `files`, a map from names to promises of contents. The smallest comes first:
   * onnxruntime starts with it while the others are still on their way.
   */
  static async create(ort, files, manifest, sessionOptions = {}) {
    const names = ['ctc', 'features', ...(manifest.model.decoder === 'none' ? [] : ['decoder']), 'encoder'];
    const sessions = {};
    try {
      for (const name of names) sessions[name] = await Graphs.#session(ort, files, name, sessionOptions);
    } catch (error) {
      await Promise.allSettled(Object.values(sessions).map((session) => session.release()));
      throw error;
    }
    return new Graphs(ort, sessions, manifest.model);
  }

  static async #session(ort, files, name, sessionOptions) {
    const isOrt = files.has(`${name}.ort`);
    const file = isOrt ? `${name}.ort` : `${name}.onnx`;
    const options = {
      ...(!sessionOptions.executionProviders && WEB_ASSEMBLY),
      graphOptimizationLevel: isOrt ? 'disabled' : 'all',
      enableMemPattern: false, // it remembers each combination of sizes, and chunks, utterances and n-best lists have many
      ...sessionOptions,
    };
    const weights = await files.get(`${file}.data`);
    if (weights) options.externalData = [{ path: `${file}.data`, data: weights }];
    const content = await files.get(file);
    files.delete(file);
    try {
      return await ort.InferenceSession.create(content, options);
    } catch (error) {
      throw refusal(file, String(error.message ?? error));
    }
  }

  get hasDecoder() {
    return this.#sessions.decoder !== undefined;
  }

  async release() {
    for (const session of Object.values(this.#sessions)) await session.release();
  }

  /** Features [frames, mel] of samples. */
  async features(samples) {
    const { features } = await this.#sessions.features.run({ samples: this.#float(samples, [1, samples.length]) });
    return features.data;
  }

  /** Caches of a stream before its first chunk: {offset, att, cnn}; att is {data, length}. */
  start() {
    const { num_blocks: blocks, conv_dim: dim, conv_cache: length } = this.#model;
    return { offset: 0, att: { data: new Float32Array(0), length: 0 }, cnn: new Float32Array(blocks * dim * length) };
  }

  /**
   * Encode one chunk: encoder output [time, dim], and the caches for the next chunk.
   *
   * With limited left context, a position that would exceed the model's maximum is moved back first.
   */
  async encode(window, caches, required) {
    const m = this.#model, numFrames = window.length / m.feature_size;
    const time = Math.floor((numFrames - m.right_context - 1) / m.subsampling_rate) + 1;
    let { offset } = caches;
    if (required >= 0 && offset + time > m.max_position) offset = Math.min(offset, Math.max(caches.att.length, m.conv_cache));
    const feeds = {
      chunk: this.#float(window, [1, numFrames, m.feature_size]),
      chunk_lens: this.#int([numFrames], [1]),
      offset: this.#int([offset], [1]),
      required_cache_size: this.#int([required], []),
      att_cache: this.#float(caches.att.data, [m.num_blocks, 1, m.num_kv_heads, caches.att.length, m.kv_dim]),
    };
    if (m.convolution) feeds.cnn_cache = this.#float(caches.cnn, [m.num_blocks, 1, m.conv_dim, m.conv_cache]);
    const found = await this.#sessions.encoder.run(feeds);
    const att = { data: found.r_att_cache.data, length: found.r_att_cache.dims[3] };
    const kept = required >= 0 ? Math.min(caches.att.length + time, required) : caches.att.length + time;
    return {
      output: found.output.data,
      caches: { offset: offset + time, att: this.lastOf(att, kept), cnn: found.r_cnn_cache?.data ?? caches.cnn },
    };
  }

  /** The last `length` frames of an attention cache. */
  lastOf(att, length) {
    if (att.length <= length) return att;
    const { num_blocks: blocks, num_kv_heads: heads, kv_dim: width } = this.#model;
    const data = new Float32Array(blocks * heads * length * width);
    for (let row = 0; row < blocks * heads; row += 1) {
      const end = (row + 1) * att.length * width;
      data.set(att.data.subarray(end - length * width, end), row * length * width);
    }
    return { data, length };
  }

  /** Log-probabilities [time, vocab] of encoder output [time, dim]. */
  async ctc(encoderOut) {
    const dim = this.#model.output_size;
    const feeds = { encoder_out: this.#float(encoderOut, [1, encoderOut.length / dim, dim]) };
    return withNumbers('ctc', (await this.#sessions.ctc.run(feeds)).log_probs.data);
  }

  /** Scores of token sequences by the decoders, {left, right, width}; see `attentionRescoring`. */
  async score(encoderOut, hypotheses) {
    const { output_size: dim, eos } = this.#model, numFrames = encoderOut.length / dim;
    const length = Math.max(1, ...hypotheses.map((tokens) => tokens.length));
    const hyps = hypotheses.flatMap((tokens) => [...tokens, ...Array(length - tokens.length).fill(eos)]);
    const found = await this.#sessions.decoder.run({
      hyps: this.#int(hyps, [1, hypotheses.length, length]),
      hyps_lens: this.#int(hypotheses.map((tokens) => tokens.length), [1, hypotheses.length]),
      encoder_out: this.#float(encoderOut, [1, numFrames, dim]),
      encoder_lens: this.#int([numFrames], [1]),
    });
    const right = found.r_score ? withNumbers('decoder', found.r_score.data) : null;
    return { left: withNumbers('decoder', found.score.data), right, width: length + 1 };
  }

  #float(data, dims) {
    return new this.#ort.Tensor('float32', data, dims);
  }

  #int(values, dims) {
    return new this.#ort.Tensor('int64', BigInt64Array.from(values, BigInt), dims);
  }
}

function withNumbers(graph, values) {
  if (values.some(Number.isNaN)) throw new U2moeError(`${graph} gives values that are no numbers: its weights are damaged`);
  return values;
}

function refusal(file, message) {
  if (/SIMD/.test(message)) return new U2moeError('WebAssembly with SIMD is missing: browsers since 2023 have it, Node since 16.4');
  if (/no available backend/.test(message)) return new U2moeError(`onnxruntime does not start: ${message}`);
  return new BundleError(`${file}: onnxruntime refuses it: ${message}`);
}
