// Compiled by the tests, not run: the types describe the module.
import * as ort from 'onnxruntime-web/wasm';
import { DEFAULT_RULES, IntegrityError, Recognizer, Resampler } from './u2moe/index.js';

const recognizer = await Recognizer.fromBundle('model/', { ort, onProgress: ({ loaded, total }) => console.log(loaded / total) });
const stream = recognizer.createStream({ hotwords: ['ADA', ['LOVELACE', 2]], endpoint: { rule3: null, rule1: DEFAULT_RULES.rule1 } });
stream.addEventListener('partial', ({ detail }) => console.log(detail.text));
stream.addEventListener('final', ({ detail }) => console.log(detail.words.map(({ word, confidence }) => word + confidence.toFixed(2))));
await stream.acceptWaveform(48000, new Resampler(44100, 48000).accept(new Float32Array(441)));
await stream.inputFinished();
// @ts-expect-error: a rate comes first
stream.acceptWaveform(new Int16Array(1));
export default IntegrityError;
