/** Reads a bundle from a URL or with the caller's function, and verifies each file against its digest in the manifest. */

import { bytesOf } from './arguments.js';
import { BundleError, IntegrityError, SignatureError, U2moeError } from './errors.js';

const MANIFEST = 'bundle.json', SIGNATURE = 'bundle.sig';

/**
 * Read the manifest, then start reading all needed files concurrently.
 *
 * @param source a URL, or {read(name)} that resolves to bytes.
 * @param options {parse, check, cache, onProgress, signal}:
 *   `parse(text)` returns the content of the manifest. `check(signature, manifest)`, if present, is called with
 *   the bytes of these two files before `parse`. `cache` is the name of a Cache for the files, or null. `onProgress` is
 *   called with {loaded, total} in bytes.
 * @returns {text, manifest, files}: the manifest as text and as an object, and a map from file names to promises of contents.
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
  Promise.all(files.values()).then(() => reader.settle?.(described, manifest, names)).catch(() => {}); // the promise of the file reports the error
  return { text, manifest, files };
}

/** Return a reader. `source` is an object with a function `read`, or the URL of a folder. In Node, `file:` URLs work too. */
function readerOf(source, cache, signal) {
  if (typeof source?.read === 'function') {
    const read = async (name) => {
      signal?.throwIfAborted();
      return bytesOf(await source.read(name, { signal }), `${name}: the result of read`);
    };
    return { read: (name) => read(name).catch((error) => { throw readError(name, error, signal); }) };
  }
  let folder;
  try {
    const { href } = new URL(source, globalThis.location?.href);
    folder = new URL(href.endsWith('/') ? href : `${href}/`);
  } catch (error) {
    throw new BundleError(`${source}: not a valid URL; outside a page, pass file:///FOLDER or {read(name)}`, { cause: error });
  }
  const files = folder.protocol === 'file:' && globalThis.process?.getBuiltinModule?.('node:fs/promises');
  if (!files) return new UrlReader(folder, cache, signal);
  return readerOf({ read: (name, options) => files.readFile(new URL(name, folder), options) }, cache, signal);
}

/** Return each graph's name and file, usually the smallest file first. Prefer files in ORT format, which load faster. */
export function graphFiles({ model, files }) {
  return ['ctc', ...(model.decoder === 'none' ? [] : ['decoder']), 'encoder'].map((graph) => {
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

/** Return a file from the cache if its digest matches. Otherwise read the file and cache it. */
async function readVerified(reader, name, digest, onProgress) {
  let content = await reader.kept?.(digest);
  if (!content || (await difference(content, digest))) {
    content = await reader.read(name, digest.size, onProgress);
    const problem = await difference(content, digest);
    if (problem) throw damaged(name, problem);
    reader.keep?.(digest, content);
  }
  onProgress(digest.size);
  return content;
}

async function difference(content, digest) {
  if (content.length !== digest.size) return `size is ${content.length} bytes, expected ${digest.size}`;
  if (!globalThis.crypto?.subtle) throw new BundleError('models can be loaded only by pages on https or localhost');
  const hash = new Uint8Array(await crypto.subtle.digest('SHA-256', content));
  const hex = Array.from(hash, (byte) => byte.toString(16).padStart(2, '0')).join('');
  return hex === digest.sha256 ? null : `sha256 is ${hex}, expected ${digest.sha256}`;
}

function damaged(name, problem) {
  const advice = 'Load the model again; if that does not help, replace the model at its source';
  return new IntegrityError(`${name} does not match the manifest of the model. ${advice}`, { cause: new Error(`${name}: ${problem}`) });
}

/** Reads files below a URL. Where the Cache API is available, caches the files by digest. */
class UrlReader {
  #keeping = []; // promises of writes to the cache
  #problem = null; // last error of the cache

  constructor(folder, cacheName, signal) {
    Object.assign(this, { folder, cacheName, signal });
  }

  #key(digest) {
    return new URL(`?sha256=${digest.sha256}`, this.folder).href;
  }

  /**
   * Return the result of `use(cache)`, or null if no cache works, for example in a sandbox. After an error, try once
   * more, because browsers may lose the cache under load.
   */
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

  /** Cache a file in the background. Failures, such as a full disk, are ignored: the file is fetched again next time. */
  keep(digest, content) {
    this.#keeping.push(this.#cached((cache) => cache.put(this.#key(digest), new Response(content))));
  }

  /** Read a file from the network. If that fails, return the manifest or its signature from the cache. */
  async read(name, size = null, onProgress = () => {}) {
    const url = new URL(name, this.folder).href;
    try {
      const response = await fetch(url, { cache: 'no-cache', signal: this.signal }); // a stale file may not match the manifest
      if (!response.ok) throw new BundleError(`${url}: the server returned ${response.status}`);
      return await received(response, name, size, onProgress);
    } catch (error) {
      const kept = size === null && !this.signal?.aborted && (await this.#match(url));
      if (kept) return kept;
      const found = readError(url, error, this.signal);
      if (this.#problem && found instanceof BundleError) found.message += `; the browser's cache also failed: ${this.#problem.message}`;
      throw found;
    }
  }

  /** Once all files are cached, cache the manifest and its signature for offline use, and delete cached files that the
   * manifest no longer lists. */
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

/** Return the error for a failed read: the signal's reason after an abort, otherwise `error`. Errors of other libraries
 * become the cause of a BundleError. */
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
