/** The errors of this module. */

/** Base of all errors of this module. */
export class U2moeError extends Error {
  /** @param options {cause}: the error of another library, if there is one. */
  constructor(message, options) {
    super(message, options);
    this.name = new.target.name;
  }
}

/** Not a bundle, or one that this module cannot run. */
export class BundleError extends U2moeError {}

/** A file differs from its digest in the manifest; `cause` says how. */
export class IntegrityError extends BundleError {}

/** A language model that is damaged, or none. */
export class LanguageModelError extends U2moeError {}

/** onnxruntime failed while it ran a graph, or gave what no graph of a bundle gives. */
export class InferenceError extends U2moeError {}

/** Invalid samples or sample rate. */
export class AudioError extends U2moeError {}

/** A stream was used in a state that does not allow it. */
export class StreamError extends U2moeError {}

/** The microphone cannot be opened; `reason` is 'insecure', 'refused', 'missing', 'busy' or 'failed'. */
export class MicrophoneError extends U2moeError {
  constructor(message, { reason, ...options }) {
    super(message, options);
    this.reason = reason;
  }
}
