// Segments on the page: words one can read, hover over, walk through by arrow keys and click to listen.

const UNSURE = 0.5;

export class Transcript {
  constructor(list, partial, onWord) {
    this.list = list;
    this.partial = partial;
    this.onWord = onWord;
    this.segments = [];
    list.addEventListener("click", (event) => this.choose(event.target.closest(".word")));
    list.addEventListener("keydown", (event) => this.walk(event));
  }

  clear() {
    this.segments = [];
    this.list.replaceChildren();
    this.partial.textContent = "";
  }

  showPartial(text) {
    this.partial.textContent = text;
    this.scroll();
  }

  add(segment) {
    this.partial.textContent = "";
    this.segments.push(segment);
    const time = document.createElement("time");
    time.textContent = clock(segment.start);
    time.dateTime = `PT${segment.start.toFixed(2)}S`;
    const text = document.createElement("p");
    const parts = segment.words.length ? segment.words.map((word) => this.word(word)) : [segment.text];
    text.append(...parts.flatMap((part, index) => (index ? [" ", part] : [part])));
    const item = document.createElement("li");
    item.append(time, text);
    this.list.append(item);
    this.scroll();
  }

  word({ word, start, end, confidence }) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = confidence !== null && confidence < UNSURE ? "word unsure" : "word";
    button.textContent = word;
    button.dataset.start = start;
    button.dataset.end = end;
    button.style.setProperty("--confidence", confidence ?? 1);
    const sure = confidence === null ? "" : `, ${Math.round(confidence * 100)} % sure`;
    button.title = `${start.toFixed(2)} to ${end.toFixed(2)} s${sure}`;
    button.tabIndex = this.list.querySelector(".word") ? -1 : 0;
    return button;
  }

  // One word at a time can be reached by Tab, the others by arrows from there.
  walk(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (!step) return;
    const words = [...this.list.querySelectorAll(".word")];
    const index = Math.max(0, Math.min(words.length - 1, words.indexOf(document.activeElement) + step));
    event.preventDefault();
    this.choose(null, words[index]);
    words[index]?.focus();
  }

  choose(clicked, focused = clicked) {
    if (!focused) return;
    for (const other of this.list.querySelectorAll('.word[tabindex="0"]')) other.tabIndex = -1;
    focused.tabIndex = 0;
    if (clicked) this.onWord(Number(clicked.dataset.start));
  }

  // Which word is heard now.
  mark(seconds) {
    for (const word of this.list.querySelectorAll(".playing")) word.classList.remove("playing");
    if (seconds === null) return;
    const heard = (word) => seconds >= Number(word.dataset.start) && seconds < Number(word.dataset.end);
    [...this.list.querySelectorAll(".word")].find(heard)?.classList.add("playing");
  }

  scroll() {
    const box = this.list.parentElement;
    box.scrollTop = box.scrollHeight;
  }
}

function clock(seconds) {
  const whole = Math.floor(seconds);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}
