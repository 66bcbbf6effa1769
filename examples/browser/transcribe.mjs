/**
 * Recognise WAV files in Node:
 *
 *     node transcribe.mjs [--json] [--runtime node|web] [--options JSON] BUNDLE FILE.wav...
 *
 * `--json` prints one line per file with its segments. `--options` are options of `createStream`.
 */

import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { parseArgs } from 'node:util';

import { Recognizer } from 'u2moe';

const MODULES = { node: 'onnxruntime-node', web: 'onnxruntime-web/wasm' };

const { values, positionals: [bundle, ...files] } = parseArgs({
  allowPositionals: true,
  options: { json: { type: 'boolean' }, runtime: { type: 'string', default: 'node' }, options: { type: 'string', default: '{}' } },
});
if (!files.length || !MODULES[values.runtime]) {
  console.error('usage: node transcribe.mjs [--json] [--runtime node|web] [--options JSON] BUNDLE FILE.wav...');
  process.exit(2);
}

process.env.ORT_DISABLE_TELEMETRY ??= '1'; // otherwise onnxruntime-node writes to the home folder and sends telemetry
const { default: ort } = await import(MODULES[values.runtime]);
const isNode = values.runtime === 'node';
if (!isNode) ort.env.wasm.numThreads = 1;
const begin = performance.now();
const recognizer = await Recognizer.fromBundle({ read: (name) => readFile(join(bundle, name)) }, {
  ort,
  sessionOptions: isNode ? { executionProviders: ['cpu'], intraOpNumThreads: 1, interOpNumThreads: 1 } : {},
});
const loadMs = performance.now() - begin;
for (const file of files) {
  const { sampleRate, samples } = parseWav(await readFile(file));
  const start = performance.now();
  const segments = await recognizer.transcribe(samples, sampleRate, JSON.parse(values.options));
  const ms = performance.now() - start;
  if (values.json) {
    const rss = process.memoryUsage().rss;
    console.log(JSON.stringify({ file, segments, duration: samples.length / sampleRate, ms, loadMs, rss }));
  } else {
    for (const { start: from, end, text } of segments) console.log(`${from.toFixed(2)} ${end.toFixed(2)} ${text}`);
  }
}
await recognizer.release();

/** Return the sample rate and the samples of the first channel of a 16-bit WAV file. */
function parseWav(content) {
  const view = new DataView(content.buffer, content.byteOffset, content.length);
  const tag = (place) => content.toString('latin1', place, place + 4);
  if (tag(0) !== 'RIFF' || tag(8) !== 'WAVE') throw new Error('not a WAV file');
  let channels = 1, sampleRate = 0;
  for (let place = 12; place + 8 <= content.length; place += 8 + view.getUint32(place + 4, true) + (view.getUint32(place + 4, true) % 2)) {
    if (tag(place) === 'fmt ') {
      channels = view.getUint16(place + 10, true);
      sampleRate = view.getUint32(place + 12, true);
      if (view.getUint16(place + 22, true) !== 16) throw new Error('expected 16 bits per sample');
    }
    if (tag(place) === 'data') {
      const size = Math.min(view.getUint32(place + 4, true), content.length - place - 8);
      const samples = new Int16Array(Math.floor(size / 2 / channels));
      for (let i = 0; i < samples.length; i += 1) samples[i] = view.getInt16(place + 8 + 2 * i * channels, true);
      return { sampleRate, samples };
    }
  }
  throw new Error('the WAV file has no data');
}
