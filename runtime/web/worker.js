/**
 * The recogniser in a worker. `serve` runs in the worker, and `Recognizer` runs in the page. The worker checks the options of a
 * stream, so an invalid option causes an 'error' event of the stream and rejects the stream's promises.
 */

import { bytesOf, refuseModel, untilAborted } from './arguments.js';
import * as errors from './errors.js';
import { Stream, Streaming } from './stream.js';

/**
 * Call `take` for each event of a worker or port. It receives the data of a message, or any other event itself. Workers in
 * Node pass values instead of events.
 */
function listen(port, type, take) {
  if (port.on) port.on(type, take);
  else port.addEventListener(type, (event) => take(type === 'message' ? event.data : event));
}

/** Answer calls from the page. @param defaults `ort` and other options of `Recognizer.fromBundle`. */
export function serve(defaults) {
  const port = globalThis.postMessage ? globalThis : globalThis.process.getBuiltinModule('node:worker_threads').parentPort;
  if (!port) throw new TypeError('serve must be called in a worker');
  const objects = new Map(), aborts = new Map();
  let recognizer;
  // If a language model failed to load, pass its id instead, so that `createStream` throws.
  const given = (options) => options && { ...options, languageModel: objects.get(options.languageModel) ?? options.languageModel };
  const methods = {
    async load(id, source, options) {
      const onProgress = (progress) => port.postMessage({ id, progress }), { signal } = aborts.set(id, new AbortController()).get(id);
      const { Recognizer: Local } = await import('./recognizer.js'); // imported here because the page does not need it
      const publicKeys = options.publicKeys ?? defaults.publicKeys; // an undefined option must not turn verification off
      recognizer = await Local.fromBundle(source, { ...defaults, ...options, publicKeys, onProgress, signal });
      return { sampleRate: recognizer.sampleRate, manifest: recognizer.manifest };
    },
    languageModel: (_, object, content, options) => void objects.set(object, recognizer.languageModel(content, options)),
    release: () => recognizer.release(),
    createStream(_, object, options) {
      const stream = recognizer.createStream(given(options));
      const report = ({ type, detail }) => port.postMessage({ object, type, detail: type === 'error' ? packed(detail) : detail });
      for (const type of ['partial', 'final', 'error']) stream.addEventListener(type, report);
      objects.set(object, stream);
    },
    call: (_, object, method, ...args) => objects.get(object)?.[method](...args),
    forget: (_, object) => void objects.delete(object),
    abort: (_, which) => aborts.get(which)?.abort(),
  };
  listen(port, 'message', async ({ id, method, args }) => {
    try {
      port.postMessage({ id, value: await methods[method](id, ...args) });
    } catch (error) {
      port.postMessage({ id, error: packed(error) });
    } finally {
      aborts.delete(id);
    }
  });
}

const packed = (error) => ({ name: error?.name ?? 'Error', message: String(error?.message ?? error), cause: error?.cause && String(error.cause.message ?? error.cause) });

function unpacked({ name, message, cause }) {
  const Kind = errors[name] ?? { RangeError, TypeError }[name] ?? errors.U2moeError;
  return new Kind(message, cause ? { cause: new Error(cause) } : {});
}

/** Calls, answers and events between a page and its worker. */
class Connection {
  #worker;
  #calls = new Map();
  #streams = new Map();
  #num = 0;
  failure = null;
  #registry = new FinalizationRegistry((object) => this.forget(object));

