/** Reads a bundle from a URL or by a function: the manifest, and files that are verified by their digests. */

import { bytesOf } from './arguments.js';
import { BundleError, IntegrityError, SignatureError, U2moeError } from './errors.js';

const MANIFEST = 'bundle.json', SIGNATURE = 'bundle.sig';

/**
 * Read the manifest, and begin to read the other files, all at once.
 *
 * @param source a URL, or {read(name)} that resolves to bytes.
 * @param options {parse, check, cache, onProgress, signal}: called with the manifest's text for its content, and before that, if it
 *   is given, with the signature and the manifest; name of a Cache to keep files in, null for none; called with {loaded, total} bytes;
 *   an AbortSignal.
 * @returns {text, manifest, files}: the manifest as it is and as an object; a map from names to promises of contents.
 */
export async function openBundle(source, { parse, check, cache = 'u2moe', onProgress = () => {}, signal }) {
  const reader = readerOf(source, cache, signal);
  const content = await reader.read(MANIFEST), described = { [MANIFEST]: content };
  if (check) {
    described[SIGNATURE] = await reader.read(SIGNATURE).catch((cause) => { throw new SignatureError(`${cause.message}, expected a signature`, { cause }); });
    await check(described[SIGNATURE], content);
  }
  const text = new TextDecoder().decode(content);
  const manifest = await parse(text), names = neededFiles(manifest), loaded = new Map();
  const total = names.reduce((sum, name) => sum + manifest.files[name].size, 0);
  const files = new Map(names.map((name) => {
    const report = (bytes) => {
      if (signal?.aborted) return;
      loaded.set(name, bytes);
      onProgress({ loaded: [...loaded.values()].reduce((sum, each) => sum + each), total });
    };
    return [name, readVerified(reader, name, manifest.files[name], report)];
  }));
  Promise.all(files.values()).then(() => reader.settle?.(described, manifest, names)).catch(() => {}); // whoever waits for a file gets its error
  return { text, manifest, files };
}

/** Reads from a function of the program, a folder in Node, or the network. */
function readerOf(source, cache, signal) {
  if (typeof source?.read === 'function') return { read: (name) => readBy(source, name, signal) };
  let folder;
  try {
    const { href } = new URL(source, globalThis.location?.href);
    folder = new URL(href.endsWith('/') ? href : `${href}/`);
  } catch (error) {
    throw new BundleError(`${source}: is no URL; elsewhere than in a page, give file:///FOLDER or {read(name)}`, { cause: error });
  }
  const files = folder.protocol === 'file:' && globalThis.process?.getBuiltinModule?.('node:fs/promises');
  if (!files) return new UrlReader(folder, cache, signal);
  return readerOf({ read: (name, options) => files.readFile(new URL(name, folder), options) }, cache, signal);
}

/** Graphs and their files, the smallest first. Those in ORT format are preferred: they load faster. */
export function graphFiles({ model, files }) {
  return ['ctc', 'features', ...(model.decoder === 'none' ? [] : ['decoder']), 'encoder'].map((graph) => {
    const file = [`${graph}.ort`, `${graph}.onnx`].find((name) => files[name]);
    if (!file) throw new BundleError(`${MANIFEST}: files: ${graph}.ort or ${graph}.onnx is not listed`);
    return [graph, file];
  });
}

function neededFiles(manifest) {
  const { files } = manifest, graphs = graphFiles(manifest).map(([, file]) => file), weights = graphs.map((file) => `${file}.data`);
  const names = ['tokens.txt', ...graphs, ...weights.filter((file) => files[file]), manifest.decoding.language_model?.file ?? []].flat();
  for (const name of names) {
    const isDigest = Number.isSafeInteger(files[name]?.size) && files[name].size >= 0 && /^[0-9a-f]{64}$/.test(files[name].sha256);
    if (!isDigest) throw new BundleError(`${MANIFEST}: files.${name}: found ${JSON.stringify(files[name])}, expected its size and sha256`);
  }
  return names;
}

/** The file from the cache if its digest is right; otherwise it is read and cached. */
async function readVerified(reader, name, digest, onProgress) {
  const kept = await reader.kept?.(digest);
  if (kept && !(await difference(kept, digest))) {
    onProgress(digest.size);
    return kept;
  }
  const content = await reader.read(name, digest.size, onProgress);
  const problem = await difference(content, digest);
  if (problem) throw damaged(name, problem);
  onProgress(digest.size);
  reader.keep?.(digest, content);
  return content;
}

