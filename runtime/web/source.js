/** Turns samples into results. The core decides which graph to run next, and this module runs it. */

import { CTC, DECODER, ENCODER, VAD } from './core.js';
import { StreamError } from './errors.js';

/** One source of a stream, recognised in this thread. */
export class Source {
  #past; // state of the detector
  #caches;
  #emit;
  #last = null; // result after the end of the input
  #isFinished = false;
  #isEnding = false; // all samples have been accepted
  #isDiscarded = false;
  #isRunning = false;
  #failure = null;
  #work = Promise.resolve();

  /** @param emit called with the type and detail of each event. */
  constructor(graphs, recognition, vad, emit) {
    Object.assign(this, { graphs, recognition, vad });
    this.#past = vad?.start();
    this.#emit = (type, detail) => this.#isDiscarded || emit(type, detail);
  }

  get result() {
    return this.#last ?? this.recognition.result;
  }

  /** Pass the first second of audio to the core now, so that this call throws if samples are invalid. Pass later audio in
   * parts of one second, each after the previous part is recognised. */
  accept(sampleRate, samples) {
    if (this.#isFinished) throw new StreamError('the input is finished: reset the stream, or create another');
    this.#append(sampleRate, samples.subarray(0, sampleRate));
    const rest = samples.slice(sampleRate);
    return this.#soon(async () => {
      await this.#decode();
      for (let n = 0; n < rest.length; n += sampleRate) await this.#decode(() => this.#append(sampleRate, rest.subarray(n, n + sampleRate)));
    });
  }

  finish() {
    if (this.#isFinished) throw new StreamError('the input of this stream is already finished');
    this.#isFinished = true;
    return this.#soon(() => this.#decode(() => {
      this.recognition.call('finish');
      this.#isEnding = true;
    }));
  }

  /** Queue work. After an error, all later work fails with the same error. */
  #soon(work) {
    this.#work = this.#work.then(work, work);
    return this.#work;
  }

  #append(sampleRate, samples) {
    if (!this.#failure && !this.#isDiscarded) this.recognition.call('accept', sampleRate, samples); // after a failure or reset they would never be recognised
  }

  /** Emit no more events, and drop work in progress. */
  discard() {
    this.#isDiscarded = true;
    if (!this.#isRunning) this.#free();
  }

  #free() {
    this.recognition?.free();
    this.recognition = null;
  }

  /** Call `before`, then recognise all complete chunks. */
  async #decode(before = () => {}) {
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
      const request = this.recognition.next();
      for (let segment; (segment = this.recognition.segment());) this.#emit('final', segment);
      const isBetween = ![CTC, DECODER].includes(request?.graph); // the next graph does not belong to the end of an utterance
      const result = (isNew && isBetween) || !request ? this.recognition.result : null;
      if (isNew && isBetween && !result.isFinal) this.#emit('partial', result);
      if (!request) {
        if (result.isFinal && this.#isEnding) this.#last = result;
        break;
      }
      isNew = !isBetween;
      if (!this.#isDiscarded) await this.#run(request); // a listener may have discarded the source
    }
  }

  /** Run the graph that the core requested. If the source is discarded meanwhile, drop the output. */
  async #run({ graph, input, begins, kept, required, hyps, lens }) {
    const graphs = this.graphs, recognition = this.recognition;
    let output;
    if (graph === DECODER) output = await graphs.score(input, hyps, lens); // an array of arguments for `score`
    if (graph === CTC) output = await graphs.ctc(input);
    if (graph === VAD) output = Float32Array.of(await this.vad.probability(input, this.#past));
    if (graph === ENCODER) {
      const caches = begins ? graphs.start() : kept < 0 ? this.#caches : graphs.lastOf(this.#caches, kept);
      ({ output, caches: this.#caches } = await graphs.encode(input, caches, required));
    }
    if (!this.#isDiscarded) recognition.call(graph === DECODER ? 'score' : 'give', ...[output].flat());
  }
}
