/** Reads a bundle from a URL or by a function: manifest, vocabulary, and files that are verified by their digests. */

import { BundleError, IntegrityError, U2moeError } from './errors.js';
import { Vocabulary, parseTokens } from './text.js';

const MANIFEST = 'bundle.json';
const TOKENS = 'tokens.txt';
const FORMAT_VERSION = 4;
const LARGEST = 2 ** 20;
const DECODERS = ['bitransformer', 'transformer', 'none'];

/** Numbers in the manifest: minimum, maximum, and whether fractions are allowed. */
const NUMBERS = {
  model: {
    feature_size: [1, LARGEST], output_size: [1, LARGEST], num_blocks: [1, LARGEST], vocab_size: [1, LARGEST],
    subsampling_rate: [1, LARGEST], right_context: [0, LARGEST], static_chunk_size: [0, LARGEST], chunk_multiple: [1, LARGEST],
  },
  features: {
    sample_rate: [1000, 384000], num_mel_bins: [3, 1000], frame_length_ms: [1, 1000, true], frame_shift_ms: [1, 1000, true],
  },
  decoding: { ctc_weight: [0, Number.MAX_VALUE, true], reverse_weight: [0, 1, true] },
  calibration: { scale: [1e-9, 1e9, true], bias: [-Number.MAX_VALUE, Number.MAX_VALUE, true] },
};

/**
 * Read the manifest and the vocabulary, and begin to read the graphs, all at once.
 *
 * @param source a URL, or {read(name)} that resolves to bytes.
 * @param options {cache, onProgress, signal}: name of a Cache to keep files in, null for none; called with {loaded, total}
 *   bytes; an AbortSignal.
 * @returns {manifest, vocabulary, files}: `files` is a map from names of graphs to promises of their contents.
 */
export async function openBundle(source, { cache = 'u2moe', onProgress = () => {}, signal } = {}) {
  const reader = typeof source?.read === 'function' ? new Reader(source, signal) : await UrlReader.of(source, cache, signal);
  const content = await reader.read(MANIFEST);
  const manifest = parseManifest(new TextDecoder().decode(content));
  const names = neededFiles(manifest), loaded = new Map();
  const total = names.reduce((sum, name) => sum + manifest.files[name].size, 0);
  const files = new Map(names.map((name) => {
    const report = (bytes) => {
      if (signal?.aborted) return;
      loaded.set(name, bytes);
      onProgress({ loaded: [...loaded.values()].reduce((sum, each) => sum + each), total });
    };
    return [name, readVerified(reader, name, manifest.files[name], report)];
  }));
  const all = Promise.all(files.values());
  all.then(() => reader.settle?.(content, manifest, names)).catch(() => {}); // whoever waits for a file gets its error
  const tokens = parseTokens(new TextDecoder().decode(await files.get(TOKENS)));
  if (tokens.length !== manifest.model.vocab_size) {
    throw new BundleError(`${TOKENS}: found ${tokens.length} symbols, expected vocab_size ${manifest.model.vocab_size}`);
  }
  files.delete(TOKENS);
  return { manifest, vocabulary: new Vocabulary(tokens), files };
}

