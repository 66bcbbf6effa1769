/** Speech recognition with a u2moe bundle in browsers and in Node, on onnxruntime-web or onnxruntime-node. */

export { AudioError, BundleError, InferenceError, IntegrityError, StreamError, U2moeError } from './errors.js';
export { DEFAULT_RULES } from './endpoint.js';
export { Recognizer } from './recognizer.js';
export { Resampler } from './sound/resampler.js';
export { Stream } from './stream.js';
