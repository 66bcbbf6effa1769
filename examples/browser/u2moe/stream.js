/** One source of audio: samples in, partial and final results out. */

import { findCut } from './alignment.js';
import { PrefixBeamSearch } from './ctc.js';
import { Endpointer, SHORTEST_PAUSE_S } from './endpoint.js';
import { AudioError, StreamError } from './errors.js';
import { findPauses, loudness } from './pauses.js';
import { attentionRescoring, finalResult } from './second-pass.js';
import { FloatQueue, concatenated } from './sound/floats.js';
import { Resampler } from './sound/resampler.js';
import { Windows } from './windows.js';

const LOUDEST = 8;

/**
 * A stream of audio. Listen to its events: `partial` and `final`, whose `detail` is a result, and `error`, whose `detail` is
 * the error that ended it. Created by `Recognizer.createStream`.
 */
export class Stream extends EventTarget {
  #graphs;
  #manifest;
  #vocabulary;
  #options;
  #context;
  #resampler = null;
  #windows;
  #endpointer;
  #frameS;
  #caches;
  #levels = new FloatQueue(); // loudness from feature frame #levelsStart on
  #levelsStart = 0;
  #utterance;
  #finished = false;
  #work = Promise.resolve();
  #error = null;

  constructor({ graphs, manifest, vocabulary, options, context }) {
    super();
    this.#graphs = graphs;
    this.#manifest = manifest;
    this.#vocabulary = vocabulary;
    this.#options = options;
    this.#context = context;
    const { model, features } = manifest;
    this.#frameS = (model.subsampling_rate * features.frame_shift_ms) / 1000;
    this.#windows = new Windows(manifest, options.chunkSize, (samples) => graphs.features(samples));
    this.#endpointer = options.rules && new Endpointer(options.rules, this.#frameS, model.blank);
    this.#caches = graphs.start();
    this.#beginUtterance(0, 0);
  }