function parseManifest(text) {
  let manifest;
  try {
    manifest = JSON.parse(text);
  } catch (error) {
    throw new BundleError(`${MANIFEST}: is not valid JSON: ${error.message}`, { cause: error });
  }
  if (manifest?.format !== 'u2moe-bundle') throw new BundleError(`${MANIFEST}: format: found ${manifest?.format}, expected u2moe-bundle`);
  if (manifest.version !== FORMAT_VERSION) {
    throw new BundleError(`${MANIFEST}: version: found ${manifest.version}, expected ${FORMAT_VERSION}`);
  }
  for (const [section, fields] of Object.entries(NUMBERS)) {
    if (section === 'calibration' && manifest.calibration === null) continue;
    const found = asObject(manifest, section);
    for (const [name, limits] of Object.entries(fields)) checkNumber(found[name], `${section}.${name}`, ...limits);
  }
  const { model, features } = manifest;
  checkNumber(model.frame_reduction ?? 1, 'model.frame_reduction', 1, model.subsampling_rate);
  checkNumber(features.num_ceps ?? 0, 'features.num_ceps', 0, features.num_mel_bins);
  if (model.feature_size !== (features.num_ceps || features.num_mel_bins)) {
    throw wrong('model.feature_size', model.feature_size, 'that of the features');
  }
  for (const name of ['blank', 'eos']) checkNumber(model[name], `model.${name}`, 0, model.vocab_size - 1);
  if (!Array.isArray(model.caches)) throw wrong('model.caches', model.caches, 'a list');
  model.caches.forEach((cache, index) => checkCache(cache, `model.caches.${index}`));
  if (!DECODERS.includes(model.decoder)) throw wrong('model.decoder', model.decoder, `one of ${DECODERS.join(', ')}`);
  checkNumber(manifest.decoding.padding_s ?? 0, 'decoding.padding_s', 0, 10, true);
  for (const [name, digest] of Object.entries(asObject(manifest, 'files'))) {
    const isDigest = Number.isSafeInteger(digest?.size) && digest.size >= 0 && /^[0-9a-f]{64}$/.test(digest.sha256);
    if (!isDigest) throw wrong(`files.${name}`, JSON.stringify(digest), 'its size and sha256');
  }
  if (!model.streaming) throw new BundleError(`${MANIFEST}: this encoder cannot stream`);
  return manifest;
}

function asObject(manifest, section) {
  const value = manifest[section];
  if (typeof value !== 'object' || value === null || Array.isArray(value)) throw wrong(section, value, 'an object');
  return value;
}

function checkCache(cache, where) {
  if (typeof cache?.name !== 'string') throw wrong(`${where}.name`, cache?.name, 'a string');
  if (!Array.isArray(cache.shape)) throw wrong(`${where}.shape`, cache.shape, 'a list');
  checkNumber(cache.num_blocks, `${where}.num_blocks`, 1, LARGEST);
  checkNumber(cache.rate, `${where}.rate`, 1e-3, 1e3, true);
  for (const size of cache.shape) checkNumber(size, `${where}.shape`, 0, LARGEST);
}

function checkNumber(value, name, least, most, hasFraction = false) {
  const isKind = hasFraction ? Number.isFinite(value) : Number.isInteger(value);
  if (!isKind || value < least || value > most) throw wrong(name, value, `a number between ${least} and ${most}`);
}

function wrong(name, found, expected) {
  return new BundleError(`${MANIFEST}: ${name}: found ${found}, expected ${expected}`);
}

/** Graphs in ORT format are preferred: they load faster. */
function neededFiles(manifest) {
  const graphs = ['features', 'encoder', 'ctc', ...(manifest.model.decoder === 'none' ? [] : ['decoder'])];
  const names = [TOKENS];
  for (const graph of graphs) {
    const file = [`${graph}.ort`, `${graph}.onnx`].find((name) => manifest.files[name]);
    if (!file) throw new BundleError(`${MANIFEST}: files: ${graph}.ort or ${graph}.onnx is not listed`);
    names.push(file);
    if (manifest.files[`${file}.data`]) names.push(`${file}.data`);
  }
  return names;
}

/** The file from the cache if its digest is right; otherwise it is read and cached. */
async function readVerified(reader, name, digest, onProgress) {
  const kept = await reader.kept?.(digest);
  if (kept && !(await difference(name, kept, digest))) {
    onProgress(digest.size);
    return kept;
  }
  const content = await reader.read(name, digest.size, onProgress);
  const problem = await difference(name, content, digest);
  if (problem) throw new IntegrityError(problem);
  onProgress(digest.size);
  reader.keep?.(digest, content);
  return content;
}

async function difference(name, content, digest) {
  if (content.length !== digest.size) return `${name}: size is ${content.length} bytes, expected ${digest.size}`;
  if (!globalThis.crypto?.subtle) throw new BundleError('digests need a secure page: https, or localhost');
  const hash = new Uint8Array(await crypto.subtle.digest('SHA-256', content));
  const hex = Array.from(hash, (byte) => byte.toString(16).padStart(2, '0')).join('');
  return hex === digest.sha256 ? null : `${name}: sha256 is ${hex}, expected ${digest.sha256}`;
}

