// Keeps sound from the microphone or a file in this page for playback.

export const RATE = 16000; // sample rate in Hz of sound that is kept or sent

const PLAYED_S = 60;
const BLOCK_LEN = 10 * RATE;

// Seconds of sound kept from a microphone, which may stay open for hours. Files are kept whole.
export const KEPT_S = 600;

// This loop and `rms` avoid `from` and `reduce`, which allocate an object for each sample.
export function int16(samples) {
  const result = new Int16Array(samples.length);
  for (let i = 0; i < samples.length; i++) result[i] = Math.max(-32768, Math.min(32767, Math.round(samples[i] * 32768)));
  return result;
}

export class Sound {
  constructor() {
    this.clear();
  }

  // Discard all sound. New sound starts after `seconds`.
  clear(seconds = 0) {
    this.stop();
    this.blocks = []; // blocks of BLOCK_LEN samples
    this.start = Math.ceil((seconds * RATE) / BLOCK_LEN) * BLOCK_LEN; // start of the first block, in samples
    this.length = this.start; // end of the sound, in samples
  }

  push(samples, keptS = Infinity) {
    for (let taken = 0; taken < samples.length; ) {
      const place = this.length % BLOCK_LEN;
      if (!place) this.blocks.push(this.emptyBlock(keptS));
      const part = samples.subarray(taken, taken + BLOCK_LEN - place);
      this.blocks.at(-1).set(part, place);
      this.length += part.length;
      taken += part.length;
    }
  }

  // Return a block for new sound. Blocks older than `keptS` seconds are dropped and reused, which bounds memory.
  emptyBlock(keptS) {
    let block;
    for (; this.blocks.length && this.length - this.start >= keptS * RATE; this.start += BLOCK_LEN) block = this.blocks.shift();
    return block ?? new Int16Array(BLOCK_LEN);
  }

  get duration() {
    return this.length / RATE;
  }

  // Play at most a minute. Call `onTime` with the position in seconds, and with null at the end. Return false if the sound is
  // no longer kept.
  play(seconds, onTime) {
    this.stop();
    const begin = Math.max(0, Math.floor(seconds * RATE));
    const length = Math.min(this.length - begin, PLAYED_S * RATE);
    if (length <= 0 || begin < this.start) return false;
    this.context ??= new AudioContext();
    this.context.resume();
    const buffer = this.context.createBuffer(1, length, RATE);
    const target = buffer.getChannelData(0);
    for (let i = 0; i < length; i++) {
      const place = begin + i - this.start;
      target[i] = this.blocks[Math.floor(place / BLOCK_LEN)][place % BLOCK_LEN] / 32768;
    }
    const source = new AudioBufferSourceNode(this.context, { buffer });
    source.connect(this.context.destination);
    source.start();
    const origin = this.context.currentTime;
    const tick = () => {
      if (this.source !== source) return;
      onTime(seconds + this.context.currentTime - origin);
      requestAnimationFrame(tick);
    };
    source.onended = () => this.source === source && this.stop();
    this.source = source;
    this.onStop = () => onTime(null);
    tick();
    return true;
  }

  stop() {
    const source = this.source;
    this.source = null;
    source?.stop();
    this.onStop?.();
    this.onStop = null;
  }
}
