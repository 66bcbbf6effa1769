/** The recognition of one source of audio, utterance by utterance. */

import { findCut } from './alignment.js';
import { PrefixBeamSearch } from './ctc.js';
import { Endpointer, SHORTEST_PAUSE_S } from './endpoint.js';
import { AudioError, StreamError } from './errors.js';
import { findPauses, loudness } from './pauses.js';
import { attentionRescoring, finalResult } from './second-pass.js';
import { FloatQueue, concatenated } from './sound/floats.js';
import { Padding } from './sound/padding.js';
import { Resampler } from './sound/resampler.js';
import { Windows } from './windows.js';

/** One source of a stream: its samples, caches and current utterance. */
export class Source {
  #graphs;
  #manifest;
  #vocabulary;
  #options;
  #context;
  #resampler = null;
  #padding;
  #numSamples = 0;
  #windows;
  #endpointer;
  #frameS;
  #caches;
  #levels = new FloatQueue(); // loudness from feature frame #levelsStart on
  #levelsStart = 0;
  #utterance;
  #finished = false;
  #failure = null;
  #isDiscarded = false;
  #emit;

  /** @param emit called with the type and the detail of each event. */
  constructor({ graphs, manifest, vocabulary, options, context }, emit) {
    this.#emit = (type, detail) => this.#isDiscarded || emit(type, detail);
    this.#graphs = graphs;
    this.#manifest = manifest;
    this.#vocabulary = vocabulary;
    this.#options = options;
    this.#context = context;
    const { model, features } = manifest;
    this.#frameS = (model.subsampling_rate * features.frame_shift_ms) / 1000;
    this.#windows = new Windows(manifest, options.chunkSize, (samples) => this.#wanted(graphs.features(samples)));
    this.#padding = new Padding(options.paddingS, features);
    this.#endpointer = options.rules && new Endpointer(options.rules, this.#frameS, model.blank);
    this.#caches = graphs.start();
    this.#beginUtterance(0, 0);
  }

  /** Append samples, a Float32Array of any length. */
  accept(sampleRate, samples) {
    if (this.#finished) throw new StreamError('the input of this stream is finished: reset it, or create another');
    if (this.#failure) return; // nothing is kept that will never be recognised
    const resampler = this.#resampler ?? resamplerFor(sampleRate, this.#manifest.features.sample_rate);
    if (sampleRate !== resampler.sourceRate) {
      throw new AudioError(`sample rate changed from ${resampler.sourceRate} to ${sampleRate} Hz in a stream`);
    }
    this.#resampler = resampler;
    this.#append(resampler.accept(samples));
  }

  finish() {
    if (this.#finished) throw new StreamError('the input of this stream is already finished');
    if (this.#resampler) this.#append(this.#resampler.finish());
    this.#windows.accept(this.#padding.finish());
    this.#windows.finish();
    this.#finished = true;
  }

  #append(samples) {
    this.#numSamples += samples.length;
    this.#windows.accept(this.#padding.accept(samples));
  }

  /** Stop: no further event is emitted, and work in flight is dropped. */
  discard() {
    this.#isDiscarded = true;
  }

  /** The partial result of the current utterance. */
  get result() {
    const best = this.#utterance.search.hypotheses(1)[0];
    return this.#presented({
      text: this.#vocabulary.text(best.tokens),
      isFinal: false,
      segment: this.#utterance.number,
      tokens: best.tokens,
      times: best.times.map((time) => Number(((this.#utterance.start + time) * this.#frameS).toFixed(3))),
    });
  }

  /** Recognise all complete windows. Calls must not overlap. After an error, later calls fail with it, too. */
  async decode() {
    if (this.#isDiscarded) return;
    if (this.#failure) throw this.#failure;
    try {
      await this.#decodeAll();
    } catch (error) {
      if (this.#isDiscarded) return;
      this.#failure = error;
      this.#emit('error', error);
      throw error;
    }
  }

  /** What a graph gives, unless the source was discarded meanwhile: then its work ends here. */
  async #wanted(computed) {
    const found = await computed;
    if (this.#isDiscarded) throw new StreamError('this stream was reset');
    return found;
  }

  async #decodeAll() {
    while (this.#windows.ready && !this.#isDiscarded) {
      await this.#advanceWindow();
      while (this.#utterance.endpoint) await this.#conclude();
      if (this.#utterance.hasNews) this.#emitPartial();
    }
    if (this.#finished && !this.#utterance.concluded) await this.#conclude();
  }

  async #advanceWindow() {
    const { window, added } = await this.#windows.take();
    this.#levels.append(loudness(added, this.#manifest.features));
    const { output, caches } = await this.#wanted(this.#graphs.encode(window, this.#caches, this.#options.required));
    this.#caches = caches;
    this.#advance({ output, logProbs: await this.#wanted(this.#graphs.ctc(output)) });
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
      const { output_size: dim, chunk_multiple: multiple } = this.#manifest.model;
      const numFrames = utterance.surplus.output.length / dim;
      this.#caches = this.#graphs.lastOf(this.#caches, numFrames - (numFrames % multiple));
      this.#beginUtterance(number, utterance.start + utterance.numFrames);
      this.#advance(utterance.surplus);
    } else {
      utterance.concluded = true;
    }
    if (result.text) this.#emit('final', result);
  }

  /** An utterance that ends within speech ends between two of its words instead, if there are two. */
  async #cut() {
    const utterance = this.#utterance, { vocab_size: vocab, output_size: dim, blank } = this.#manifest.model;
    const output = concatenated(...utterance.outputs), logProbs = await this.#wanted(this.#graphs.ctc(output));
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
      const scores = await this.#wanted(this.#graphs.score(output, hypotheses.map((hypothesis) => hypothesis.tokens)));
      ranked = attentionRescoring(hypotheses, scores, this.#options.ctcWeight, this.#options.reverseWeight);
    }
    return this.#presented(finalResult({
      ranked,
      utterance,
      pauses: this.#pauses(),
      vocabulary: this.#vocabulary,
      frameS: this.#frameS,
      calibration: this.#manifest.calibration,
      limit: this.#options.beamSize,
    }));
  }

  /** A result with times of the source, without the silence before it. */
  #presented(result) {
    if (!this.#options.paddingS) return result;
    // Whole milliseconds, as times are, and at the end none that has not begun.
    const rate = this.#manifest.features.sample_rate;
    const lead = Math.floor((this.#padding.numBefore * 1000 + Math.floor(rate / 2)) / rate) / 1000;
    const end = Math.floor((this.#numSamples * 1000) / rate) / 1000;
    const moved = (time) => Number(Math.min(Math.max(time - lead, 0), end).toFixed(3));
    const shown = { ...result, times: result.times.map(moved) };
    if (!result.isFinal) return shown;
    const words = result.words.map((word) => ({ ...word, start: moved(word.start), end: moved(word.end) }));
    return { ...shown, words, start: words[0]?.start ?? 0, end: words.at(-1)?.end ?? 0 };
  }

  /** Pauses in the current utterance, in seconds from its first frame. */
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
    this.#emit('partial', this.result);
  }
}

function resamplerFor(sourceRate, targetRate) {
  try {
    return new Resampler(sourceRate, targetRate);
  } catch (error) {
    throw new AudioError(error.message);
  }
}