/** Reads files by a function of the program. */
class Reader {
  constructor(source, signal) {
    this.source = source;
    this.signal = signal;
  }

  async read(name) {
    let content;
    try {
      this.signal?.throwIfAborted();
      content = await this.source.read(name, { signal: this.signal });
    } catch (error) {
      throw readError(name, error, this.signal);
    }
    if (content instanceof ArrayBuffer) return new Uint8Array(content);
    if (!(content instanceof Uint8Array)) throw new BundleError(`${name}: read gave no Uint8Array or ArrayBuffer`);
    return content;
  }
}

/** Reads files below a URL, and keeps them in a Cache by their digests, where pages may have one. */
class UrlReader {
  static async of(source, cacheName, signal) {
    let base, cache = null;
    try {
      base = new URL(source, globalThis.location?.href);
    } catch (error) {
      throw new BundleError(`${source}: is no URL; elsewhere than in a page, give {read(name)}`, { cause: error });
    }
    try {
      if (cacheName && globalThis.caches) cache = await caches.open(cacheName);
    } catch { // refused, as in a sandbox: everything works without it
    }
    return new UrlReader(new URL(base.href.endsWith('/') ? base.href : `${base.href}/`), cache, signal);
  }

  constructor(folder, cache, signal) {
    this.folder = folder;
    this.cache = cache;
    this.signal = signal;
  }

  #key(digest) {
    return new URL(`?sha256=${digest.sha256}`, this.folder).href;
  }

  /** A cache that fails has nothing. */
  async #match(key) {
    return this.cache?.match(key).catch(() => null);
  }

  async kept(digest) {
    const response = await this.#match(this.#key(digest));
    return response ? new Uint8Array(await response.arrayBuffer()) : null;
  }

  /** In the background. A full disk is no reason to fail: then the file is read again next time. */
  keep(digest, content) {
    this.cache?.put(this.#key(digest), new Response(content)).catch(() => {});
  }

  /** The manifest comes from the network, so that a new model is noticed, and from the cache only offline. */
  async read(name, size = null, onProgress = () => {}) {
    const url = new URL(name, this.folder).href;
    try {
      const response = await fetch(url, { cache: 'no-cache', signal: this.signal }); // an old file would not match a new manifest
      if (!response.ok) throw new BundleError(`${url}: the server answers ${response.status}`);
      return await received(response, size, onProgress);
    } catch (error) {
      const kept = size === null && !this.signal?.aborted && (await this.#match(url));
      if (kept) return new Uint8Array(await kept.arrayBuffer());
      throw readError(url, error, this.signal);
    }
  }

  /** All files are there: keep the manifest for times without a network, and forget files that this bundle no longer has. */
  async settle(content, manifest, names) {
    await this.cache?.put(new URL(MANIFEST, this.folder).href, new Response(content)).catch(() => {});
    const digests = names.map((name) => manifest.files[name].sha256);
    for (const request of (await this.cache?.keys()) ?? []) {
      const url = new URL(request.url), digest = url.searchParams.get('sha256');
      const isOurs = url.origin === this.folder.origin && url.pathname === this.folder.pathname;
      if (isOurs && digest && !digests.includes(digest)) await this.cache.delete(request);
    }
  }
}

/** The error for a failed read: the reason of an abort, or a BundleError with the cause. */
function readError(name, error, signal) {
  if (signal?.aborted) return signal.reason;
  return error instanceof U2moeError ? error : new BundleError(`${name}: cannot be read: ${error?.message ?? error}`, { cause: error });
}

async function received(response, size, onProgress) {
  if (!response.body || !size) return new Uint8Array(await response.arrayBuffer());
  const content = new Uint8Array(size), reader = response.body.getReader();
  for (let loaded = 0; ; onProgress(loaded)) {
    const { done, value } = await reader.read();
    if (done) return content.subarray(0, loaded);
    if (loaded + value.length > size) throw new IntegrityError(`${response.url}: has more than the ${size} bytes expected`);
    content.set(value, loaded);
    loaded += value.length;
  }
}
