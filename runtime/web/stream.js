/** Samples in, events out, as documented in `index.d.ts`. What is next is decided by the core; graphs are run here. */

import { CTC, DECODER, ENCODER, FEATURES } from './core.js';
import { AudioError, StreamError } from './errors.js';

const LOUDEST = 8;
const SPEECH_RATE = 16000;

export class Stream extends EventTarget {
  #graphs;
  #open;
  #listen;
  #source;
  #work = Promise.resolve();

  /** @param open makes a `Recognition` of the core. @param listen what finds speech, {vad, past, finder, resampler(rate)}, or null. */
  constructor(graphs, open, listen) {
    super();
    this.#graphs = graphs;
    this.#open = open;
    this.#listen = listen;
    this.#source = this.#newSource();
  }

  acceptWaveform(sampleRate, samples) {
    const floats = asFloats(samples), second = Math.max(1, Math.floor(sampleRate)), source = this.#source;
    source.accept(sampleRate, floats.subarray(0, second));
    if (floats.length <= second) return this.#soon(() => source.decode());
    const rest = floats.slice(second); // of which the core never has more than a second to hold
    return this.#soon(async () => {
      await source.decode();
      for (let start = 0; start < rest.length; start += second) await source.decode(() => source.append(sampleRate, rest.subarray(start, start + second)));
    });
  }

  inputFinished() {
    const source = this.#source;
    source.finish();
    return this.#soon(() => source.decode(() => source.end()));
  }

  reset() {
    this.#source.discard();
    this.#source = this.#newSource();
  }

  get result() {
    return this.#source.result;
  }

  #newSource() {
    return new Source(this.#graphs, this.#open, this.#listen(), (type, detail) => this.dispatchEvent(new CustomEvent(type, { detail })));
  }

  #soon(work) {
    this.#work = this.#work.then(work, work); // a source that has failed fails again, another does not
    this.#work.catch(() => {}); // it is an event, too: nobody has to wait for the promise
    return this.#work;
  }
}

/** One source of a stream. */
class Source {
  #graphs;
  #open;
  #recognition;
  #listening; // what finds speech, if a detector is given; `Stream` of C++ does the same
  #resampler = null; // before it
  #rate = null;
  #begin = 0; // of the current stretch of speech, in seconds
  #first = 0; // number of its first segment
  #number = 0; // of the next segment
  #caches;
  #emit;
  #last = null; // the result after the end
  #isFinished = false;
  #isEnding = false; // all samples are there
  #isDiscarded = false;
  #isRunning = false;
  #failure = null;

  /** @param emit called with the type and the detail of each event. */
  constructor(graphs, open, listening, emit) {
    this.#graphs = graphs;
    this.#open = open;
    this.#recognition = open();
    this.#listening = listening;
    this.#caches = graphs.start();
    this.#emit = (type, detail) => this.#isDiscarded || emit(type, detail);
  }

  get result() {
    return this.#last ?? this.#presented(this.#recognition.result);
  }

