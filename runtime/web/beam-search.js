/**
 * CTC prefix beam search, frame by frame: prefixes as a tree, their alignments, and pruning. The results are those of the
 * Python runtime (and of WeNet, with its ties).
 */

const NEVER = -Infinity;
const FRAMES_BETWEEN_CLEANINGS = 32;

/** A token sequence as a node of a tree. Equal sequences share one node while any beam needs it. */
class Prefix {
  constructor(parent, token, state = 0) {
    this.parent = parent;
    this.token = token;
    this.state = state; // of the hotwords, after it
    this.earned = 0; // bonus of complete hotwords
    this.bonus = 0; // the same and the share of an incomplete one, for ranking
    this.children = new Map(); // a prefix may leave the beam and return while longer ones survive: it is then the same node
  }

  tokens() {
    const result = [];
    for (let node = this; node.parent; node = node.parent) result.push(node.token);
    return result.reverse();
  }
}

/**
 * A prefix and the log-probability of its alignments with the frames so far: of those that end in blank, of those that end
 * in its last token, and of the single best one with its peaks, a linked list of {before, frame, score}.
 */
class Beam {
  constructor(prefix) {
    this.prefix = prefix;
    this.blank = this.token = this.total = this.bestBlank = this.bestToken = NEVER;
    this.blankTimes = this.tokenTimes = null;
    this.order = 0;
  }

  /** Extend all alignments only by blank. */
  addBlank(score) {
    if (!(this.bestBlank > this.bestToken)) {
      this.bestBlank = this.bestToken;
      this.blankTimes = this.tokenTimes;
    }
    this.bestBlank += score;
    this.blank = this.total = this.total + score;
    this.token = this.bestToken = NEVER;
    this.tokenTimes = null;
  }

  get best() {
    return Math.max(this.bestToken, this.bestBlank);
  }

  get times() {
    return this.bestBlank > this.bestToken ? this.blankTimes : this.tokenTimes;
  }

  /** Frames at which the tokens peak, and their probabilities there. */
  peaks() {
    const times = [], probabilities = [];
    for (let node = this.times; node; node = node.before) {
      times.push(node.frame);
      probabilities.push(Math.min(Math.exp(node.score), 1));
    }
    return { times: times.reverse(), probabilities: probabilities.reverse() };
  }
}

/** The best prefixes from frame to frame; `beams` is best first. */
export class BeamSearch {
  constructor(beamSize, blank, context = null, ranksByBonus = false) {
    this.beamSize = beamSize;
    this.blank = blank;
    this.numFrames = 0;
    this.context = context;
    this.ranksByBonus = ranksByBonus;
    const root = new Beam(new Prefix(null, -1, context ? context.start : 0));
    root.blank = root.total = root.bestBlank = root.bestToken = 0;
    this.beams = [root];
  }

  /** Process one frame: its most probable tokens and their log-probabilities, in descending order. */
  advance(tokens, scores) {
    if (this.#nothingGrows(tokens, scores)) this.#stayAll(tokens, scores);
    else this.#advanceFrame(tokens, scores);
    this.numFrames += 1;
    if (this.numFrames % FRAMES_BETWEEN_CLEANINGS === 0) this.#forgetDead();
  }

  /** Keep only the earned bonus. */
  finish() {
    if (!this.context) return;
    for (const { prefix } of this.beams) prefix.bonus = prefix.earned + this.context.finish(prefix.state);
  }

  /** Whether blank is so probable that every prefix stays and none can enter the beam, as in most frames. */
  #nothingGrows(tokens, scores) {
    if (tokens[0] !== this.blank || this.beams.length < this.beamSize || this.ranksByBonus) return false;
    const grown = scores.length > 1 ? this.beams[0].total + scores[1] : NEVER;
    return grown < this.beams.at(-1).total + scores[0];
  }

