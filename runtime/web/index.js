/** Speech recognition with a u2moe bundle in browsers and in Node, on onnxruntime-web or onnxruntime-node. */

export { LanguageModel, Resampler } from './core.js';
export {
  AudioError, BundleError, InferenceError, IntegrityError, LanguageModelError, MicrophoneError, SignatureError, StreamError, U2moeError,
} from './errors.js';
export { Recognizer } from './recognizer.js';
export { Stream } from './stream.js';
export { Vad } from './vad.js';
