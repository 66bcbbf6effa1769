/**
 * Hotwords: phrases that the search prefers, as an Aho-Corasick automaton over text. A phrase is found in any tokenization,
 * but only as whole words; each character of a script without spaces, and of Korean, counts as a word.
 */

import { WORD_BOUNDARY, isSyllabic } from './text.js';

/** Bonus per token, as a log-probability, of a hotword without a weight. */
export const DEFAULT_WEIGHT = 1.5;
const MOST_WEIGHT = 100;
const UNREADABLE = '\0';

/** The bonus that hotwords add to the score of a hypothesis. */
export class ContextGraph {
  #next = [];
  #output = [];
  #partial = [];
  #fail;
  #afterBoundary;
  #spellings;
  #moves = new Map();

  /** @param hotwords phrases, or [phrase, weight] with a weight above 0 and at most 100. */
  constructor(hotwords, vocabulary) {
    this.#spellings = vocabulary.symbols.map(read);
    this.#addState();
    for (const { words, bonus } of bonuses(hotwords, vocabulary)) this.#addPhrase(words, bonus);
    this.#fail = this.#link();
    this.start = this.#next[0].get(WORD_BOUNDARY);
    this.#afterBoundary = new Set(this.#next.map((arcs) => arcs.get(WORD_BOUNDARY)));
  }

  /** [state after `token`, bonus of the phrases that it completes]. */
  advance(state, token) {
    const key = state * this.#spellings.length + token;
    let move = this.#moves.get(key);
    if (!move) {
      move = this.#read(state, this.#spellings[token]);
      if (this.#moves.size >= 1 << 18) this.#moves.clear();
      this.#moves.set(key, move);
    }
    return move;
  }

  /** The share of a bonus that a growing hypothesis holds in `state`. */
  partial(state) {
    return this.#partial[state];
  }

  /** The bonus of the phrases that are completed by ending in `state`. */
  finish(state) {
    return this.#read(state, WORD_BOUNDARY)[1];
  }

  #read(state, characters) {
    let bonus = 0;
    for (const character of characters) {
      if (character === WORD_BOUNDARY && this.#afterBoundary.has(state)) continue;
      while (state && !this.#next[state].has(character)) state = this.#fail[state];
      state = this.#next[state].get(character) ?? 0;
      bonus += this.#output[state];
    }
    return [state, bonus];
  }

  #addState() {
    this.#next.push(new Map());
    this.#output.push(0);
    this.#partial.push(0);
    return this.#next.length - 1;
  }

  #grow(state, character) {
    if (!this.#next[state].has(character)) this.#next[state].set(character, this.#addState());
    return this.#next[state].get(character);
  }

  #addPhrase(words, bonus) {
    const total = words.reduce((sum, word) => sum + [...word].length, 0);
    let state = 0, matched = 0;
    for (const character of WORD_BOUNDARY + words.join(WORD_BOUNDARY)) {
      state = this.#grow(state, character);
      matched += character !== WORD_BOUNDARY;
      this.#partial[state] = Math.max(this.#partial[state], (bonus * matched) / total);
    }
    this.#output[this.#grow(state, WORD_BOUNDARY)] = bonus;
  }

  /** For each state the longest proper suffix that begins a phrase; its bonuses are inherited. */
  #link() {
    const fail = this.#next.map(() => 0), queue = [...this.#next[0].values()];
    for (const state of queue) {
      this.#output[state] += this.#output[fail[state]];
      this.#partial[state] = Math.max(this.#partial[state], this.#partial[fail[state]]);
      for (const [character, following] of this.#next[state]) {
        let suffix = fail[state];
        while (suffix && !this.#next[suffix].has(character)) suffix = fail[suffix];
        fail[following] = this.#next[suffix].get(character) ?? 0;
        queue.push(following);
      }
    }
    return fail;
  }
}

/** Phrases as words in the characters of the vocabulary, each with its bonus; of equal ones the largest. */
function bonuses(hotwords, vocabulary) {
  const symbols = new Symbols(vocabulary), found = new Map();
  for (const hotword of hotwords) {
    const [phrase, weight] = Array.isArray(hotword) ? hotword : [hotword, DEFAULT_WEIGHT];
    if (typeof phrase !== 'string') throw new RangeError(`a hotword must be a phrase, got ${phrase}`);
    if (!(weight > 0 && weight <= MOST_WEIGHT)) {
      throw new RangeError(`hotword ${JSON.stringify(phrase)}: weight must be above 0 and at most 100, got ${weight}`);
    }
    const words = symbols.words(phrase);
    const bonus = weight * words.reduce((sum, word) => sum + symbols.numTokens(phrase, word), 0);
    const key = words.join(' ');
    if (!(found.get(key)?.bonus >= bonus)) found.set(key, { words, bonus });
  }
  if (!found.size) throw new RangeError('hotwords are empty: leave them out for none');
  return found.values();
}

/** The symbols of a vocabulary as parts of words. */
class Symbols {
  constructor({ symbols }) {
    const readable = symbols.filter((symbol) => !isSpecial(symbol));
    this.inner = new Set(readable.filter((symbol) => !symbol.startsWith(WORD_BOUNDARY) && !symbol.startsWith(' ')));
    const bare = (symbol) => symbol.replace(/^[\u2581 ]+|[\u2581 ]+$/g, '');
    this.first = new Set([...this.inner, ...readable.map(bare)]);
    this.characters = new Set([...this.first].flatMap((symbol) => [...symbol]));
    this.longest = Math.max(0, ...[...this.first].map((symbol) => [...symbol].length));
  }

  words(phrase) {
    const words = read(phrase).split(WORD_BOUNDARY).filter(Boolean);
    if (!words.length) throw new RangeError(`hotword ${JSON.stringify(phrase)} is empty`);
    return words.map((word) => [...word].map((character) => this.#character(phrase, character)).join(''));
  }

  /** Number of tokens in the shortest tokenization of a word. */
  numTokens(phrase, word) {
    const characters = [...word], fewest = [0, ...characters.map(() => Infinity)];
    for (let end = 1; end <= characters.length; end += 1) {
      for (let begin = Math.max(end - this.longest, 0); begin < end; begin += 1) {
        const part = characters.slice(begin, end).join('');
        if ((begin ? this.inner : this.first).has(part)) fewest[end] = Math.min(fewest[end], fewest[begin] + 1);
      }
    }
    if (fewest.at(-1) === Infinity) {
      throw new RangeError(`hotword ${JSON.stringify(phrase)}: the vocabulary cannot write ${JSON.stringify(word)}`);
    }
    return fewest.at(-1);
  }

  #character(phrase, character) {
    const form = [character, character.toUpperCase(), character.toLowerCase()].find((each) => this.characters.has(each));
    if (form === undefined) {
      throw new RangeError(`hotword ${JSON.stringify(phrase)}: the vocabulary has no ${JSON.stringify(character)}`);
    }
    return form;
  }
}

/** Characters of a symbol or phrase, with a boundary for spaces and around characters that count as words. */
function read(symbol) {
  if (isSpecial(symbol)) return UNREADABLE;
  let result = '';
  for (const character of [...symbol].map((each) => (isSyllabic(each) ? ` ${each} ` : each)).join('')) {
    const isBoundary = /\s/.test(character) || character === WORD_BOUNDARY;
    if (!(isBoundary && result.endsWith(WORD_BOUNDARY))) result += isBoundary ? WORD_BOUNDARY : character;
  }
  return result;
}

const isSpecial = (symbol) => [...symbol].length > 2 && symbol.startsWith('<') && symbol.endsWith('>');
