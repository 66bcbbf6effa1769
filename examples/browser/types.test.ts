// Compiled by the tests, not run: the types describe the module.
import * as ort from 'onnxruntime-web/wasm';
import { DEFAULT_RULES, InferenceError, IntegrityError, Recognizer, Resampler } from 'u2moe';

const { signal } = new AbortController();
const recognizer = await Recognizer.fromBundle('model/', { ort, signal, onProgress: ({ loaded, total }) => console.log(loaded / total) });
await Recognizer.fromBundle({ read: async (name, { signal: each }) => new Uint8Array(await (await fetch(name, { signal: each ?? null })).arrayBuffer()) }, { ort });
const stream = recognizer.createStream({ hotwords: ['ADA', ['LOVELACE', 2]], endpoint: { rule3: null, rule1: DEFAULT_RULES.rule1 } });
stream.addEventListener('partial', ({ detail }) => console.log(detail.text));
stream.addEventListener('final', ({ detail }) => console.log(detail.words.map(({ word, confidence }) => word + confidence.toFixed(2))));
await stream.acceptWaveform(48000, new Resampler(44100, 48000).accept(new Float32Array(441)));
await stream.inputFinished();
stream.reset();
await recognizer.transcribe(new Int16Array(1), 16000, { signal, beamSize: 4 }).catch((error) => error instanceof InferenceError && error.cause);
// @ts-expect-error: streams are cancelled by `reset`
recognizer.createStream({ signal });
// @ts-expect-error: a rate comes first
stream.acceptWaveform(new Int16Array(1));
export default IntegrityError;
