// Formats a transcript as text, JSON or subtitles. Subtitles are cut as on the server (u2moe.runtime.text.formats).

const LINE = 42; // maximum columns of a line
const LINES = 2;
const LEAST_MS = 1000;
const MOST_MS = 7000;
const PAUSE_MS = 2000; // longest pause within a cue
const GAP_MS = 83;
const COLUMNS_PER_S = 17;
const WIDE = /[\u1100-\u115f\u2e80-\u303e\u3041-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff01-\uff60\uffe0-\uffe6\u{20000}-\u{3fffd}]/u;

export const TYPES = { txt: "text/plain", srt: "application/x-subrip", vtt: "text/vtt", json: "application/json" };

export function format(segments, kind) {
  if (kind === "txt") return segments.map((segment) => `${segment.text}\n`).join("");
  if (kind === "json") return JSON.stringify({ segments }, null, 2) + "\n";
  const cues = makeCues(segments);
  if (kind === "vtt") return "WEBVTT\n" + cues.map((cue) => `\n${times(cue, ".")}\n${escape(cue.lines)}\n`).join("");
  return cues.map((cue, index) => `${index + 1}\n${times(cue, ",")}\n${cue.lines.join("\n")}\n`).join("\n");
}

function makeCues(segments) {
  const groups = segments.flatMap((segment) => cut(parts(segment)));
  const cues = [];
  groups.forEach((group, index) => {
    const start = Math.max(group[0].start, cues.at(-1)?.end ?? 0);
    const spoken = Math.max(group.at(-1).end, start + 1);
    let end = Math.max(spoken, start + Math.max(Math.ceil((1000 * columns(group)) / COLUMNS_PER_S), LEAST_MS));
    const next = groups[index + 1]?.[0].start;
    if (next !== undefined) end = Math.min(end, Math.max(Math.min(spoken, next), next - GAP_MS, start + 1));
    cues.push({ start, end, lines: wrap(group) });
  });
  return cues;
}

// Return the words with the space before each of them in the text. Words are never split.
function parts({ text, words }) {
  let position = 0;
  return words.map(({ word, start, end }) => {
    const found = text.indexOf(word, position);
    const space = found < 0 || /^\s|\s$/.test(text.slice(position, found)) ? " " : "";
    if (found >= 0) position = found + word.length;
    return { text: word, space, width: width(word), start: ms(start), end: Math.max(ms(start), ms(end)) };
  });
}

// Cut a segment into cues at the lowest cost. Few cues, cues that end at pauses and full cues cost least.
function cut(all) {
  const costs = [0], begins = [0];
  for (let end = 1; end <= all.length; end += 1) {
    let best = Infinity, bestBegin = end - 1;
    for (let begin = end - 1; begin >= 0; begin -= 1) {
      const group = all.slice(begin, end);
      if (group.length > 1 && !fits(group)) break;
      let cost = costs[begin] + 1 + Math.max(1 - columns(group) / (LINE * LINES), 0) ** 2;
      if (end < all.length) cost += 1 / (1 + Math.max(all[end].start - all[end - 1].end, 0) / 100);
      if (cost < best) [best, bestBegin] = [cost, begin];
    }
    costs.push(best);
    begins.push(bestBegin);
  }
  const groups = [];
  for (let end = all.length; end > 0; end = begins[end]) groups.unshift(all.slice(begins[end], end));
  return groups;
}

const fits = (group) =>
  group.at(-1).end - group[0].start <= MOST_MS && group[1].start - group[0].end <= PAUSE_MS && fill(group, LINE).length <= LINES;

// Wrap a cue into as few lines as possible. The lines have similar lengths, and lower lines are longer.
function wrap(group) {
  let lines = fill(group, LINE);
  for (let most = Math.floor(columns(group) / lines.length); most < LINE; most += 1) {
    const narrower = fill(group, most);
    if (narrower.length !== lines.length) continue;
    lines = narrower;
    break;
  }
  return lines.map((line) => line.map(({ space, text }) => space + text).join("").trim());
}

// Fill lines from the last word upwards.
function fill(group, most) {
  const lines = [[]];
  let taken = 0, space = 0;
  for (const part of group.toReversed()) {
    taken += part.width + space;
    space = part.space.length;
    if (taken > most && lines[0].length) {
      lines.unshift([]);
      taken = part.width;
    }
    lines[0].unshift(part);
  }
  return lines;
}

const columns = (group) => group.reduce((sum, { width, space }) => sum + width + space.length, 0) - group[0].space.length;
const ms = (seconds) => Math.max(Math.round(seconds * 1000), 0);
const times = (cue, mark) => `${clock(cue.start, mark)} --> ${clock(cue.end, mark)}`;

function width(text) {
  let sum = 0;
  for (const character of text) sum += /\p{M}/u.test(character) ? 0 : WIDE.test(character) ? 2 : 1;
  return sum;
}

function clock(time, mark) {
  const part = (value, length = 2) => String(Math.floor(value)).padStart(length, "0");
  return `${part(time / 3600000)}:${part((time / 60000) % 60)}:${part((time / 1000) % 60)}${mark}${part(time % 1000, 3)}`;
}

const escape = (lines) => lines.join("\n").replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
