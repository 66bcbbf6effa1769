// Uploads a file. The server recognises the file with full context, as the command line does.

export class FileRecognition {
  waiting = 0;

  // `on` has the callbacks {progress(text), final(result), done(), problem(text)}.
  constructor(file, { hotwords, model, key, written, on }) {
    this.file = file;
    this.on = on;
    this.taken = 0; // characters of the response read so far
    const form = new FormData();
    const fields = { stream: "true", response_format: "verbose_json", hotwords: JSON.stringify(hotwords), model, written };
    for (const [name, value] of Object.entries(fields)) form.append(name, value);
    form.append("file", file, file.name);
    const request = new XMLHttpRequest(); // `fetch` does not report upload progress
    this.request = request;
    request.open("POST", "v1/audio/transcriptions");
    if (key) request.setRequestHeader("Authorization", `Bearer ${key}`);
    request.upload.onprogress = ({ loaded, total }) => this.tell("Sending", loaded, total);
    request.upload.onload = () => this.tell("Recognising");
    request.onprogress = () => this.read();
    request.onload = () => this.end();
    request.onerror = () => this.stop("The connection was lost. Open the file again.");
    request.send(form);
  }

  push() {}

  finish() {}

  close() {
    this.isOver = true;
    this.request.abort();
  }

  tell(doing, done = 0, all = 0) {
    const share = all ? `: ${Math.min(100, Math.round((100 * done) / all))} %` : "";
    if (!this.isOver) this.on.progress(`${doing} ${this.file.name}${share}`);
  }

  // Read all complete events.
  read() {
    if (this.request.status !== 200) return;
    const text = this.request.responseText;
    for (let end; !this.isOver && (end = text.indexOf("\n\n", this.taken)) >= 0; this.taken = end + 2) {
      const line = text.slice(this.taken, end);
      if (line.startsWith("data: {")) this.take(JSON.parse(line.slice(6)));
    }
  }

  take(event) {
    const { seconds, duration } = event.progress ?? event;
    if (event.type === "error") this.stop(event.error.message);
    else if (event.type === "transcript.text.delta") this.on.final(event.segment);
    else if (event.type === "transcript.text.done") this.stop();
    if (duration) this.tell("Recognising", seconds, duration);
  }

  end() {
    this.read();
    if (this.isOver) return;
    let message = "The server stopped before the end of the file. Open the file again.";
    try {
      message = JSON.parse(this.request.responseText).error.message;
    } catch {} // not a response of this server
    this.stop(this.request.status === 503 ? `${message}. Open the file again later.` : message);
  }

  stop(problem) {
    if (this.isOver) return;
    this.isOver = true;
    if (problem) this.on.problem(problem);
    else this.on.done();
  }
}
