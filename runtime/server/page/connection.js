// Sends one source of audio to the server. After the connection is lost, connects again and sends all audio that has no
// final result yet.

import { RATE } from "./sound.js";

const MAX_KEPT = 600 * RATE;  // samples kept while the server is unreachable
const MAX_BUFFERED = 1 << 18;
const FULL = 1013;
const TOKEN = /^[\w!#$%&'*+.^`|~-]+$/;  // characters allowed in the name of a subprotocol

export class Recognition {
  // `on` has the callbacks {partial(result), final(result), state(name, detail), done(), problem(text)}.
  constructor({ hotwords, model, written, key, on }) {
    this.options = { sample_rate: RATE, hotwords, model, written };
    this.key = key;
    this.on = on;
    this.blocks = [];  // blocks {start, samples} that have no final result yet
    this.end = 0;  // number of samples pushed
    this.settled = 0;  // all samples before this one have final results
    this.sent = 0;
    this.tries = 0;
    this.isFinished = false;
    this.isOver = false;
    this.connect();
  }

  push(samples) {
    this.blocks.push({ start: this.end, samples });
    this.end += samples.length;
    while (this.end - this.blocks[0].start > MAX_KEPT) this.blocks.shift();
    this.flush();
  }

  finish() {
    this.isFinished = true;
    this.flush();
  }

  close() {
    this.isOver = true;
    clearTimeout(this.timer);
    this.socket?.close();
  }

  // Number of samples that are not sent yet. Sources such as files can wait while there are many.
  get waiting() {
    return this.end - this.sent + (this.socket?.bufferedAmount ?? 0) / 2;
  }

  connect() {
    const url = new URL("stream", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    const protocols = ["u2moe"];
    if (TOKEN.test(this.key ?? "")) protocols.push(`u2moe-api-key.${this.key}`);
    else if (this.key) url.searchParams.set("api_key", this.key);
    const socket = new WebSocket(url, protocols);
    this.socket = socket;
    this.isReady = false;
    this.base = this.settled;
    this.sent = this.base;
    this.failure = null;
    socket.onopen = () => socket.send(JSON.stringify(this.options));
    socket.onmessage = (message) => this.take(JSON.parse(message.data));
    socket.onclose = (event) => socket === this.socket && this.lost(event.code);
  }

  take(event) {
    if (event.type === "ready") {
      this.isReady = true;
      this.tries = 0;
      this.on.state("connected");
      this.flush();
    } else if (event.type === "partial") {
      this.on.partial(event);
    } else if (event.type === "final") {
      this.settle(event);
    } else if (event.type === "error") {
      this.failure = event;
    } else if (event.type === "done" && this.isFinished && this.wasEndSent) {
      this.isOver = true;
      this.on.done();
    }
  }

  settle(result) {
    const offset = this.base / RATE;
    const words = result.words.map((word) => ({ ...word, start: word.start + offset, end: word.end + offset }));
    this.settled = this.base + Math.round(result.end * RATE);
    while (this.blocks.length && this.blocks[0].start + this.blocks[0].samples.length <= this.settled) this.blocks.shift();
    this.on.final({ ...result, words, start: result.start + offset, end: result.end + offset });
  }

  flush() {
    if (!this.isReady || this.socket.readyState !== WebSocket.OPEN) return;
    for (const { start, samples } of this.blocks) {
      if (start + samples.length <= this.sent) continue;
      if (this.socket.bufferedAmount > MAX_BUFFERED) {
        clearTimeout(this.flushing);
        this.flushing = setTimeout(() => this.flush(), 50);
        return;
      }
      this.socket.send(samples.subarray(Math.max(0, this.sent - start)));
      this.sent = start + samples.length;
    }
    if (this.isFinished && !this.wasEndSent) {
      this.wasEndSent = true;
      this.socket.send(JSON.stringify({ type: "finish" }));
    }
  }

  // Connect again, at increasing intervals. After an error that the client caused, report it instead.
  lost(code) {
    if (this.isOver) return;
    this.isReady = false;
    this.wasEndSent = false;
    if (this.failure && code === 1008) {
      this.isOver = true;
      this.on.problem(this.failure.message);
      return;
    }
    const seconds = code === FULL ? 5 : Math.min(0.5 * 2 ** this.tries++, 5);
    this.on.state(code === FULL ? "full" : "lost", seconds);
    this.timer = setTimeout(() => this.connect(), seconds * 1000);
  }
}
