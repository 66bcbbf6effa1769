/** The microphone of a page. */

export interface MicrophoneEventMap {
  /** At `sampleRate`, five times a second. */
  samples: CustomEvent<Float32Array>;
  /** The device has gone, and another, whose name is the detail, has taken over. */
  change: CustomEvent<string>;
  /** The device has gone, permission was taken back, or the browser failed; the detail is a MicrophoneError. */
  ended: CustomEvent<Error>;
}

export class Microphone extends EventTarget {
  private constructor();
  /** Asks for permission, without noise suppression and the like. Rejected with a MicrophoneError. */
  static open(constraints?: MediaTrackConstraints): Promise<Microphone>;
  readonly sampleRate: number;
  /** Name of the device. */
  readonly label: string;
  /** Why it has ended, which may be before anybody listens. */
  readonly failure: Error | null;
  /** Ends it; fulfilled after the last samples. */
  stop(): Promise<void>;
  /** Ends it at once. */
  close(): void;
  addEventListener<K extends keyof MicrophoneEventMap>(
    type: K, listener: (event: MicrophoneEventMap[K]) => void, options?: boolean | AddEventListenerOptions,
  ): void;
  addEventListener(type: string, listener: EventListenerOrEventListenerObject | null, options?: boolean | AddEventListenerOptions): void;
}
