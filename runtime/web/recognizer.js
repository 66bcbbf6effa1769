/** The public interface: a recogniser for a bundle, and its streams. */

import { openBundle } from './bundle.js';
import { checkedSignal, untilAborted } from './cancellation.js';
import { endpointRules } from './endpoint.js';
import { Graphs } from './graphs.js';
import { ContextGraph } from './hotwords.js';
import { Stream } from './stream.js';

const CHUNK_SIZE = 16;
const LONGEST_PADDING_S = 10;
const MOST_BEAMS = 1000;

/** Recognises speech with the model of a bundle. Any number of streams share it. */
export class Recognizer {
  #graphs;

  /**
   * Load the bundle at a URL, or in {read(name)}.
   *
   * @param source folder of the bundle.
   * @param options {ort, cache, onProgress, sessionOptions, signal}; `ort` is the module onnxruntime-web or onnxruntime-node.
   */
  static async fromBundle(source, { ort, signal, ...options } = {}) {
    if (!ort?.InferenceSession) throw new TypeError("ort must be the module 'onnxruntime-web' or 'onnxruntime-node'");
    checkedSignal(signal)?.throwIfAborted();
    const loading = Recognizer.#load(source, { ort, signal, ...options });
    const release = (recognizer) => recognizer.release();
    return untilAborted(loading, signal, () => loading.then(release).catch(() => {})); // nobody else could free it
  }

  static async #load(source, { ort, cache, onProgress, sessionOptions, signal }) {
    const { manifest, vocabulary, files } = await openBundle(source, { cache, onProgress, signal });
    return new Recognizer(manifest, vocabulary, await Graphs.create(ort, files, manifest, { sessionOptions, signal }));
  }

  constructor(manifest, vocabulary, graphs) {
    this.manifest = manifest;
    this.vocabulary = vocabulary;
    this.#graphs = graphs;
  }

  /** The model's sample rate in Hz. Streams take any. */
  get sampleRate() {
    return this.manifest.features.sample_rate;
  }

  /**
   * A stream for one source of audio.
   *
   * @param options {hotwords, endpoint, beamSize, chunkSize, numLeftChunks, ctcWeight, reverseWeight, paddingS}
   */
  createStream({
    hotwords = null, endpoint = true, beamSize = 10, chunkSize = null, numLeftChunks = -1, ctcWeight = null,
    reverseWeight = null, paddingS = null, rescore = true, ...unknown
  } = {}) {
    if (Object.keys(unknown).length) throw new RangeError(`there is no option ${Object.keys(unknown)[0]}`);
    if (hotwords !== null && hotwords !== undefined && !Array.isArray(hotwords)) {
      throw new RangeError(`hotwords must be an array of phrases, got ${hotwords}`);
    }
    const { model, decoding } = this.manifest;
    const options = {
      beamSize: checked('beamSize', beamSize, 1, MOST_BEAMS),
      chunkSize: checked('chunkSize', chunkSize ?? (model.static_chunk_size || CHUNK_SIZE), 1, 1e6),
      ctcWeight: within('ctcWeight', ctcWeight ?? decoding.ctc_weight, Number.MAX_VALUE),
      reverseWeight: within('reverseWeight', reverseWeight ?? decoding.reverse_weight, 1),
      paddingS: within('paddingS', paddingS ?? this.manifest.padding_s, LONGEST_PADDING_S),
      rules: endpointRules(endpoint),
      rescore: rescore && this.#graphs.hasDecoder,
    };
    options.required = checked('numLeftChunks', numLeftChunks, -1, 1e6) < 0 ? -1 : options.chunkSize * numLeftChunks;
    const context = hotwords?.length ? new ContextGraph(hotwords, this.vocabulary) : null;
    return new Stream({ graphs: this.#graphs, manifest: this.manifest, vocabulary: this.vocabulary, options, context });
  }

  /** Final results of samples at a rate, as a stream gives them. Options are those of streams, and an AbortSignal `signal`. */
  async transcribe(samples, sampleRate = this.sampleRate, { signal, ...options } = {}) {
    checkedSignal(signal)?.throwIfAborted();
    const stream = this.createStream(options);
    return untilAborted(allOf(stream, samples, sampleRate, signal), signal, () => stream.reset());
  }

  /** Recognise a second of noise, so that the first audio takes no longer than later audio. */
  async warmUp({ signal } = {}) {
    const noise = Float32Array.from({ length: this.sampleRate }, () => Math.random() * 0.2 - 0.1);
    await this.transcribe(noise, this.sampleRate, { signal });
  }

  /** Free the memory of the model. */
  async release() {
    await this.#graphs.release();
  }
}

/** Final results of samples in a new stream, which is fed no more once the signal is aborted. */
async function allOf(stream, samples, sampleRate, signal) {
  const segments = [];
  stream.addEventListener('final', ({ detail }) => segments.push(detail));
  for (let start = 0; start < samples.length && !signal?.aborted; start += sampleRate) {
    await stream.acceptWaveform(sampleRate, samples.subarray(start, start + sampleRate));
  }
  if (!signal?.aborted) await stream.inputFinished();
  return segments;
}

function within(name, value, most) {
  if (!Number.isFinite(value) || value < 0 || value > most) throw new RangeError(`${name} must be a number from 0 to ${most}, got ${value}`);
  return value;
}

function checked(name, value, least, most) {
  if (!Number.isInteger(value) || value < least || value > most) {
    throw new RangeError(`${name} must be an integer between ${least} and ${most}, got ${value}`);
  }
  return value;
}