async function difference(content, digest) {
  if (content.length !== digest.size) return `size is ${content.length} bytes, expected ${digest.size}`;
  if (!globalThis.crypto?.subtle) throw new BundleError('models need a secure page: https, or localhost');
  const hash = new Uint8Array(await crypto.subtle.digest('SHA-256', content));
  const hex = Array.from(hash, (byte) => byte.toString(16).padStart(2, '0')).join('');
  return hex === digest.sha256 ? null : `sha256 is ${hex}, expected ${digest.sha256}`;
}

function damaged(name, problem) {
  const advice = 'Load the model again; if that does not help, it is damaged where it comes from, and has to be put there again';
  return new IntegrityError(`${name} is not the file that the model lists. ${advice}`, { cause: new Error(`${name}: ${problem}`) });
}

/** Reads files by a function of the program. */
async function readBy(source, name, signal) {
  try {
    signal?.throwIfAborted();
    return bytesOf(await source.read(name, { signal }), `${name}: what read gave`);
  } catch (error) {
    throw readError(name, error, signal);
  }
}

/** Reads files below a URL, and keeps them in a Cache by their digests, where pages may have one. */
class UrlReader {
  #keeping = []; // promises of what is put into the cache
  #problem = null; // of the cache

  constructor(folder, cacheName, signal) {
    Object.assign(this, { folder, cacheName, signal });
  }

  #key(digest) {
    return new URL(`?sha256=${digest.sha256}`, this.folder).href;
  }

  /** What `use` gives of the cache, tried twice, since browsers lose it under load; null without one, as in a sandbox. */
  async #cached(use) {
    for (const isLast of [false, true]) {
      try {
        return this.cacheName && globalThis.caches ? await use(await caches.open(this.cacheName)) : null;
      } catch (error) {
        if (isLast) this.#problem = error;
      }
    }
    return null;
  }

  #match(key) {
    return this.#cached(async (cache) => {
      const response = await cache.match(key);
      return response ? new Uint8Array(await response.arrayBuffer()) : null;
    });
  }

  kept(digest) {
    return this.#match(this.#key(digest));
  }

  /** In the background. A full disk is no reason to fail: then the file is read again next time. */
  keep(digest, content) {
    this.#keeping.push(this.#cached((cache) => cache.put(this.#key(digest), new Response(content))));
  }

  /** The manifest comes from the network, so that a new model is noticed, and from the cache only offline. */
  async read(name, size = null, onProgress = () => {}) {
    const url = new URL(name, this.folder).href;
    try {
      const response = await fetch(url, { cache: 'no-cache', signal: this.signal }); // an old file would not match a new manifest
      if (!response.ok) throw new BundleError(`${url}: the server answers ${response.status}`);
      return await received(response, name, size, onProgress);
    } catch (error) {
      const kept = size === null && !this.signal?.aborted && (await this.#match(url));
      if (kept) return kept;
      const found = readError(url, error, this.signal);
      if (this.#problem && found instanceof BundleError) found.message += `; and the browser's cache fails: ${this.#problem.message}`;
      throw found;
    }
  }

  /** All files are there, and in the cache: keep the manifest and its signature for times without a network, and forget files that it no longer has. */
  async settle(described, manifest, names) {
    await Promise.all(this.#keeping);
    const digests = names.map((name) => manifest.files[name].sha256);
    await this.#cached(async (cache) => {
      for (const [name, content] of Object.entries(described)) await cache.put(new URL(name, this.folder).href, new Response(content));
      for (const request of await cache.keys()) {
        const url = new URL(request.url), digest = url.searchParams.get('sha256');
        const isOurs = url.origin === this.folder.origin && url.pathname === this.folder.pathname;
        if (isOurs && digest && !digests.includes(digest)) await cache.delete(request);
      }
    });
  }
}

/** The error for a failed read: the reason of an abort, or a BundleError with the cause. */
function readError(name, error, signal) {
  if (signal?.aborted) return signal.reason;
  return error instanceof U2moeError ? error : new BundleError(`${name}: cannot be read: ${error?.message ?? error}`, { cause: error });
}

async function received(response, name, size, onProgress) {
  if (!response.body || !size) return new Uint8Array(await response.arrayBuffer());
  const content = new Uint8Array(size), reader = response.body.getReader();
  for (let loaded = 0; ; onProgress(loaded)) {
    const { done, value } = await reader.read();
    if (done) return content.subarray(0, loaded);
    if (loaded + value.length > size) throw damaged(name, `has more than the ${size} bytes expected`);
    content.set(value, loaded);
    loaded += value.length;
  }
}
