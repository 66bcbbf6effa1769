// The recogniser, in a thread of its own: it loads the model once, and recognises one source after another.

import * as ort from './ort/ort.wasm.bundle.min.mjs';
import { Recognizer } from './u2moe/index.js';

ort.env.wasm.numThreads = 1; // more need headers that static hosts do not send, and gain nothing for chunks this small
ort.env.wasm.wasmPaths = { wasm: new URL('./ort/ort-wasm-simd-threaded.wasm', import.meta.url).href };

const MODEL = new URL('./model/', import.meta.url).href;
const LEFT_CHUNKS = 4; // as the server has it: time and memory stay the same however long somebody speaks
const REPORTED_LEN = 16000; // samples for each message that they have been recognised
const sources = new Map();

const loading = Recognizer.fromBundle(MODEL, {
  ort,
  onProgress: ({ loaded, total }) => postMessage({ type: 'progress', loaded, total }),
});
loading.then(
  ({ sampleRate }) => postMessage({ type: 'ready', sampleRate }),
  (error) => postMessage({ type: 'failed', message: error.message }),
);

const actions = {
  start(id, { options }, recognizer) {
    const stream = recognizer.createStream({ numLeftChunks: LEFT_CHUNKS, ...options });
    for (const type of ['partial', 'final']) stream.addEventListener(type, ({ detail }) => postMessage({ type, id, result: detail }));
    stream.addEventListener('error', ({ detail }) => postMessage({ type: 'problem', id, message: detail.message }));
    sources.set(id, { stream, taken: 0 });
  },
  audio(id, { sampleRate, samples }) {
    const source = sources.get(id);
    const take = () => {
      source.taken += samples.length;
      if (source.taken < REPORTED_LEN) return;
      postMessage({ type: 'taken', id, length: source.taken });
      source.taken = 0;
    };
    source?.stream.acceptWaveform(sampleRate, samples).then(take, () => {}); // an error is an event, too
  },
  finish(id) {
    const done = () => postMessage({ type: 'done', id });
    sources.get(id)?.stream.inputFinished().then(done, () => {});
    sources.delete(id);
  },
  close(id) {
    sources.delete(id);
  },
};

addEventListener('message', async ({ data }) => {
  try {
    actions[data.type](data.id, data, await loading);
  } catch (error) {
    postMessage({ type: 'problem', id: data.id, message: error.message });
  }
});
