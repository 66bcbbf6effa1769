/** The microphone of a page. It emits events with samples, and switches to another device if its device is removed. */

import { MicrophoneError } from './errors.js';

/** Constraints that turn off processing meant for calls, because it removes parts of the signal that recognition needs. */
const PLAIN_SOUND = { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false };
const LONGEST_FLUSH_MS = 500;
const REASONS = {
  NotFoundError: ['missing', 'No microphone was found.'],
  NotAllowedError: ['refused', "Access to the microphone was denied. Allow it in the browser's settings for this page."],
  NotReadableError: ['busy', 'Another program is using the microphone. Close that program and try again.'],
};

/**
 * Emits 'samples' with a Float32Array at `sampleRate`, and 'change' when another device replaces a lost one.
 * Emits 'ended' when recording cannot continue, for example after the only device was removed.
 */
export class Microphone extends EventTarget {
  #context;
  #node;
  #media;
  #source;
  #constraints;
  #flushed = () => {};
  #stopping = null;
  failure = null;

  /**
   * @param constraints constraints for `getUserMedia`, such as {deviceId}.
   * @throws MicrophoneError the microphone cannot be opened. The message tells the user what to do.
   */
  static async open(constraints = {}) {
    const wanted = { ...PLAIN_SOUND, ...constraints }, media = await given(wanted);
    let context;
    try {
      context = new AudioContext(); // at the device's rate, since some browsers reject other rates
      await context.audioWorklet.addModule(new URL('./capture.js', import.meta.url));
      if (context.state === 'suspended') await context.resume();
      return new Microphone(context, media, wanted);
    } catch (error) {
      stopTracks(media);
      await context?.close();
      throw new MicrophoneError(`The microphone failed to start: ${error.message}`, { reason: 'failed', cause: error });
    }
  }

  constructor(context, media, constraints) {
    super();
    this.#context = context;
    this.#constraints = constraints;
    this.#node = new AudioWorkletNode(context, 'capture', { numberOfOutputs: 0 });
    this.#node.port.onmessage = ({ data }) => {
      this.#emit('samples', data.samples);
      if (data.isLast) this.#flushed();
    };
    this.#node.onprocessorerror = () => this.#end(new MicrophoneError('The microphone has stopped.', { reason: 'failed' }));
    // A phone call or another program may suspend the context. Resume it; otherwise, no more samples arrive.
    context.onstatechange = () => context.state === 'suspended' && !this.#stopping && context.resume().catch(() => {});
    this.#connect(media);
  }

  get sampleRate() {
    return this.#context.sampleRate;
  }

  /** Name of the device. */
  get label() {
    return this.#media.getAudioTracks()[0]?.label ?? '';
  }

  /** Stop after the last samples. If the device was removed and sends no samples, stop after a timeout. */
  stop() {
    this.#stopping ??= new Promise((resolve) => {
      this.#flushed = resolve;
      this.#node.port.postMessage('flush');
      setTimeout(resolve, LONGEST_FLUSH_MS);
    }).then(() => this.close());
    return this.#stopping;
  }

  /** Stop immediately. */
  close() {
    this.#stopping ??= Promise.resolve();
    this.#node.port.onmessage = null;
    stopTracks(this.#media);
    if (this.#context.state !== 'closed') this.#context.close();
  }

  #connect(media) {
    this.#media = media;
    this.#source?.disconnect();
    this.#source = this.#context.createMediaStreamSource(media); // resamples if the device has another rate
    this.#source.connect(this.#node);
    for (const track of media.getAudioTracks()) track.onended = () => this.#replace();
  }

  /** When the device in use is removed or permission is withdrawn, switch to another device if there is one. */
  async #replace() {
    if (this.#stopping) return;
    try {
      const { deviceId: _, ...others } = this.#constraints, media = await given(others);
      if (this.#stopping) stopTracks(media);
      else this.#connect(media);
      this.#emit('change', this.label);
    } catch (error) {
      this.#end(error);
    }
  }

  #end(error) {
    this.failure = error;
    this.#emit('ended', error);
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

function stopTracks(media) {
  media.getTracks().forEach((track) => track.stop());
}

async function given(constraints) {
  const { mediaDevices } = navigator;
  if (!mediaDevices?.getUserMedia) {
    throw new MicrophoneError('Browsers allow microphone access only over HTTPS or on localhost.', { reason: 'insecure' });
  }
  try {
    return await mediaDevices.getUserMedia({ audio: constraints });
  } catch (cause) {
    const [reason, message] = REASONS[cause.name] ?? ['failed', `The microphone failed to start: ${cause.message}`];
    throw new MicrophoneError(message, { reason, cause });
  }
}
