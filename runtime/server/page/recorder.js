// The microphone, in the audio thread: the device's own rate to 16 kHz, in blocks of 100 ms of int16.

const RATE = 16000;
const BLOCK_LEN = 1600;
const ZEROS = 16;  // zero crossings of the filter on each side
const STEPS = 512;  // entries of its table from one to the next

const FILTER = Float32Array.from({ length: ZEROS * STEPS + 2 }, (_, index) => {
  const x = index / STEPS;
  const sinc = x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
  return x < ZEROS ? sinc * (0.5 + 0.5 * Math.cos((Math.PI * x) / ZEROS)) : 0;
});

class Resampler {
  // A windowed sinc, evaluated where each output sample lies between input samples.
  constructor(rate) {
    this.step = rate / RATE;
    this.width = Math.max(1, this.step);
    this.reach = Math.ceil(ZEROS * this.width);
    this.kept = new Float32Array(this.reach);
    this.position = this.reach;  // of the next output sample, in samples of `kept`
  }

  accept(samples) {
    const all = new Float32Array(this.kept.length + samples.length);
    all.set(this.kept);
    all.set(samples, this.kept.length);
    const out = [];
    let position = this.position;
    for (; position + this.reach < all.length; position += this.step) out.push(this.at(all, position));
    const done = Math.max(0, Math.floor(position) - this.reach);
    this.kept = all.slice(done);
    this.position = position - done;
    return out;
  }

  at(samples, position) {
    let sum = 0;
    const first = Math.ceil(position - this.reach);
    for (let index = first; index <= position + this.reach; index++) {
      const place = Math.min(Math.abs(index - position) / this.width, ZEROS) * STEPS;
      sum += samples[index] * FILTER[Math.round(place)];
    }
    return sum / this.width;
  }
}

class Recorder extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = sampleRate === RATE ? null : new Resampler(sampleRate);
    this.block = new Int16Array(BLOCK_LEN);
    this.length = 0;
  }

  process([channels]) {
    if (!channels?.length) return true;
    const mono = channels[0].slice();
    for (const other of channels.slice(1)) for (let i = 0; i < mono.length; i++) mono[i] += other[i];
    for (const value of this.resampler ? this.resampler.accept(mono) : mono) {
      this.block[this.length++] = Math.max(-1, Math.min(1, value / channels.length)) * 32767;
      if (this.length === BLOCK_LEN) {
        this.port.postMessage(this.block);
        this.block = new Int16Array(BLOCK_LEN);
        this.length = 0;
      }
    }
    return true;
  }
}

registerProcessor("recorder", Recorder);
