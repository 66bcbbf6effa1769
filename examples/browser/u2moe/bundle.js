/** A bundle from a URL or a folder: its manifest, its files with their digests compared, its vocabulary. */

import { BundleError, IntegrityError } from './errors.js';
import { Vocabulary, parseTokens } from './text.js';

const MANIFEST = 'bundle.json';
const FORMAT_VERSION = 1;

/**
 * Read all files that are needed.
 *
 * @param source a URL, or {read(name)} that resolves to bytes.
 * @param options {cache, onProgress}: name of a Cache to keep files in, null for none; called with {loaded, total} bytes.
 */
export async function openBundle(source, { cache = 'u2moe', onProgress = () => {} } = {}) {
  const reader = typeof source.read === 'function' ? source : await UrlReader.of(new URL(source, globalThis.location?.href), cache);
  const manifest = parseManifest(new TextDecoder().decode(await reader.read(MANIFEST)));
  const names = neededFiles(manifest), sizes = names.map((name) => manifest.files[name].size);
  const total = sizes.reduce((sum, size) => sum + size, 0), files = new Map();
  let before = 0;
  for (const [index, name] of names.entries()) {
    const report = (loaded) => onProgress({ loaded: before + loaded, total });
    files.set(name, await readVerified(reader, name, manifest.files[name], report));
    before += sizes[index];
    report(0);
  }
  await reader.forgetOthers?.(names.map((name) => manifest.files[name].sha256));
  const tokens = parseTokens(new TextDecoder().decode(files.get('tokens.txt')));
  if (tokens.length !== manifest.model.vocab_size) {
    throw new BundleError(`tokens.txt: found ${tokens.length} symbols, expected vocab_size ${manifest.model.vocab_size}`);
  }
  files.delete('tokens.txt');
  return { manifest, vocabulary: new Vocabulary(tokens), files };
}

function parseManifest(text) {
  let manifest;
  try {
    manifest = JSON.parse(text);
  } catch (error) {
    throw new BundleError(`${MANIFEST}: is not valid JSON: ${error.message}`);
  }
  if (manifest?.format !== 'u2moe-bundle') throw new BundleError(`${MANIFEST}: format: found ${manifest?.format}, expected u2moe-bundle`);
  if (manifest.version !== FORMAT_VERSION) {
    throw new BundleError(`${MANIFEST}: version: found ${manifest.version}, expected ${FORMAT_VERSION}`);
  }
  if (!manifest.model.streaming) throw new BundleError(`${MANIFEST}: this encoder cannot stream`);
  return manifest;
}

/** Graphs in ORT format are preferred: they load faster. */
function neededFiles(manifest) {
  const graphs = ['features', 'encoder', 'ctc', ...(manifest.model.decoder === 'none' ? [] : ['decoder'])];
  const names = ['tokens.txt'];
  for (const graph of graphs) {
    const file = [`${graph}.ort`, `${graph}.onnx`].find((name) => manifest.files[name]);
    if (!file) throw new BundleError(`${MANIFEST}: files: ${graph}.ort or ${graph}.onnx is not listed`);
    names.push(file);
    if (manifest.files[`${file}.data`]) names.push(`${file}.data`);
  }
  return names;
}

async function readVerified(reader, name, digest, onProgress) {
  let content = await reader.read(name, digest, onProgress);
  if (reader.discard && (await difference(name, content, digest))) {
    await reader.discard(digest); // a damaged cache is no reason to fail: read it again from its origin
    content = await reader.read(name, digest, onProgress);
  }
  const problem = await difference(name, content, digest);
  if (problem) throw new IntegrityError(problem);
  return content;
}

async function difference(name, content, digest) {
  if (content.length !== digest.size) return `${name}: size is ${content.length} bytes, expected ${digest.size}`;
  if (!globalThis.crypto?.subtle) throw new BundleError('digests need a secure page: https, or localhost');
  const hash = new Uint8Array(await crypto.subtle.digest('SHA-256', content));
  const hex = Array.from(hash, (byte) => byte.toString(16).padStart(2, '0')).join('');
  return hex === digest.sha256 ? null : `${name}: sha256 is ${hex}, expected ${digest.sha256}`;
}

/** Reads files below a URL, and keeps them in a Cache by their digests. */
class UrlReader {
  static async of(base, cacheName) {
    const folder = new URL(base.href.endsWith('/') ? base.href : `${base.href}/`);
    return new UrlReader(folder, cacheName && globalThis.caches ? await caches.open(cacheName) : null);
  }

  constructor(folder, cache) {
    this.folder = folder;
    this.cache = cache;
  }

  #key(digest) {
    return new URL(`?sha256=${digest.sha256}`, this.folder).href;
  }

  async read(name, digest = null, onProgress = () => {}) {
    const kept = digest && (await this.cache?.match(this.#key(digest)));
    if (kept) {
      onProgress(digest.size);
      return new Uint8Array(await kept.arrayBuffer());
    }
    const response = await this.#fetch(name, digest === null);
    const content = await received(response, digest?.size, onProgress);
    if (this.cache) {
      const key = digest ? this.#key(digest) : new URL(name, this.folder).href;
      await this.cache.put(key, new Response(content)).catch(() => {}); // a full disk: then it is read again next time
    }
    return content;
  }

  /** The manifest comes from the network, so that a new model is noticed, and from the cache only offline. */
  async #fetch(name, isManifest) {
    const url = new URL(name, this.folder).href;
    try {
      const response = await fetch(url, isManifest ? { cache: 'no-cache' } : {});
      if (!response.ok) throw new BundleError(`${url}: the server answers ${response.status}`);
      return response;
    } catch (error) {
      const kept = isManifest && (await this.cache?.match(url));
      if (kept) return kept;
      throw error instanceof BundleError ? error : new BundleError(`${url}: cannot be read: ${error.message}`);
    }
  }

  async discard(digest) {
    await this.cache?.delete(this.#key(digest));
  }

  /** Forget files that this bundle no longer has. */
  async forgetOthers(digests) {
    for (const request of (await this.cache?.keys()) ?? []) {
      const url = new URL(request.url), digest = url.searchParams.get('sha256');
      const isOurs = url.origin === this.folder.origin && url.pathname === this.folder.pathname;
      if (isOurs && digest && !digests.includes(digest)) await this.cache.delete(request);
    }
  }
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
