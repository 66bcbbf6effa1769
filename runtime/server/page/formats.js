// The transcript as files: the text, subtitles of two lines of 42 characters, and everything.

const LINE = 42;
const CUE_S = 7;
const PAUSE_S = 1;

export const TYPES = { txt: "text/plain", srt: "application/x-subrip", vtt: "text/vtt", json: "application/json" };

export function format(segments, kind) {
  if (kind === "txt") return segments.map((segment) => `${segment.text}\n`).join("");
  if (kind === "json") return JSON.stringify({ segments }, null, 2) + "\n";
  const cues = segments.flatMap((segment) => cut(segment.words));
  if (kind === "vtt") return "WEBVTT\n" + cues.map((cue) => `\n${times(cue, ".")}\n${escape(cue.lines)}\n`).join("");
  return cues.map((cue, index) => `${index + 1}\n${times(cue, ",")}\n${cue.lines.join("\n")}\n`).join("\n");
}

function cut(words) {
  const cues = [];
  for (const word of words) {
    const cue = cues.at(-1);
    const fits = cue && word.end - cue.start <= CUE_S && word.start - cue.end <= PAUSE_S && add(cue.lines, word.word);
    if (fits) cue.end = word.end;
    else cues.push({ start: word.start, end: word.end, lines: [word.word] });
  }
  return cues;
}

function add(lines, word) {
  const line = `${lines.at(-1)} ${word}`;
  if (line.length <= LINE) lines[lines.length - 1] = line;
  else if (lines.length < 2) lines.push(word);
  else return false;
  return true;
}

const times = (cue, mark) => `${clock(cue.start, mark)} --> ${clock(cue.end, mark)}`;

function clock(seconds, mark) {
  const ms = Math.round(seconds * 1000);
  const part = (value, length = 2) => String(Math.floor(value)).padStart(length, "0");
  return `${part(ms / 3600000)}:${part((ms / 60000) % 60)}:${part((ms / 1000) % 60)}${mark}${part(ms % 1000, 3)}`;
}

const escape = (lines) => lines.join("\n").replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
