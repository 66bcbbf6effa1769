/** A recogniser for a bundle, and its streams. What is public is documented in `index.d.ts`. */

import { checkRate, checkRuntime, floats } from './arguments.js';
import { openBundle } from './bundle.js';
import { untilAborted } from './cancellation.js';
import { Core, LanguageModel, Recognition, checkNames, pythonNames } from './core.js';
import { LANGUAGE_MODEL_OPTIONS, STREAM_OPTIONS } from './declared.js';
import { StreamError } from './errors.js';
import { Graphs } from './graphs.js';
import { checkSignature } from './signature.js';
import { Stream } from './stream.js';
import { Vad } from './vad.js';

export class Recognizer {
  #core;
  #model;
  #graphs;
  #bundled = null; // the bundle's own language model
  #isReleased = false;

  static async fromBundle(source, { ort, signal, ...options } = {}) {
    checkRuntime(ort);
    const release = (loading) => loading.then((recognizer) => recognizer.release()).catch(() => {}); // nobody else could free it
    return untilAborted(signal, () => Recognizer.#load(source, { ort, signal, ...options }), release);
  }

  static async #load(source, { ort, wasm, sessionOptions, signal, publicKeys = null, verify, ...options }) {
    const starting = Core.load(wasm);
    starting.catch(() => {}); // awaited once the manifest is there
    const parse = async (text) => (await starting).parseManifest(text);
    const check = publicKeys === null ? null : async (...signed) => checkSignature(await starting, ...signed, publicKeys, verify);
    const { text, manifest, files } = await openBundle(source, { ...options, parse, check, signal });
    const core = await starting, model = core.createModel(text, await files.get('tokens.txt'));
    const recognizer = new Recognizer(manifest, core, model, await Graphs.create(ort, files, manifest, { sessionOptions, signal }));
    const { file, ...weights } = manifest.decoding.language_model ?? {};
    if (file) recognizer.#bundled = new LanguageModel(core, model, await files.get(file), weights);
    return recognizer;
  }

  constructor(manifest, core, model, graphs) {
    this.manifest = manifest;
    this.sampleRate = manifest.features.sample_rate;
    this.#core = core;
    this.#model = model;
    this.#graphs = graphs;
  }

  #checkOpen() {
    if (this.#isReleased) throw new StreamError('this recogniser is released');
  }

  languageModel(content, options = {}) {
    this.#checkOpen();
    checkNames(options, LANGUAGE_MODEL_OPTIONS);
    return new LanguageModel(this.#core, this.#model, content, pythonNames(options));
  }

  createStream(options = {}) {
    this.#checkOpen();
    checkNames(options, [...STREAM_OPTIONS, 'hotwords', 'vad', 'maxQueueS']);
    if (options.vad && !(options.vad instanceof Vad)) throw new RangeError('vad must be a Vad, which a worker cannot be sent');
    const { vad, languageModel, maxQueueS, ...chosen } = Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined));
    if (chosen.chunkSize === 'full') chosen.chunkSize = -1;
    if (vad) chosen.vad = vad.options;
    const models = { given: languageModel, bundled: languageModel === undefined ? this.#bundled : null };
    const recognition = () => new Recognition(this.#core, this.#model, pythonNames(chosen), models);
    return new Stream(this.#graphs, recognition, vad, maxQueueS);
  }

  async transcribe(samples, sampleRate = this.sampleRate, { signal, ...options } = {}) {
    signal?.throwIfAborted?.(); // before anything is made for it
    checkRate(sampleRate);
    const all = floats(samples), stream = this.createStream(options);
    return untilAborted(signal, () => allOf(stream, all, sampleRate, signal), () => stream.reset());
  }

  async warmUp({ signal } = {}) {
    const noise = Float32Array.from({ length: this.sampleRate }, () => Math.random() * 0.2 - 0.1);
    await this.transcribe(noise, this.sampleRate, { signal });
  }

  async release() {
    this.#isReleased = true;
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
