/** The errors of this module. What is public is documented in `index.d.ts`. */

export class U2moeError extends Error {
  constructor(message, options) {
    super(message, options);
    this.name = new.target.name;
  }
}

export class BundleError extends U2moeError {}
export class IntegrityError extends BundleError {}
export class LanguageModelError extends U2moeError {}
export class InferenceError extends U2moeError {}
export class AudioError extends U2moeError {}
export class StreamError extends U2moeError {}

export class MicrophoneError extends U2moeError {
  constructor(message, { reason, ...options }) {
    super(message, options);
    this.reason = reason;
  }
}
