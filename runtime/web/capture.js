// Runs in the audio thread. Averages the microphone's channels, and posts blocks of samples at the device's sample
// rate.

const BLOCK_LEN = Math.round(sampleRate / 5); // long blocks, since browsers are slow to collect the garbage of messages

class Capture extends AudioWorkletProcessor {
  #block = new Float32Array(BLOCK_LEN);
  #length = 0;

  constructor() {
    super();
    this.port.onmessage = () => this.#post(true); // any message requests the last block, even if it is incomplete
  }

  #post(isLast) {
    const samples = this.#block.slice(0, this.#length);
    this.port.postMessage({ samples, isLast }, [samples.buffer]);
    this.#length = 0;
  }

  process([channels]) {
    if (!channels?.length) return true;
    for (let i = 0; i < channels[0].length; i += 1) {
      let sum = 0;
      for (const channel of channels) sum += channel[i];
      this.#block[this.#length] = sum / channels.length;
      this.#length += 1;
      if (this.#length === BLOCK_LEN) this.#post(false);
    }
    return true;
  }
}

registerProcessor("capture", Capture);
