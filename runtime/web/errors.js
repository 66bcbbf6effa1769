/** Errors of this module, documented in `index.d.ts`. Names are literals because bundlers rename classes. */

export class U2moeError extends Error { static { this.prototype.name = 'U2moeError'; } }
export class BundleError extends U2moeError { static { this.prototype.name = 'BundleError'; } }
export class IntegrityError extends BundleError { static { this.prototype.name = 'IntegrityError'; } }
export class SignatureError extends BundleError { static { this.prototype.name = 'SignatureError'; } }
export class LanguageModelError extends U2moeError { static { this.prototype.name = 'LanguageModelError'; } }
export class GrammarError extends U2moeError { static { this.prototype.name = 'GrammarError'; } }
export class InferenceError extends U2moeError { static { this.prototype.name = 'InferenceError'; } }
export class AudioError extends U2moeError { static { this.prototype.name = 'AudioError'; } }
export class AudioOverflowError extends AudioError { static { this.prototype.name = 'AudioOverflowError'; } }
export class StreamError extends U2moeError { static { this.prototype.name = 'StreamError'; } }

export class MicrophoneError extends U2moeError {
  static { this.prototype.name = 'MicrophoneError'; }

  constructor(message, { reason, ...options }) {
    super(message, options);
    this.reason = reason;
  }
}
