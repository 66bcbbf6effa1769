// What was recorded or opened, kept in this page to be played again.

export const RATE = 16000; // of what the page keeps to play again, and of what it sends

const PLAYED_S = 60;

// Of a microphone, which may stay open for hours. A file is kept whole.
export const KEPT_S = 600;

// Loops, here and where samples are added up: `from` and `reduce` make an object of each of thousands of samples a second.
export function int16(samples) {
  const result = new Int16Array(samples.length);
  for (let i = 0; i < samples.length; i++) result[i] = Math.max(-32768, Math.min(32767, Math.round(samples[i] * 32768)));
  return result;
}

export class Sound {
  constructor() {
    this.clear();
  }

  clear() {
    this.stop();
    this.blocks = [];
    this.length = 0;
  }

  push(samples, keptS = Infinity) {
    this.blocks.push({ start: this.length, samples });
    this.length += samples.length;
    while (this.length - this.blocks[0].start > keptS * RATE) this.blocks.shift();
  }

  get duration() {
    return this.length / RATE;
  }

  // Play from there, a minute at most; `onTime` is told the position, and null at the end. False if it is no longer kept.
  play(seconds, onTime) {
    this.stop();
    const begin = Math.max(0, Math.floor(seconds * RATE));
    const length = Math.min(this.length - begin, PLAYED_S * RATE);
    if (length <= 0 || begin < this.blocks[0].start) return false;
    this.context ??= new AudioContext();
    this.context.resume();
    const buffer = this.context.createBuffer(1, length, RATE);
    const target = buffer.getChannelData(0);
    for (const { start, samples } of this.blocks) {
      const from = Math.max(0, begin - start);
      for (let i = from; i < samples.length && start + i - begin < length; i++) target[start + i - begin] = samples[i] / 32768;
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

  get isPlaying() {
    return Boolean(this.source);
  }

  stop() {
    const source = this.source;
    this.source = null;
    source?.stop();
    this.onStop?.();
    this.onStop = null;
  }
}
