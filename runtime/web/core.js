/** The C++ core as WebAssembly. It performs recognition, except for running graphs, reading files and emitting events. See
 * core.cpp. */

import { bytesOf, checkRate, floats, refuseModel, tag } from './arguments.js';
import { AudioError, BundleError, GrammarError, IntegrityError, LanguageModelError, SignatureError, StreamError, U2moeError } from './errors.js';

/** Error classes by the error codes of u2moe.h. */
const ERRORS = { 3: BundleError, 4: IntegrityError, 5: AudioError, 6: StreamError, 9: LanguageModelError, 15: GrammarError };

/** Return the error for an error code and message of the core. Option names in the message become camel case. */
function told(code, message) {
  const isOption = code === 1 || message.startsWith('options: ');
  if (isOption) return new RangeError(message.replace(/^options: /, '').replace(/[a-z]+(_[a-z]+)+(?=:| must)/, camel));
  const [file] = message.split(':'), Kind = { 'language model': LanguageModelError, 'bundle.sig': SignatureError }[file];
  return new (Kind ?? ERRORS[code] ?? U2moeError)(message);
}

/** Graphs that `Recognition.next` requests. */
export const ENCODER = 1, CTC = 2, DECODER = 3, VAD = 4;

const encoder = new TextEncoder(), decoder = new TextDecoder();
let compiled;

/** Compile core.wasm from the folder of this file. In Node, a `file:` URL is read from disk. */
async function compile() {
  const url = new URL('./core.wasm', import.meta.url);
  if (url.protocol === 'file:') return WebAssembly.compile(await globalThis.process.getBuiltinModule('node:fs/promises').readFile(url));
  const response = await fetch(url);
  if (!response.ok) throw new U2moeError(`${url}: the server returned ${response.status}`);
  return WebAssembly.compile(await response.arrayBuffer()); // compileStreaming would require a certain content type
}

/** An instance of the core with its own memory. If WebAssembly itself fails, for example because memory runs out, all
 * later calls fail. */
export class Core {
  #exports;
  #failure = null;
  #registry = new FinalizationRegistry(([free, pointer]) => this.#failure || this.#exports[free](pointer));

  /** @param wasm core.wasm as bytes or a compiled module; needed only if the file core.wasm is not beside this one. */
  static async load(wasm) {
    if (!wasm) compiled ??= compile().catch((error) => { compiled = undefined; throw error; });
    const core = new Core();
    try {
      const module = wasm instanceof WebAssembly.Module ? wasm : await (wasm ? WebAssembly.compile(wasm) : compiled);
      core.#exports = (await WebAssembly.instantiate(module, core.#imports())).exports;
      core.#exports._initialize();
    } catch (error) {
      throw error instanceof U2moeError ? error : new U2moeError(`core.wasm failed to start: ${error?.message ?? error}`, { cause: error });
    }
    return core;
  }

