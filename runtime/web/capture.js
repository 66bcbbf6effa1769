// Runs in the audio thread: averages the microphone's channels and posts blocks at the device's sample rate.

const BLOCK_LEN = Math.round(sampleRate / 5); // few messages: browsers are slow to collect their garbage

class Capture extends AudioWorkletProcessor {
  #block = new Float32Array(BLOCK_LEN);
  #length = 0;

  constructor() {
    super();
    // Any message requests the incomplete last block.
    this.port.onmessage = () => {
      this.port.postMessage({ last: this.#block.slice(0, this.#length) });
      this.#length = 0;
    };
  }

  process([channels]) {
    if (!channels?.length) return true;
    for (let i = 0; i < channels[0].length; i += 1) {
      let sum = 0;
      for (const channel of channels) sum += channel[i];
      this.#block[this.#length] = sum / channels.length;
      this.#length += 1;
      if (this.#length === BLOCK_LEN) {
        this.port.postMessage(this.#block, [this.#block.buffer]);
        this.#block = new Float32Array(BLOCK_LEN);
        this.#length = 0;
      }
    }
    return true;
  }
}

registerProcessor("capture", Capture);