  #stayAll(tokens, scores) {
    const moved = [];
    for (const [index, beam] of this.beams.entries()) {
      const rank = tokens.indexOf(beam.prefix.token);
      if (rank < 0) continue;
      const parent = this.beams.findIndex((other) => other.prefix === beam.prefix.parent);
      moved.push([index, this.#stay(index, parent, rank, 0, scores)]);
    }
    for (const beam of this.beams) beam.addBlank(scores[0]);
    for (const [index, beam] of moved) this.beams[index] = beam;
    if (moved.length) this.beams.sort((one, other) => other.total - one.total);
  }

  #advanceFrame(tokens, scores) {
    const { beams } = this, width = 2 * beams.length;
    const rankOf = new Map(tokens.map((token, rank) => [token, rank]));
    const indexOf = new Map(beams.map((beam, index) => [beam.prefix, index]));
    const blankRank = rankOf.get(this.blank) ?? -1;
    const kept = [], merged = new Set();
    for (const [index, beam] of beams.entries()) {
      const parent = beam.prefix.parent ? indexOf.get(beam.prefix.parent) ?? -1 : -1;
      const rank = rankOf.get(beam.prefix.token) ?? -1;
      if (parent >= 0 && rank >= 0) merged.add(parent * tokens.length + rank);
      const stayed = this.#stay(index, parent, rank, blankRank, scores);
      if (stayed.total > NEVER) kept.push(stayed);
    }
    // Without a bonus, whatever is below this cannot be among the best. (Equal scores can: order decides.)
    const isFull = kept.length >= this.beamSize && !this.ranksByBonus;
    const limit = isFull ? Math.min(...kept.map((beam) => beam.total)) : NEVER;
    const candidates = kept.map((beam) => ({ score: beam.total + this.#rankingBonus(beam.prefix), order: beam.order, beam }));
    for (const [index, parent] of beams.entries()) {
      for (const [rank, token] of tokens.entries()) {
        if (parent.total + scores[rank] < limit) break;
        if (token === this.blank || merged.has(index * tokens.length + rank)) continue;
        const total = (token === parent.prefix.token ? parent.blank : parent.total) + scores[rank];
        if (!(total >= limit && total > NEVER)) continue;
        const prefix = this.ranksByBonus ? this.#child(parent.prefix, token) : null;
        const score = total + (prefix ? prefix.bonus : 0);
        candidates.push({ score, order: rank * width + 2 * index + 1, beam: null, parent, token, total, growth: scores[rank], prefix });
      }
    }
    candidates.sort((one, other) => other.score - one.score || one.order - other.order);
    this.beams = candidates.slice(0, this.beamSize).map((candidate) => candidate.beam ?? this.#grown(candidate));
  }

  #rankingBonus(prefix) {
    return this.ranksByBonus ? prefix.bonus : 0;
  }

  #grown({ parent, token, total, growth, order, prefix }) {
    const beam = new Beam(prefix ?? this.#child(parent.prefix, token));
    this.#grow(beam, parent, growth);
    beam.total = total;
    beam.order = order;
    return beam;
  }

  /** Prefix `index` after this frame: its alignments add blank, repeat its last token, or extend those of its parent. */
  #stay(index, parent, rank, blankRank, scores) {
    const old = this.beams[index], beam = new Beam(old.prefix), width = 2 * this.beams.length;
    beam.order = width * scores.length;
    if (blankRank >= 0) {
      beam.blank = old.total + scores[blankRank];
      beam.bestBlank = old.best + scores[blankRank];
      beam.blankTimes = old.times;
      beam.order = blankRank * width + 2 * index;
    }
    if (rank >= 0) {
      const score = scores[rank], repeats = old.bestToken + score;
      if (parent >= 0 && parent < index) {
        this.#grow(beam, this.beams[parent], score);
        beam.order = Math.min(beam.order, rank * width + 2 * parent + 1);
      }
      beam.token = logAdd(beam.token, old.token + score);
      if (beam.bestToken < repeats) {
        // The peak moves to this frame, unless the token was already reached from the parent in this frame.
        if (beam.bestToken === NEVER && old.tokenTimes) {
          beam.tokenTimes = { before: old.tokenTimes.before, frame: this.numFrames, score };
        }
        beam.bestToken = repeats;
      }
      if (parent > index) this.#grow(beam, this.beams[parent], score);
      beam.order = Math.min(beam.order, rank * width + 2 * index);
    }
    beam.total = logAdd(beam.blank, beam.token);
    return beam;
  }

  /** Add to a beam the alignments of its parent extended by its token. */
  #grow(beam, parent, score) {
    let { total, best, times } = parent;
    if (parent.prefix.token === beam.prefix.token) { // the same token again: only after a blank
      total = parent.blank;
      best = parent.bestBlank;
      times = parent.blankTimes;
    }
    beam.token = logAdd(beam.token, total + score);
    if (beam.bestToken < best + score) {
      beam.bestToken = best + score;
      beam.tokenTimes = { before: times, frame: this.numFrames, score };
    }
  }

  #child(parent, token) {
    if (parent.children.has(token)) return parent.children.get(token);
    const prefix = new Prefix(parent, token);
    if (this.context) {
      const [state, bonus] = this.context.advance(parent.state, token);
      prefix.state = state;
      prefix.earned = parent.earned + bonus;
      prefix.bonus = prefix.earned + this.context.partial(state);
    }
    parent.children.set(token, prefix);
    return prefix;
  }

  /** Cut off the branches without a beam. (Weak references would live on while promises follow promises.) */
  #forgetDead() {
    const alive = new Set();
    for (const { prefix } of this.beams) for (let node = prefix; node && !alive.has(node); node = node.parent) alive.add(node);
    for (const node of alive) for (const [token, child] of node.children) if (!alive.has(child)) node.children.delete(token);
  }
}

function logAdd(a, b) {
  const [high, low] = a < b ? [b, a] : [a, b];
  return low === NEVER ? high : high + Math.log1p(Math.exp(low - high));
}
