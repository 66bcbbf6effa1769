// The tests compile this file but do not run it. It checks that the types match the module.
import * as ort from 'onnxruntime-web/wasm';
import { AudioOverflowError, InferenceError, IntegrityError, MicrophoneError, Recognizer, Resampler, Vad } from 'u2moe';
import { Microphone } from 'u2moe/microphone';
import { Recognizer as WorkerRecognizer, serve } from 'u2moe/worker';

const { signal } = new AbortController();
const recognizer = await Recognizer.fromBundle('model/', { ort, signal, onProgress: ({ loaded, total }) => console.log(loaded / total) });
await Recognizer.fromBundle({ read: async (name, { signal: each }) => new Uint8Array(await (await fetch(name, { signal: each ?? null })).arrayBuffer()) }, { ort });
const languageModel = recognizer.languageModel(new Uint8Array(9), { weight: 0.4 });
const stream = recognizer.createStream({ hotwords: ['ADA', ['LOVELACE', 2]], endpoint: { rule3: null, pause: 0.6 }, languageModel, chunkSize: 'full', maxQueueS: 10 });
stream.addEventListener('partial', ({ detail }) => console.log(detail.text));
stream.addEventListener('final', ({ detail }) => console.log(detail.words.map(({ word, confidence }) => word + confidence.toFixed(2))));
await stream.acceptWaveform(48000, (await Resampler.create(44100, 48000)).accept(new Float32Array(441)));
await stream.inputFinished();
stream.reset();
await recognizer.transcribe(new Int16Array(1), 16000, { signal, beamSize: 4, vad: await Vad.open(new Uint8Array(1), { ort, minSilence: 1 }) }).catch((error) => error instanceof InferenceError && error.cause);
const microphone = await Microphone.open().catch((error: MicrophoneError) => { throw new Error(error.reason); });
microphone.addEventListener('samples', ({ detail }) => {
  try { stream.acceptWaveform(microphone.sampleRate, detail); } catch (error) { if (!(error instanceof AudioOverflowError)) throw error; }
});
serve({ ort });
(await WorkerRecognizer.fromBundle('model/', { worker: new Worker('worker.js') })).createStream({ search: 'attention' });
// @ts-expect-error: a stream has no signal; `reset` cancels it
recognizer.createStream({ signal });
// @ts-expect-error: the first argument must be the rate
stream.acceptWaveform(new Int16Array(1));
export default IntegrityError;
