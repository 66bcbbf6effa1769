/** The microphone of a page. */

export interface MicrophoneEventMap {
  /** Samples at `sampleRate`, five times a second. */
  samples: CustomEvent<Float32Array>;
  /** Another device replaced a lost one. The detail is the name of the new device. */
  change: CustomEvent<string>;
  /** Recording cannot continue: the device was removed, permission was withdrawn, or the browser failed. The detail is a
   * MicrophoneError. */
  ended: CustomEvent<Error>;
}

export class Microphone extends EventTarget {
  private constructor();
  /** Ask for permission and open the microphone, without noise suppression and similar processing. May reject with a
   * MicrophoneError. */
  static open(constraints?: MediaTrackConstraints): Promise<Microphone>;
  readonly sampleRate: number;
  /** Name of the device. */
  readonly label: string;
  /** Error that ended recording, or null. Check it after adding a listener, because recording may already have ended. */
  readonly failure: Error | null;
  /** Stop. The promise is fulfilled after the last `samples` event. */
  stop(): Promise<void>;
  /** Stop immediately. */
  close(): void;
  addEventListener<K extends keyof MicrophoneEventMap>(
    type: K, listener: (event: MicrophoneEventMap[K]) => void, options?: boolean | AddEventListenerOptions,
  ): void;
  addEventListener(type: string, listener: EventListenerOrEventListenerObject | null, options?: boolean | AddEventListenerOptions): void;
}