  /**
   * Append samples of one channel, Float32Array in [-1, 1] or Int16Array, any length, at a rate that stays the same. They are
   * recognised in the background; wait for the promise in order not to read a file faster than it can be recognised.
   */
  acceptWaveform(sampleRate, samples) {
    if (this.#finished) throw new StreamError('the input of this stream is finished: create another');
    if (this.#error) return this.#decodeSoon(); // nothing is kept that will never be recognised
    const resampler = this.#resampler ?? resamplerFor(sampleRate, this.#manifest.features.sample_rate);
    if (sampleRate !== resampler.sourceRate) {
      throw new AudioError(`sample rate changed from ${resampler.sourceRate} to ${sampleRate} Hz in a stream`);
    }
    const floats = asFloats(samples);
    this.#resampler = resampler;
    this.#windows.accept(resampler.accept(floats));
    return this.#decodeSoon();
  }

  /** Finish the input. The promise is fulfilled when the last result has been found. */
  inputFinished() {
    if (this.#finished) throw new StreamError('the input of this stream is already finished');
    if (this.#resampler) this.#windows.accept(this.#resampler.finish());
    this.#windows.finish();
    this.#finished = true;
    return this.#decodeSoon();
  }

  /** The partial result of the current utterance. */
  get result() {
    const best = this.#utterance.search.hypotheses(1)[0];
    return {
      text: this.#vocabulary.text(best.tokens),
      isFinal: false,
      segment: this.#utterance.number,
      tokens: best.tokens,
      times: best.times.map((time) => Number(((this.#utterance.start + time) * this.#frameS).toFixed(3))),
    };
  }

  #decodeSoon() {
    this.#work = this.#work.then(() => this.#decode()).catch((error) => {
      if (this.#error === null) this.dispatchEvent(new CustomEvent('error', { detail: error }));
      this.#error ??= error;
      throw error;
    });
    this.#work.catch(() => {}); // it is an event, too: nobody has to wait for the promise
    return this.#work;
  }

  async #decode() {
    if (this.#error) throw this.#error;
    while (this.#windows.ready) {
      await this.#advanceWindow();
      while (this.#utterance.endpoint) await this.#conclude();
      if (this.#utterance.hasNews) this.#emitPartial();
    }
    if (this.#finished && !this.#utterance.concluded) await this.#conclude();
  }

  async #advanceWindow() {
    const { window, added } = await this.#windows.take();
    this.#levels.append(loudness(added, this.#windows.numBins));
    const { output, caches } = await this.#graphs.encode(window, this.#caches, this.#options.required);
    this.#caches = caches;
    this.#advance({ output, logProbs: await this.#graphs.ctc(output) });
  }

  /** Add encoder frames to the current utterance, up to its end. */
  #advance(frames) {
    const utterance = this.#utterance, { vocab_size: vocab, output_size: dim } = this.#manifest.model;
    let { output, logProbs } = frames;
    utterance.endpoint = this.#endpointer?.advance(logProbs, vocab) ?? null;
    if (utterance.endpoint) {
      const num = utterance.endpoint.numFrames;
      utterance.surplus = { output: output.slice(num * dim), logProbs: logProbs.slice(num * vocab) };
      output = output.slice(0, num * dim);
      logProbs = logProbs.slice(0, num * vocab);
    }
    utterance.numFrames += output.length / dim;
    utterance.outputs.push(output);
    utterance.search.advance(logProbs, vocab);
    utterance.hasNews = true;
  }

  /** Give the current utterance its final result, and begin the next one where it ends. */
  async #conclude() {
    const utterance = this.#utterance, { endpoint } = utterance;
    if (endpoint && endpoint.trailingSilence * this.#frameS < SHORTEST_PAUSE_S) await this.#cut();
    const result = await this.#finalResult();
    const number = utterance.number + (result.text ? 1 : 0);
    if (endpoint) {
      const numFrames = utterance.surplus.output.length / this.#manifest.model.output_size;
      this.#caches = { ...this.#caches, offset: numFrames, att: this.#graphs.lastOf(this.#caches.att, numFrames) };
      this.#beginUtterance(number, utterance.start + utterance.numFrames);
      this.#advance(utterance.surplus);
    } else {
      utterance.concluded = true;
    }
    if (result.text) this.dispatchEvent(new CustomEvent('final', { detail: result }));
  }

  /** An utterance that ends within speech ends between two of its words instead, if there are two. */
  async #cut() {
    const utterance = this.#utterance, { vocab_size: vocab, output_size: dim, blank } = this.#manifest.model;
    const output = concatenated(...utterance.outputs), logProbs = await this.#graphs.ctc(output);
    const num = findCut(this.#vocabulary, utterance.search.hypotheses(1)[0].tokens, logProbs, vocab, blank);
    if (num === null) return;
    utterance.surplus = {
      output: concatenated(output.slice(num * dim), utterance.surplus.output),
      logProbs: concatenated(logProbs.slice(num * vocab), utterance.surplus.logProbs),
    };
    utterance.numFrames = num;
    utterance.outputs = [output.slice(0, num * dim)];
    utterance.search = this.#newSearch();
    utterance.search.advance(logProbs.slice(0, num * vocab), vocab);
  }

  async #finalResult() {
    const utterance = this.#utterance, output = concatenated(...utterance.outputs);
    utterance.search.finish();
    const hypotheses = utterance.search.hypotheses();
    let ranked = hypotheses.map((hypothesis) => (
      { hypothesis, score: hypothesis.score, attentionScore: null, probabilities: hypothesis.probabilities }));
    if (this.#options.rescore && output.length) {
      const scores = await this.#graphs.score(output, hypotheses.map((hypothesis) => hypothesis.tokens));
      ranked = attentionRescoring(hypotheses, scores, this.#options.ctcWeight, this.#options.reverseWeight);
    }
    return finalResult({
      ranked,
      utterance,
      pauses: this.#pauses(),
      vocabulary: this.#vocabulary,
      frameS: this.#frameS,
      calibration: this.#manifest.calibration,
      limit: this.#options.beamSize,
    });
  }

  /** Pauses in the current utterance, in seconds from the first sample of the stream. */
  #pauses() {
    const { model, features } = this.#manifest, begin = this.#utterance.start * this.#frameS;
    const levels = this.#levels.slice(0, this.#utterance.numFrames * model.subsampling_rate);
    return findPauses(levels, features.frame_shift_ms / 1000).map(([start, end]) => [begin + start, begin + end]);
  }

  #beginUtterance(number, start) {
    const first = start * this.#manifest.model.subsampling_rate;
    this.#levels.forget(first - this.#levelsStart);
    this.#levelsStart = first;
    this.#endpointer?.reset();
    this.#utterance = {
      number, start, numFrames: 0, outputs: [], search: this.#newSearch(), endpoint: null, surplus: null,
      concluded: false, hasNews: false,
    };
  }

  #newSearch() {
    return new PrefixBeamSearch(this.#options.beamSize, this.#manifest.model.blank, this.#context);
  }

  #emitPartial() {
    this.#utterance.hasNews = false;
    this.dispatchEvent(new CustomEvent('partial', { detail: this.result }));
  }
}

function resamplerFor(sourceRate, targetRate) {
  try {
    return new Resampler(sourceRate, targetRate);
  } catch (error) {
    throw new AudioError(error.message);
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