  constructor(worker) {
    this.#worker = worker;
    listen(worker, 'message', (data) => this.#take(data));
    const fail = (event) => {
      event.preventDefault?.();
      this.close(new errors.U2moeError(`the worker failed: ${event.message || (event === Number(event) ? `it has ended with code ${event}` : 'it did not start, or a message was lost')}`));
    };
    for (const type of ['error', 'messageerror', 'exit']) listen(worker, type, fail);
  }

  /** Return a number for a new object in the worker. The object lives as long as its owner. An owner that is a
   * `Source` gets the object's events. */
  register(owner) {
    this.#num += 1;
    this.#registry.register(owner, this.#num);
    if (owner instanceof Source) this.#streams.set(this.#num, new WeakRef(owner));
    return this.#num;
  }

  forget(object) {
    this.#streams.delete(object);
    this.call('forget', [object]).catch(() => {});
  }

  call(method, args, { onProgress, transfer = [], signal } = {}) {
    this.#num += 1;
    const id = this.#num, abort = () => this.call('abort', [id]).catch(() => {});
    const ask = () => new Promise((resolve, reject) => {
      this.check();
      this.#calls.set(id, { resolve, reject, onProgress });
      this.#worker.postMessage({ id, method, args }, transfer);
    });
    return untilAborted(signal, ask, abort);
  }

  /** @throws U2moeError the error that ended the connection, if it has ended. */
  check() {
    if (this.failure) throw this.failure;
  }

  /** Terminate the worker, and reject all pending calls. */
  close(error) {
    if (this.failure) return;
    this.failure = error;
    this.#worker.terminate();
    for (const { reject } of this.#calls.values()) reject(this.failure);
    this.#calls.clear();
    for (const stream of this.#streams.values()) stream.deref()?.take('error', this.failure);
  }

  #take({ id, value, error, progress, object, type, detail }) {
    const call = this.#calls.get(id), source = this.#streams.get(object)?.deref();
    if (object) return source?.numResets || source?.take(type, type === 'error' ? unpacked(detail) : detail);
    if (progress) return call?.onProgress?.(progress);
    this.#calls.delete(id);
    return error ? call?.reject(unpacked(error)) : call?.resolve(value);
  }
}

/** A `Recognizer` whose work runs in a worker. */
export class Recognizer extends Streaming {
  #connection;
  #models = new WeakMap();

  /** @param options the options of the local `Recognizer.fromBundle`, and `worker`, a Worker whose script calls `serve`. */
  static async fromBundle(source, { worker, onProgress, signal, ...options } = {}) {
    if (!worker?.postMessage) throw new TypeError('worker must be a Worker whose script calls serve');
    if (source?.read) throw new TypeError('source must be a URL: a worker cannot be sent functions');
    const connection = new Connection(worker), page = globalThis.location?.href;
    const url = page ? new URL(source, page).href : String(source);
    const { sampleRate, manifest } = await connection.call('load', [url, options], { onProgress, signal });
    return Object.assign(new Recognizer(connection), { sampleRate, manifest });
  }

  constructor(connection) {
    super();
    this.#connection = connection;
  }

  languageModel(content, options) {
    this.#connection.check();
    const model = {}, object = this.#connection.register(model), made = this.#connection.call('languageModel', [object, bytesOf(content, 'a language model', errors.LanguageModelError), options]);
    made.catch(() => {}); // streams that use the model report the error
    this.#models.set(model, { object, made });
    return model;
  }

  createStream(options) {
    this.#connection.check();
    const model = options?.languageModel ?? null;
    const { object, made } = model === null ? {} : this.#models.get(model) ?? refuseModel(model);
    const sent = model === null ? options : { ...options, languageModel: object };
    return new Stream((emit) => new Source(this.#connection, emit, sent, made), options?.maxQueueS);
  }

  /** Free the model, and terminate the worker. */
  async release() {
    if (!this.#connection.failure) await this.#connection.call('release', []);
    this.#connection.close(new errors.StreamError('the recogniser of this stream has been released'));
  }
}

const nothing = () => ({ text: '', isFinal: false, segment: 0, start: 0, end: 0, confidence: 0, score: 0, tokens: [], times: [],
  words: [], nbest: [], committed: '', numCommitted: 0, committedEnd: 0, revised: 0, phrases: [] });

/** A source of a `Stream`, recognised in the worker. `discard` resets this object and returns it as the next source. */
class Source {
  #object;
  #created;
  result = nothing();
  numResets = 0; // those that the worker has not answered; until then, its events are of the previous source

  constructor(connection, emit, options, model) {
    Object.assign(this, { connection, emit });
    this.#object = connection.register(this);
    this.#created = Promise.all([model, connection.call('createStream', [this.#object, options])]);
    this.#created.catch((detail) => this.take('error', detail));
  }

  take(type, detail) {
    if (type !== 'error') this.result = detail;
    this.emit(type, detail);
  }

  accept(sampleRate, samples) {
    const copy = samples.slice();
    return this.#call('acceptWaveform', [sampleRate, copy], [copy.buffer]);
  }

  finish() {
    return this.#call('inputFinished', []);
  }

  discard() {
    const done = () => { this.numResets -= 1; };
    this.numResets += 1;
    this.result = nothing();
    this.#call('reset', []).then(done, done);
    return this;
  }

  #call(method, args, transfer) {
    const answers = [this.#created, this.connection.call('call', [this.#object, method, ...args], { transfer })];
    return Promise.all(answers).then(() => void this); // keeps this object alive until then, so that it gets its events
  }
}
