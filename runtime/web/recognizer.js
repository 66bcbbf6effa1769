/** The recogniser of a bundle. `index.d.ts` documents the public interface. */

import { checkRuntime, untilAborted } from './arguments.js';
import { openBundle } from './bundle.js';
import { Core, LanguageModel, Recognition, checkNames, pythonNames } from './core.js';
import { LANGUAGE_MODEL_OPTIONS, STREAM_OPTIONS } from './declared.js';
import { StreamError } from './errors.js';
import { Graphs } from './graphs.js';
import { Source } from './source.js';
import { Stream, Streaming } from './stream.js';
import { Vad } from './vad.js';

export class Recognizer extends Streaming {
  #core;
  #model;
  #graphs;
  #bundled = null; // language model from the bundle
  #isReleased = false;

  static async fromBundle(source, { ort, signal, ...options } = {}) {
    checkRuntime(ort);
    const release = (loading) => loading.then((recognizer) => recognizer.release()).catch(() => {}); // the caller never receives it
    return untilAborted(signal, () => Recognizer.#load(source, { ort, signal, ...options }), release);
  }

  static async #load(source, { ort, wasm, sessionOptions, signal, publicKeys = null, verify, ...options }) {
    const starting = Core.load(wasm);
    starting.catch(() => {}); // the error is thrown later, where `starting` is awaited
    const parse = async (text) => (await starting).parseManifest(text);
    const check = publicKeys === null ? null : async (...signed) => (await starting).checkSignature(...signed, publicKeys, verify);
    const { text, manifest, files } = await openBundle(source, { ...options, parse, check, signal });
    const core = await starting, model = core.createModel(text, await files.get('tokens.txt'));
    const recognizer = new Recognizer(manifest, core, model, await Graphs.create(ort, files, manifest, { sessionOptions, signal }));
    const { file, ...weights } = manifest.decoding.language_model ?? {};
    if (file) recognizer.#bundled = new LanguageModel(core, model, await files.get(file), weights);
    return recognizer;
  }

  constructor(manifest, core, model, graphs) {
    super();
    this.manifest = manifest;
    this.sampleRate = manifest.features.sample_rate;
    this.#core = core;
    this.#model = model;
    this.#graphs = graphs;
  }

  #checkOpen() {
    if (this.#isReleased) throw new StreamError('this recogniser has been released');
  }

  languageModel(content, options = {}) {
    this.#checkOpen();
    checkNames(options, LANGUAGE_MODEL_OPTIONS);
    return new LanguageModel(this.#core, this.#model, content, pythonNames(options));
  }

  createStream(options = {}) {
    this.#checkOpen();
    checkNames(options, [...STREAM_OPTIONS, 'hotwords', 'vad', 'maxQueueS']);
    if (options.vad && !(options.vad instanceof Vad)) throw new RangeError('vad must be a Vad, which cannot be sent to a worker');
    const { vad, languageModel, maxQueueS, ...chosen } = Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined));
    if (chosen.chunkSize === 'full') chosen.chunkSize = -1;
    if (vad) chosen.vad = vad.options;
    const models = { given: languageModel, bundled: languageModel === undefined ? this.#bundled : null };
    const recognition = () => new Recognition(this.#core, this.#model, pythonNames(chosen), models);
    return new Stream((emit) => new Source(this.#graphs, recognition(), vad, emit), maxQueueS);
  }

  async release() {
    this.#isReleased = true;
    await this.#graphs.release();
  }
}
