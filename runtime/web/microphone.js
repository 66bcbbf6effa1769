/** The microphone of a page: samples as events, whatever device there is. */

import { MicrophoneError } from './errors.js';

/** What makes calls pleasant takes from speech what a recogniser needs. */
const PLAIN_SOUND = { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false };
const LONGEST_FLUSH_MS = 500;
const REASONS = {
  NotFoundError: ['missing', 'There is no microphone.'],
  NotAllowedError: ['refused', "The microphone was refused. Allow it in the browser's settings of this page."],
  NotReadableError: ['busy', 'The microphone is used by another program. Close it, and try again.'],
};

/** Emits 'samples' (Float32Array at `sampleRate`), 'change' when another device takes over, and 'ended' when there is none. */
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
   * @param constraints for `getUserMedia`, such as {deviceId}.
   * @throws MicrophoneError which says in its message what the user can do.
   */
  static async open(constraints = {}) {
    const wanted = { ...PLAIN_SOUND, ...constraints }, media = await given(wanted);
    let context;
    try {
      context = new AudioContext(); // at the device's own rate: some browsers refuse a microphone at another
      await context.audioWorklet.addModule(new URL('./capture.js', import.meta.url));
      if (context.state === 'suspended') await context.resume();
      return new Microphone(context, media, wanted);
    } catch (error) {
      stopTracks(media);
      await context?.close();
      throw new MicrophoneError(`The microphone does not start: ${error.message}`, { reason: 'failed', cause: error });
    }
  }

  constructor(context, media, constraints) {
    super();
    this.#context = context;
    this.#constraints = constraints;
    this.#node = new AudioWorkletNode(context, 'capture', { numberOfOutputs: 0 });
    this.#node.port.onmessage = ({ data }) => {
      this.#emit('samples', data.last ?? data);
      if (data.last) this.#flushed();
    };
    this.#node.onprocessorerror = () => this.#end(new MicrophoneError('The microphone has stopped.', { reason: 'failed' }));
    // A call, for example, takes the sound from a page, which would wait for samples for ever.
    context.onstatechange = () => context.state === 'suspended' && !this.#stopping && context.resume().catch(() => {});
    this.#connect(media);
  }

  get sampleRate() {
    return this.#context.sampleRate;
  }

  /** The name of the device. */
  get label() {
    return this.#media.getAudioTracks()[0]?.label ?? '';
  }

  /** Ends it, after the last samples; a device that has gone may not have any. */
  stop() {
    this.#stopping ??= new Promise((resolve) => {
      this.#flushed = resolve;
      this.#node.port.postMessage('flush');
      setTimeout(resolve, LONGEST_FLUSH_MS);
    }).then(() => this.close());
    return this.#stopping;
  }

  /** Ends it at once. */
  close() {
    this.#stopping ??= Promise.resolve();
    this.#node.port.onmessage = null;
    stopTracks(this.#media);
    if (this.#context.state !== 'closed') this.#context.close();
  }

  #connect(media) {
    this.#media = media;
    this.#source?.disconnect();
    this.#source = this.#context.createMediaStreamSource(media); // resamples where the device has another rate
    this.#source.connect(this.#node);
    for (const track of media.getAudioTracks()) track.onended = () => this.#replace();
  }

  /** The device has gone, or permission was taken back: another one, if there is. */
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
    throw new MicrophoneError('Browsers give the microphone to pages over HTTPS and on localhost only.', { reason: 'insecure' });
  }
  try {
    return await mediaDevices.getUserMedia({ audio: constraints });
  } catch (cause) {
    const [reason, message] = REASONS[cause.name] ?? ['failed', `The microphone does not start: ${cause.message}`];
    throw new MicrophoneError(message, { reason, cause });
  }
}
