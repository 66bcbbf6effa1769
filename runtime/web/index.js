/** Speech recognition with u2moe bundles in browsers and Node, with onnxruntime-web or onnxruntime-node. */

export { LanguageModel, Resampler } from './core.js';
export * from './errors.js';
export { Recognizer } from './recognizer.js';
export { Stream } from './stream.js';
export { Vad } from './vad.js';
