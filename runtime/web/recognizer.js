/** A recogniser for a bundle, and its streams. What is public is documented in `index.d.ts`. */

import { openBundle } from './bundle.js';
import { checkedSignal, untilAborted } from './cancellation.js';
import { endpointRules } from './endpoint.js';
import { Graphs } from './graphs.js';
import { ContextGraph } from './hotwords.js';
import { Stream } from './stream.js';

const CHUNK_SIZE = 16;
const LONGEST_PADDING_S = 10;
const MOST_BEAMS = 1000;

export class Recognizer {
  #graphs;

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

  get sampleRate() {
    return this.manifest.features.sample_rate;
  }

  createStream({
    hotwords = null, endpoint = true, beamSize = 10, chunkSize = null, numLeftChunks = -1, ctcWeight = null,
    reverseWeight = null, paddingS = null, rescore = true, ...unknown
  } = {}) {
    if (Object.keys(unknown).length) throw new RangeError(`there is no option ${Object.keys(unknown)[0]}`);
    if (!Array.isArray(hotwords ?? [])) throw new RangeError(`hotwords must be an array of phrases, got ${hotwords}`);
    const { model, decoding } = this.manifest;
    const wholeChunk = Math.ceil(CHUNK_SIZE / model.chunk_multiple) * model.chunk_multiple;
    const options = {
      beamSize: checked('beamSize', beamSize, 1, MOST_BEAMS),
      chunkSize: checked('chunkSize', chunkSize ?? (model.static_chunk_size || wholeChunk), 1, 1e6),
      ctcWeight: checked('ctcWeight', ctcWeight ?? decoding.ctc_weight, 0, Number.MAX_VALUE, Number.isFinite),
      reverseWeight: checked('reverseWeight', reverseWeight ?? decoding.reverse_weight, 0, 1, Number.isFinite),
      paddingS: checked('paddingS', paddingS ?? decoding.padding_s ?? this.manifest.padding_s ?? 0, 0, LONGEST_PADDING_S, Number.isFinite),
      rules: endpointRules(endpoint),
      rescore: rescore && this.#graphs.hasDecoder,
    };
    if (options.chunkSize % model.chunk_multiple) throw new RangeError(`chunkSize must be a multiple of ${model.chunk_multiple}, got ${options.chunkSize}`);
    options.required = checked('numLeftChunks', numLeftChunks, -1, 1e6) < 0 ? -1 : options.chunkSize * numLeftChunks;
    const context = hotwords?.length ? new ContextGraph(hotwords, this.vocabulary) : null;
    return new Stream({ graphs: this.#graphs, manifest: this.manifest, vocabulary: this.vocabulary, options, context });
  }

  async transcribe(samples, sampleRate = this.sampleRate, { signal, ...options } = {}) {
    checkedSignal(signal)?.throwIfAborted();
    const stream = this.createStream(options);
    return untilAborted(allOf(stream, samples, sampleRate, signal), signal, () => stream.reset());
  }

  async warmUp({ signal } = {}) {
    const noise = Float32Array.from({ length: this.sampleRate }, () => Math.random() * 0.2 - 0.1);
    await this.transcribe(noise, this.sampleRate, { signal });
  }

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

function checked(name, value, least, most, isKind = Number.isInteger) {
  if (isKind(value) && value >= least && value <= most) return value;
  const kind = isKind === Number.isInteger ? 'an integer' : 'a number';
  throw new RangeError(`${name} must be ${kind} from ${least} to ${most}, got ${value}`);
}
