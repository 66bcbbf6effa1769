/** Errors that a program may want to tell apart. */

/** Base of all errors of this module. */
export class U2moeError extends Error {
  constructor(message) {
    super(message);
    this.name = new.target.name;
  }
}

/** Not a bundle, or one that this module cannot run. */
export class BundleError extends U2moeError {}

/** A file differs from its digest in the manifest. */
export class IntegrityError extends BundleError {}

/** Invalid samples or sample rate. */
export class AudioError extends U2moeError {}

/** A stream was used in a state that does not allow it. */
export class StreamError extends U2moeError {}