  accept(sampleRate, samples) {
    if (this.#isFinished) throw new StreamError('the input of this stream is finished: reset it, or create another');
    if (!(sampleRate >= 1)) throw new AudioError(`sample rate must be between 1000 and 384000 Hz, got ${sampleRate}`);
    this.append(sampleRate, samples);
  }

  append(sampleRate, samples) {
    if (this.#failure || this.#isDiscarded) return; // nothing is kept that will never be recognised
    const { finder, resampler } = this.#listening ?? {};
    if (!finder) {
      this.#recognition.accept(sampleRate, samples);
      return;
    }
    this.#resampler ??= resampler(sampleRate);
    this.#rate ??= sampleRate;
    if (sampleRate !== this.#rate) throw new AudioError(`sample rate changed from ${this.#rate} to ${sampleRate} Hz in a stream`);
    finder.accept(this.#resampler.accept(samples));
  }

  finish() {
    if (this.#isFinished) throw new StreamError('the input of this stream is already finished');
    this.#isFinished = true;
  }

  end() {
    if (!this.#listening) this.#recognition.finish();
    else if (this.#resampler) this.#listening.finder.accept(this.#resampler.finish());
    this.#listening?.finder.finish();
    this.#isEnding = true;
  }

  /** Recognise the speech among what was heard, each stretch as a source of its own. */
  async #decodeSpeech() {
    const { vad, past, finder } = this.#listening;
    for (let window; !this.#isDiscarded && (window = finder.window());) finder.hear(await vad.probability(window, past));
    for (let speech; !this.#isDiscarded && (speech = finder.take());) {
      if (speech.begins) {
        this.#recognition.free();
        this.#recognition = this.#open();
        this.#caches = this.#graphs.start();
        this.#begin = speech.start / SPEECH_RATE;
        this.#first = this.#number;
      }
      this.#recognition.accept(SPEECH_RATE, speech.samples);
      if (speech.ends) this.#recognition.finish();
      await this.#decodeAll();
    }
    if (!this.#isEnding || this.#isDiscarded) return;
    if (!this.#recognition.result.isFinal) this.#recognition.finish(); // there was no speech
    await this.#decodeAll();
  }

  /** A result of the current stretch of speech as one of the source. */
  #presented(result) {
    if (!this.#listening) return result;
    const at = (seconds) => Math.round((seconds + this.#begin) * 1000) / 1000;
    const words = result.words.map((word) => ({ ...word, start: at(word.start), end: at(word.end) }));
    const times = result.times.map(at), ends = words.length ? { start: at(result.start), end: at(result.end) } : {};
    return { ...result, ...ends, words, times, segment: result.segment + this.#first };
  }

  /** Stop: no further event is emitted, and work in flight is dropped. */
  discard() {
    this.#isDiscarded = true;
    if (!this.#isRunning) this.#free();
  }

  #free() {
    this.#listening?.finder.free();
    this.#resampler?.free();
    this.#listening = this.#resampler = null;
    this.#recognition?.free();
    this.#recognition = null;
  }

  /** Recognise all that is complete. Calls must not overlap. After an error, later calls fail with it, too. */
  async decode(before = () => {}) {
    if (this.#isDiscarded || this.#last) return;
    if (this.#failure) throw this.#failure;
    this.#isRunning = true;
    try {
      before();
      await (this.#listening ? this.#decodeSpeech() : this.#decodeAll());
    } catch (error) {
      if (this.#isDiscarded) return;
      this.#failure = error;
      this.#emit('error', error);
      throw error;
    } finally {
      this.#isRunning = false;
      if (this.#isDiscarded || this.#last) this.#free();
    }
  }

  async #decodeAll() {
    for (let isNew = false; !this.#isDiscarded;) {
      const request = this.#recognition.next();
      for (let segment; (segment = this.#recognition.segment());) {
        this.#number += 1;
        this.#emit('final', this.#presented(segment));
      }
      const isBetween = !request || request.graph === FEATURES || request.graph === ENCODER; // and no utterance is ending
      const result = (isNew && isBetween) || !request ? this.#presented(this.#recognition.result) : null;
      if (isNew && isBetween && !result.isFinal) this.#emit('partial', result);
      if (!request) {
        if (result.isFinal && this.#isEnding) this.#last = result;
        break;
      }
      isNew = !isBetween || request.graph === CTC;
      if (!this.#isDiscarded) await this.#run(request); // by a listener
    }
  }

  /** Run the graph that the core asks for, unless the source was discarded meanwhile: then its work ends here. */
  async #run({ graph, input, kept, hyps, lens }) {
    const graphs = this.#graphs, recognition = this.#recognition;
    if (graph === DECODER) {
      const scores = await graphs.score(input, hyps, lens);
      if (!this.#isDiscarded) recognition.score(scores);
      return;
    }
    let output;
    if (graph === FEATURES) output = await graphs.features(input);
    if (graph === CTC) output = await graphs.ctc(input);
    if (graph === ENCODER) {
      const hasFullContext = recognition.chunkSize < 0;
      const caches = hasFullContext ? graphs.start() : kept < 0 ? this.#caches : graphs.lastOf(this.#caches, kept);
      const found = await graphs.encode(input, caches, hasFullContext ? 0 : recognition.required);
      this.#caches = hasFullContext ? caches : found.caches;
      output = found.output;
    }
    if (!this.#isDiscarded) recognition.give(output);
  }
}

function asFloats(samples) {
  if (samples instanceof Int16Array) {
    const floats = new Float32Array(samples.length); // `from` would make an object of each sample
    for (let index = 0; index < samples.length; index += 1) floats[index] = samples[index] / 32768;
    return floats;
  }
  if (!(samples instanceof Float32Array)) throw new AudioError('samples must be a Float32Array in [-1, 1] or an Int16Array');
  for (const sample of samples) {
    if (!(Math.abs(sample) <= LOUDEST)) throw new AudioError(`samples hold ${sample}, expected floats in [-1, 1]`);
  }
  return samples;
}
