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

/** A file differs from its digest in the manifest. */
export class IntegrityError extends BundleError {}

/** onnxruntime failed while it ran a graph, or gave what no graph of a bundle gives. */
export class InferenceError extends U2moeError {}

/** Invalid samples or sample rate. */
export class AudioError extends U2moeError {}

/** A stream was used in a state that does not allow it. */
export class StreamError extends U2moeError {}
