// Shows the segments. Arrow keys move between words; a click plays from a word.
//
// Words are text with the role of buttons, so they can be selected and copied. Elements for all words of many hours would
// need too much memory. So only segments in or near the visible part have elements for words. Other segments are plain
// text, which can still be read and searched. The browser skips the layout of this text.

const UNSURE = 0.5;
const NEAR = "100%"; // margin above and below, relative to the height of the transcript
const AT_END_PX = 60;
const KEPT = `u2moe-segments ${location.pathname} `; // prefix of storage keys; other pages of the host have other paths

export class Transcript {
  constructor(list, partial, onWord) {
    this.list = list;
    this.box = list.parentElement;
    this.partial = partial;
    this.onWord = onWord;
    this.segments = [];
    this.observer = new IntersectionObserver((entries) => this.look(entries), { root: this.box, rootMargin: `${NEAR} 0px` });
    this.isAtEnd = true;
    this.box.addEventListener("scroll", () => (this.isAtEnd = this.isNearEnd()));
    new ResizeObserver(() => this.isAtEnd && this.toEnd()).observe(this.box); // for example when a problem is shown
    list.addEventListener("click", (event) => getSelection().isCollapsed && this.choose(event.target.closest(".word")));
    list.addEventListener("keydown", (event) => this.walk(event));
  }

  // Restore the segments after a reload, or after the browser ended the page's process.
  restore() {
    for (let kept; (kept = stored((storage) => storage.getItem(KEPT + this.segments.length))); ) this.add(JSON.parse(kept));
  }

  clear() {
    this.observer.disconnect();
    stored((storage) => this.segments.forEach((_, number) => storage.removeItem(KEPT + number)));
    this.segments = [];
    this.list.replaceChildren();
    this.partial.textContent = "";
  }

  // Show a partial result. Committed words are as dark as those of segments.
  showPartial({ text, committed }) {
    const certain = document.createElement("span");
    certain.className = "committed";
    certain.textContent = committed;
    this.atEnd(() => this.partial.replaceChildren(certain, text.slice(committed.length)));
  }

  add(segment) {
    const time = document.createElement("time");
    time.textContent = clock(segment.start);
    time.dateTime = `PT${segment.start.toFixed(2)}S`;
    const item = document.createElement("li");
    item.append(time, document.createElement("p"));
    item.dataset.number = this.segments.length;
    stored((storage) => storage.setItem(KEPT + this.segments.length, JSON.stringify(segment)));
    this.segments.push(segment);
    this.fill(item);
    this.atEnd(() => {
      this.partial.textContent = "";
      this.list.append(item);
    });
    if (!this.list.querySelector('.word[tabindex="0"]')) this.choose(null, item.querySelector(".word"));
    this.observer.observe(item);
  }

  // Create the word elements of segments that come near, and remove those of distant segments. The word that Tab reaches
  // stays.
  look(entries) {
    for (const { target, isIntersecting } of entries) {
      const isWanted = isIntersecting || target.querySelector('[tabindex="0"], .playing');
      if (isIntersecting) this.fill(target);
      else if (!isWanted) target.lastChild.textContent = this.segmentOf(target).text;
      target.classList.toggle("far", !isWanted);
    }
  }

  segmentOf(item) {
    return this.segments[item.dataset.number];
  }

  fill(item) {
    if (item.querySelector(".word")) return;
    const { words, text } = this.segmentOf(item);
    const parts = words.length ? words.map(button) : [text];
    item.lastChild.replaceChildren(...parts.flatMap((part, index) => (index ? [" ", part] : [part])));
  }

  wordsOf(item) {
    if (item) this.fill(item);
    return item ? [...item.querySelectorAll(".word")] : [];
  }

  // Move between words with the arrow keys. Tab reaches only one word.
  walk(event) {
    const word = event.target.closest(".word"), item = word?.closest("li");
    if (!item) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.choose(word);
      return;
    }
    const words = this.wordsOf(item), index = words.indexOf(word);
    const next = {
      ArrowRight: () => words[index + 1] ?? this.wordsOf(item.nextElementSibling)[0],
      ArrowLeft: () => words[index - 1] ?? this.wordsOf(item.previousElementSibling).at(-1),
      Home: () => this.wordsOf(this.list.firstElementChild)[0],
      End: () => this.wordsOf(this.list.lastElementChild).at(-1),
    }[event.key];
    if (!next) return;
    event.preventDefault();
    const found = next() ?? word;
    this.choose(null, found);
    found.focus();
  }

  choose(clicked, focused = clicked) {
    if (!focused) return;
    for (const other of this.list.querySelectorAll('.word[tabindex="0"]')) other.tabIndex = -1;
    focused.tabIndex = 0;
    if (clicked) this.onWord(Number(clicked.dataset.start));
  }

  // Mark the word that is playing.
  mark(seconds) {
    const heard = (part) => seconds !== null && seconds >= part.start && seconds < part.end;
    const segment = this.segments.findIndex(heard);
    const item = this.list.children[segment];
    const word = this.wordsOf(item)[item ? this.segments[segment].words.findIndex(heard) : -1];
    for (const other of this.list.querySelectorAll(".playing")) if (other !== word) other.classList.remove("playing");
    word?.classList.add("playing");
  }

  // Make a change. Stay at the end of the transcript, unless the user has scrolled back.
  atEnd(change) {
    const isThere = this.isNearEnd();
    change();
    if (isThere) this.toEnd();
  }

  isNearEnd() {
    return this.box.scrollHeight - this.box.scrollTop - this.box.clientHeight < AT_END_PX;
  }

  toEnd() {
    this.box.scrollTop = this.box.scrollHeight;
  }
}

// Return the result of `use(storage)`, with the storage of the tab; null if the storage is full or forbidden.
function stored(use) {
  try {
    return use(sessionStorage);
  } catch {
    return null;
  }
}

function button({ word, start, end, confidence }) {
  const made = document.createElement("span");
  made.role = "button";
  made.className = confidence !== null && confidence < UNSURE ? "word unsure" : "word";
  made.textContent = word;
  made.dataset.start = start;
  made.style.setProperty("--confidence", confidence ?? 1);
  const sure = confidence === null ? "" : `, ${Math.round(confidence * 100)} % sure`;
  made.title = `${start.toFixed(2)} to ${end.toFixed(2)} s${sure}`;
  made.tabIndex = -1;
  return made;
}

function clock(seconds) {
  const whole = Math.floor(seconds);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}
