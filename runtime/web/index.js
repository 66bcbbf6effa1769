/** Speech recognition with a u2moe bundle in browsers and in Node, on onnxruntime-web or onnxruntime-node. */

export { LanguageModel, Resampler } from './core.js';
export * from './errors.js';
export { Recognizer } from './recognizer.js';
export { Stream } from './stream.js';
export { Vad } from './vad.js';
