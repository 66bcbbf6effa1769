/** Samples in, events out, as documented in `index.d.ts`. What is next is decided by the core; graphs are run here. */

import { Queue, checkRate, floats } from './arguments.js';
import { CTC, DECODER, ENCODER, FEATURES, VAD } from './core.js';
import { StreamError } from './errors.js';

export class Stream extends EventTarget {
  #open;
  #source;
  #queue;
  #work = Promise.resolve();

  /** @param recognition makes a `Recognition` of the core. @param vad a `Vad`, or null. @param maxQueueS see `Queue`. */
  constructor(graphs, recognition, vad, maxQueueS = null) {
    super();
    const emit = (type, detail) => this.dispatchEvent(new CustomEvent(type, { detail }));
    this.#open = () => new StreamState(graphs, recognition(), vad, emit);
    this.#queue = new Queue(maxQueueS);
    this.#source = this.#open();
  }

  acceptWaveform(sampleRate, samples) {
    checkRate(sampleRate);
    const all = floats(samples), source = this.#source;
    return this.#queue.hold(sampleRate, all, () => {
      source.accept(sampleRate, all.subarray(0, sampleRate));
      const rest = all.slice(sampleRate); // of which the core never has more than a second to hold
      return this.#soon(async () => {
        await source.decode();
        for (let start = 0; start < rest.length; start += sampleRate) await source.decode(() => source.append(sampleRate, rest.subarray(start, start + sampleRate)));
      });
    });
  }

  inputFinished() {
    const source = this.#source;
    source.finish();
    return this.#soon(() => source.decode(() => source.end()));
  }

  reset() {
    this.#source.discard();
    this.#queue.clear();
    this.#source = this.#open();
  }

  get result() {
    return this.#source.result;
  }

  #soon(work) {
    this.#work = this.#work.then(work, work); // a source that has failed fails again, another does not
    this.#work.catch(() => {}); // it is an event, too: nobody has to wait for the promise
    return this.#work;
  }
}

/** One source of a stream. */
class StreamState {
  #graphs;
  #recognition;
  #vad;
  #past; // of the detector
  #caches;
  #emit;
  #last = null; // the result after the end
  #isFinished = false;
  #isEnding = false; // all samples are there
  #isDiscarded = false;
  #isRunning = false;
  #failure = null;

  /** @param emit called with the type and the detail of each event. */
  constructor(graphs, recognition, vad, emit) {
    this.#graphs = graphs;
    this.#recognition = recognition;
    this.#vad = vad;
    this.#past = vad?.start();
    this.#emit = (type, detail) => this.#isDiscarded || emit(type, detail);
  }

  get result() {
    return this.#last ?? this.#recognition.result;
  }

  accept(sampleRate, samples) {
    if (this.#isFinished) throw new StreamError('the input of this stream is finished: reset it, or create another');
    this.append(sampleRate, samples);
  }

  append(sampleRate, samples) {
    if (!this.#failure && !this.#isDiscarded) this.#recognition.call('accept', sampleRate, samples); // nothing is kept that will never be recognised
  }

  finish() {
    if (this.#isFinished) throw new StreamError('the input of this stream is already finished');
    this.#isFinished = true;
  }

  end() {
    this.#recognition.call('finish');
    this.#isEnding = true;
  }

  /** Stop: no further event is emitted, and work in flight is dropped. */
  discard() {
    this.#isDiscarded = true;
    if (!this.#isRunning) this.#free();
  }

  #free() {
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
      await this.#decodeAll();
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
      for (let segment; (segment = this.#recognition.segment());) this.#emit('final', segment);
      const isBetween = ![CTC, DECODER].includes(request?.graph); // and no utterance is ending
      const result = (isNew && isBetween) || !request ? this.#recognition.result : null;
      if (isNew && isBetween && !result.isFinal) this.#emit('partial', result);
      if (!request) {
        if (result.isFinal && this.#isEnding) this.#last = result;
        break;
      }
      isNew = !isBetween;
      if (!this.#isDiscarded) await this.#run(request); // by a listener
    }
  }

  /** Run the graph that the core asks for, unless the source was discarded meanwhile: then its work ends here. */
  async #run({ graph, input, begins, kept, required, hyps, lens }) {
    const graphs = this.#graphs, recognition = this.#recognition;
    if (graph === DECODER) {
      const scores = await graphs.score(input, hyps, lens);
      if (!this.#isDiscarded) recognition.call('score', ...scores);
      return;
    }
    let output;
    if (graph === FEATURES) output = await graphs.features(input);
    if (graph === CTC) output = await graphs.ctc(input);
    if (graph === VAD) output = Float32Array.of(await this.#vad.probability(input, this.#past));
    if (graph === ENCODER) {
      const caches = begins ? graphs.start() : kept < 0 ? this.#caches : graphs.lastOf(this.#caches, kept);
      ({ output, caches: this.#caches } = await graphs.encode(input, caches, required));
    }
    if (!this.#isDiscarded) recognition.call('give', output);
  }
}
