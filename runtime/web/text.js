/** The vocabulary: turns token ids into text and words. */

import { BundleError } from './errors.js';

export const WORD_BOUNDARY = '\u2581';

const SPACELESS = [
  [0x2e80, 0x312f], [0x3190, 0x9fff], [0xf900, 0xfaff], [0xff66, 0xff9f], [0x1b000, 0x1b2ff], [0x20000, 0x3ffff],
];
const HANGUL = [[0x1100, 0x11ff], [0x3130, 0x318f], [0xa960, 0xa97f], [0xac00, 0xd7ff]];

function isWithin(symbol, ranges) {
  const characters = [...symbol];
  return characters.length > 0 && characters.every((character) => {
    const code = character.codePointAt(0);
    return ranges.some(([low, high]) => low <= code && code <= high);
  });
}

/** Whether a symbol belongs to a script without spaces, so that it is a word by itself. */
export const standsAlone = (symbol) => isWithin(symbol, SPACELESS);

/** Whether a symbol belongs to a script without spaces, or to Korean, whose words have endings. */
export const isSyllabic = (symbol) => isWithin(symbol, [...SPACELESS, ...HANGUL]);

/** Symbols in the order of their ids, from the lines of tokens.txt. */
export function parseTokens(content) {
  const symbols = [];
  for (const [index, raw] of content.replace(/^\ufeff/, '').split('\n').entries()) {
    const line = raw.replace(/\r$/, '');
    if (!line) continue;
    const cut = Math.max(line.lastIndexOf(' '), line.lastIndexOf('\t'));
    const digits = line.slice(cut + 1);
    if (cut < 1 || !/^\d{1,9}$/.test(digits)) {
      throw new BundleError(`tokens.txt: line ${index + 1} is ${JSON.stringify(line)}, expected 'symbol id'`);
    }
    if (symbols[+digits] !== undefined) throw new BundleError(`tokens.txt: line ${index + 1}: id ${digits} appears twice`);
    symbols[+digits] = line.slice(0, cut);
  }
  const missing = symbols.findIndex((symbol) => symbol === undefined);
  if (missing >= 0) throw new BundleError(`tokens.txt: no symbol has id ${missing}`);
  return symbols;
}

/** Symbols by id, and the rules for joining them. */
export class Vocabulary {
  constructor(symbols) {
    this.symbols = symbols;
  }

  /** Text of token ids, without leading and trailing spaces. */
  text(tokens) {
    const joined = Array.from(tokens, (token) => this.symbols[token]).join('');
    return joined.replaceAll(WORD_BOUNDARY, ' ').split(/\s+/).filter(Boolean).join(' ');
  }

  /** Words as {text, begin, end}: tokens `begin` to `end` (exclusive), split at boundaries and spaces. */
  words(tokens) {
    const words = [];
    let text = '', begin = 0, alone = false;
    for (const [index, token] of tokens.entries()) {
      const symbol = this.symbols[token].replaceAll(WORD_BOUNDARY, ' ');
      const bare = symbol.trim(), symbolAlone = standsAlone(bare);
      if (symbol.startsWith(' ') || symbolAlone || alone) {
        if (text) words.push({ text, begin, end: index });
        text = '';
      }
      if (!text) begin = index;
      text += bare;
      alone = symbolAlone || symbol.endsWith(' ');
    }
    if (text) words.push({ text, begin, end: tokens.length });
    return words;
  }
}