  /** Return the imports of the WebAssembly module: `fail`, and stubs for the C library's system calls. */
  #imports() {
    const fail = (code, ...place) => { throw told(code, decoder.decode(this.#bytes(...place))); };
    const none = () => 52, system = { fd_close: none, fd_seek: none, fd_write: none, proc_exit: none, environ_get: () => 0 };
    system.environ_sizes_get = (...sizes) => sizes.forEach((place) => this.#bytes(place, 4).fill(0)) ?? 0;
    return { u2moe: { fail }, wasi_snapshot_preview1: system };
  }

  #bytes(pointer, length) {
    return new Uint8Array(this.#exports.memory.buffer, pointer, length);
  }

  /** Call an exported function. Each string or typed array among the arguments is passed as a pointer and a length. */
  call(name, ...values) {
    if (this.#failure) throw this.#failure;
    const { malloc, free, __stack_pointer: stack } = this.#exports, given = [], top = stack.value;
    try {
      const passed = values.flatMap((value) => {
        const array = typeof value === 'string' ? encoder.encode(value) : value;
        if (!ArrayBuffer.isView(array)) return [array];
        const pointer = malloc(array.byteLength || 1);
        if (!pointer) throw new WebAssembly.RuntimeError('out of memory');
        given.push(pointer);
        this.#bytes(pointer, array.byteLength).set(bytesOf(array));
        return [pointer, array.length];
      });
      const found = this.#exports[name](...passed);
      given.forEach(free);
      return found;
    } catch (error) {
      if (error instanceof WebAssembly.RuntimeError) {
        this.#failure = new U2moeError(`the core failed, possibly for lack of memory: ${error.message}`, { cause: error });
        throw this.#failure;
      }
      stack.value = top; // the exception did not remove its frames from the stack
      given.forEach(free);
      throw error;
    }
  }

  /** Return the null-terminated UTF-8 string at a pointer. */
  text(pointer) {
    const { buffer } = this.#exports.memory;
    return decoder.decode(new Uint8Array(buffer, pointer, new Uint8Array(buffer, pointer).indexOf(0)));
  }

  /** Return the content of bundle.json, with defaults for missing fields. */
  parseManifest(text) {
    const { manifest, warnings } = JSON.parse(this.text(this.call('manifest_parse', text)));
    warnings.forEach((warning) => console.warn(`u2moe: ${warning}`));
    return manifest;
  }

  /** Create a model from the texts of bundle.json and tokens.txt. */
  createModel(...texts) {
    const model = this.call('model_create', ...texts);
    try {
      this.call('model_read_hotwords', model);
    } catch (error) {
      throw error instanceof RangeError ? new BundleError(`bundle.json: decoding: hotwords: ${error.message}`) : error;
    }
    return model;
  }

  /**
   * Check that one of the keys has signed the manifest. The core parses the signature file, and `verify` checks each signature.
   *
   * @param content bytes of the signature file. @param manifest bytes of bundle.json. @param publicKeys keys in PEM.
   * @throws SignatureError none of the keys has signed the manifest.
   */
  async checkSignature(content, manifest, publicKeys, verify = withWebCrypto) {
    if (!Array.isArray(publicKeys)) throw new RangeError('publicKeys must be a list of keys in PEM');
    const { prefix, signed } = JSON.parse(this.text(this.call('signatures', content, JSON.stringify(publicKeys))));
    const message = new Uint8Array([...encoder.encode(prefix), ...manifest]);
    for (const each of signed) {
      const [publicKey, signature] = each.map((hex) => Uint8Array.from(hex.match(/../g) ?? [], (byte) => Number.parseInt(byte, 16)));
      if ((await verify({ publicKey, message, signature })) === true) return;
    }
    throw new SignatureError('bundle.sig: does not match this bundle.json, which was changed or belongs to another bundle');
  }

  /** Return a copy of the numbers at a pointer. */
  array(Kind, pointer, length) {
    return new Kind(this.#exports.memory.buffer, pointer, length).slice();
  }

  /** Have the object at a pointer freed when its owner is garbage-collected. Return the pointer. */
  own(owner, free, pointer) {
    this.#registry.register(owner, [free, pointer], owner);
    return pointer;
  }

  free(owner, free, pointer) {
    this.#registry.unregister(owner);
    if (!this.#failure) this.call(free, pointer);
  }
}

async function withWebCrypto({ publicKey, message, signature }) {
  try {
    const key = await crypto.subtle.importKey('raw', publicKey, 'Ed25519', false, ['verify']);
    return await crypto.subtle.verify('Ed25519', key, signature, message);
  } catch (cause) {
    throw new SignatureError('bundle.sig: WebCrypto does not support Ed25519 here: pass the option verify', { cause });
  }
}

/** Recognises one source of audio; see runtime/cpp/source/stream_state.hpp. */
export class Recognition {
  #core;
  #pointer;

  /**
   * @param options options named as in Python; `vad` contains the detector's options.
   * @param models language models of the caller (`given`) and of the bundle (`bundled`). Only beam searches use `bundled`.
   */
  constructor(core, model, options, { given, bundled }) {
    this.#core = core;
    const pointers = [given, bundled].map((each) => LanguageModel.pointer(each, core));
    this.#pointer = core.own(this, 'stream_free', core.call('stream_create', model, JSON.stringify(options), ...pointers));
  }

  /**
   * Call a stream function of the core: `accept` with a rate and samples, `finish`, `give` with the output of a graph,
   * or `score` with the result of `Graphs.score`.
   */
  call(name, ...values) {
    this.#core.call(`stream_${name}`, this.#pointer, ...values);
  }

  /** Return the graph to run next, {graph, input, begins, kept, required, hyps, lens}; null if more samples are needed. */
  next() {
    const core = this.#core, told = core.call('stream_next', this.#pointer);
    if (!told) return null;
    const [graph, input, length, begins, kept, required, hyps, num, lens, rows] = core.array(Int32Array, told, 10);
    const request = { graph, begins, kept, required, input: core.array(Float32Array, input, length) };
    return num ? { ...request, hyps: core.array(BigInt64Array, hyps, num), lens: core.array(BigInt64Array, lens, rows) } : request;
  }

  get result() {
    return this.#parsed(this.#core.call('stream_result', this.#pointer));
  }

  /** Return the next final result, or null. */
  segment() {
    const told = this.#core.call('stream_segment', this.#pointer);
    return told ? this.#parsed(told) : null;
  }

  #parsed(pointer) {
    return JSON.parse(this.#core.text(pointer), (_, value) => (isObject(value) ? renamed(value, camel) : value));
  }

  free() {
    this.#core.free(this, 'stream_free', this.#pointer);
  }
}

/** An n-gram model for one recogniser. */
export class LanguageModel {
  #core;
  #pointer;

  constructor(core, model, content, options) {
    this.#core = core;
    this.#pointer = core.own(this, 'language_model_free', core.call('language_model_create', model, bytesOf(content, 'a language model', LanguageModelError), JSON.stringify(options)));
  }

  /** @throws RangeError `model` is not a language model, or belongs to another recogniser. */
  static pointer(model, core) {
    if ((model ?? null) === null) return 0;
    return model instanceof LanguageModel && model.#core === core ? model.#pointer : refuseModel(model);
  }
}

/** Resamples one channel in parts. Any split of the input produces the same samples. */
export class Resampler {
  #core;
  #pointer;

  static async create(sourceRate, targetRate) {
    [sourceRate, targetRate].forEach(checkRate);
    return new Resampler(await Core.load(), sourceRate, targetRate);
  }

  constructor(core, sourceRate, targetRate) {
    this.#core = core;
    this.#pointer = core.own(this, 'resampler_free', core.call('resampler_create', sourceRate, targetRate));
  }

  accept(samples) {
    return this.#taken(floats(samples));
  }

  finish() {
    return this.#taken(0, 0);
  }

  free() {
    if (this.#pointer) this.#core.free(this, 'resampler_free', this.#pointer);
    this.#pointer = 0;
  }

  #taken(...samples) {
    if (!this.#pointer) throw new StreamError('this resampler was freed');
    const num = this.#core.call('resampler_accept', this.#pointer, ...samples);
    return this.#core.array(Float32Array, this.#core.call('resampler_samples'), num);
  }
}

const isObject = (value) => tag(value) === '[object Object]';
const camel = (name) => name.replace(/_./g, ([, letter]) => letter.toUpperCase());
const snake = (name) => name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
const renamed = (object, rename) => Object.fromEntries(Object.entries(object).map(([name, value]) => [rename(name), value]));

/** @throws RangeError `options` is not an object, or has an unknown option. */
export function checkNames(options, names) {
  if (!isObject(options)) throw new RangeError(`options must be an object, got ${tag(options)}`);
  const unknown = Object.keys(options).find((name) => !names.includes(name));
  if (unknown !== undefined) throw new RangeError(`unknown option '${unknown}'`);
}

/**
 * Convert options to the form that the core expects: JSON values, with snake_case names at all levels.
 *
 * @throws RangeError JSON cannot represent a value, or values are nested too deeply; the message names the option.
 */
export function pythonNames(value, path = '', depth = 0) {
  const within = (name, item) => pythonNames(item, path ? `${path}: ${name}` : name, depth + 1), kind = typeof value;
  if (depth > 9) throw new RangeError(`${path} is nested too deeply`);
  if (kind === 'number' && !Number.isFinite(value)) throw new RangeError(`${path} must be a number, got ${value}`);
  if (kind === 'string' && /\p{Surrogate}/u.test(value)) throw new RangeError(`${path} contains half of a surrogate pair`);
  if (Array.isArray(value)) return Array.from(value, (item, index) => within(index, item));
  if (['bigint', 'function', 'symbol'].includes(kind)) throw new RangeError(`${path} must not be a ${kind}`);
  if (kind !== 'object' || value === null) return value;
  if (tag(value) !== '[object Object]') throw new RangeError(`${path} must not be a ${tag(value).slice(8, -1)}`);
  return Object.fromEntries(Object.entries(value).map(([name, item]) => [snake(name), within(name, item)]));
}
