// The controls of a page: microphone, files, hotwords and playback. The caller provides the recognition.

import { TYPES, format } from "./formats.js";
import { KEPT_S, RATE, Sound, int16 } from "./sound.js";
import { Transcript } from "./transcript.js";
import { Resampler } from "./u2moe/core.js";
import { Microphone } from "./u2moe/microphone.js";

const MOST_WAITING_S = 30;
const COPIED_MS = 1500;
const LOUD = 6; // factor from the root mean square of the sound to the ring around the microphone

export const find = (id) => document.getElementById(id);

export function show(state, text) {
  document.body.dataset.state = state;
  find("status-text").textContent = text;
}

export function complain(text) {
  find("problem").textContent = text;
  find("problem").hidden = !text;
}

export class Controls {
  // recognise(hotwords, on) returns a recognition {push(int16), finish(), close(), waiting}, or null. The recognition calls
  // the functions of `on`: {partial(result), final(result), progress(text), done(), problem(text)}. recogniseFile(file,
  // hotwords, on), if present, is called with files that are not decoded.
  constructor(recognise, recogniseFile = null) {
    this.recognise = recognise;
    this.recogniseFile = recogniseFile;
    this.sound = new Sound();
    this.transcript = new Transcript(find("segments"), find("partial"), (seconds) => this.listen(seconds));
    this.recognition = null; // recognition of the current source
    this.microphone = null; // the microphone, while it is open
    this.resampler = null; // resampler of the microphone
    this.offset = 0; // seconds of sound before the current source
    this.isReady = false;
    this.isStarting = false; // whether the microphone is being opened or the recogniser loaded
    this.transcript.restore();
    this.sound.clear(this.transcript.segments.at(-1)?.end);
    this.attend();
    this.refresh();
  }

  ready() {
    this.isReady = true;
    show("idle", "Ready");
    this.refresh();
  }

  refresh() {
    const hasText = this.transcript.segments.length > 0, isBusy = Boolean(this.recognition);
    find("empty").hidden = hasText || isBusy;
    find("clear").disabled = !hasText || isBusy;
    find("save").ariaDisabled = String(!hasText);
    find("copy").disabled = !hasText;
    find("cancel").hidden = !isBusy || Boolean(this.microphone);
    find("open").hidden = !find("cancel").hidden;
    find("microphone").ariaPressed = String(Boolean(this.microphone));
    find("microphone-label").textContent = this.microphone ? "Stop the microphone" : "Start the microphone";
    find("microphone").disabled = !this.isReady || (isBusy && !this.microphone);
    find("open").disabled = !this.isReady || isBusy;
    find("hotwords").disabled = isBusy;
  }

  async begin(recognise = this.recognise) {
    complain("");
    const hotwords = find("hotwords").value.split(/[,;]/).map((word) => word.trim()).filter(Boolean);
    const on = {
      partial: (result) => this.transcript.showPartial(result),
      final: (result) => {
        this.transcript.add(moved(result, this.offset));
        find("spoken").textContent = result.text;
        this.refresh();
      },
      progress: (text) => show("busy", text),
      done: () => this.end(),
      problem: (text) => {
        this.end();
        complain(text);
      },
    };
    this.recognition = await recognise(hotwords, on);
    if (!this.recognition) return false;
    this.sound.stop();
    this.offset = this.sound.duration;
    this.refresh();
    return true;
  }

  take(samples, keptS) {
    this.sound.push(samples, keptS);
    this.recognition?.push(samples);
  }

  end() {
    this.stopMicrophone();
    this.recognition?.close();
    this.recognition = null;
    this.transcript.showPartial({ text: "", committed: "" });
    show("idle", "Ready");
    this.refresh();
  }

  async start() {
    this.isStarting = true;
    complain("");
    let microphone = null;
    try {
      microphone = await Microphone.open();
      this.resampler = await Resampler.create(microphone.sampleRate, RATE);
      if (await this.begin()) this.listenTo(microphone);
      else microphone.close();
    } catch (error) {
      microphone?.close();
      complain(error.message);
    }
    this.isStarting = false;
  }

  listenTo(microphone) {
    this.microphone = microphone;
    microphone.addEventListener("samples", ({ detail }) => this.microphone && this.hear(this.resampler.accept(detail)));
    microphone.addEventListener("change", ({ detail }) => complain(`The microphone is no longer available. Now using ${detail || "another"}.`));
    const end = () => {
      complain("The microphone is no longer available.");
      this.finish();
    };
    microphone.addEventListener("ended", end);
    show("live", "Listening");
    this.refresh();
    if (microphone.failure) end(); // the microphone ended before recognition started
  }

  hear(block) {
    const samples = int16(block);
    this.take(samples, KEPT_S);
    find("microphone").style.setProperty("--level", Math.min(1, rms(samples) * LOUD).toFixed(2));
  }

  stopMicrophone() {
    this.microphone?.close();
    this.microphone = null;
    find("microphone").style.setProperty("--level", 0);
  }

  async finish() {
    const { microphone } = this;
    if (microphone) {
      await microphone.stop();
      if (this.microphone !== microphone) return; // the microphone has ended meanwhile
      this.hear(this.resampler.finish());
    }
    this.stopMicrophone();
    if (this.recognition) {
      show("busy", "Finishing");
      this.recognition.finish();
    }
    this.refresh();
  }

  async openFile(file) {
    if (!this.isReady || this.recognition || !file) return;
    complain("");
    show("busy", `Reading ${file.name}`);
    const audio = await decoded(file);
    if (!audio && !this.recogniseFile) {
      show("idle", "Ready");
      complain(`This browser cannot read ${file.name} as audio.`);
      return;
    }
    const { recogniseFile } = this;
    if (!(await this.begin(recogniseFile ? (hotwords, on) => recogniseFile(file, hotwords, on) : undefined))) {
      show("idle", "Ready");
      return;
    }
    if (!recogniseFile) show("busy", `Recognising ${file.name}`);
    const { recognition } = this;
    const channels = Array.from({ length: audio?.numberOfChannels ?? 0 }, (_, index) => audio.getChannelData(index));
    for (let start = 0; start < (audio?.length ?? 0) && this.recognition === recognition; start += RATE) {
      this.take(mixed(channels.map((channel) => channel.subarray(start, start + RATE))));
      while (this.recognition === recognition && recognition.waiting > MOST_WAITING_S * RATE) await pause();
    }
    if (this.recognition === recognition) recognition.finish();
  }

  listen(seconds) {
    if (this.microphone || this.sound.play(seconds, (now) => this.transcript.mark(now))) return;
    complain(`Only the last ${KEPT_S / 60} minutes from the microphone can be played, until the page is reloaded.`);
  }

  save(kind) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([format(this.transcript.segments, kind)], { type: TYPES[kind] }));
    link.download = `transcript.${kind}`;
    link.click();
    URL.revokeObjectURL(link.href);
    find("save").open = false;
  }

  async copy() {
    const text = this.transcript.segments.map((segment) => segment.text).join("\n");
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Without HTTPS, browsers can only copy a selection.
      getSelection().selectAllChildren(find("segments"));
      document.execCommand("copy");
      getSelection().removeAllRanges();
    }
    find("copy").textContent = "Copied";
    setTimeout(() => (find("copy").textContent = "Copy"), COPIED_MS);
  }

  clear() {
    if (this.recognition) return;
    this.transcript.clear();
    this.sound.clear();
    find("spoken").textContent = "";
    this.refresh();
  }

  attend() {
    find("microphone").onclick = () => {
      if (this.microphone) this.finish();
      else if (!this.isStarting && !this.recognition) this.start();
    };
    find("cancel").onclick = () => this.end();
    find("copy").onclick = () => this.copy();
    find("open").onclick = () => find("file").click();
    find("file").onchange = () => {
      this.openFile(find("file").files[0]);
      find("file").value = "";
    };
    for (const button of find("save").querySelectorAll("[data-format]")) button.onclick = () => this.save(button.dataset.format);
    find("save").ontoggle = () => find("save").ariaDisabled === "true" && (find("save").open = false);
    find("clear").onclick = () => this.clear();
    document.addEventListener("click", (event) => event.target.closest("#save") || (find("save").open = false));
    document.addEventListener("keydown", (event) => this.press(event));
    for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
      document.addEventListener(kind, (event) => {
        event.preventDefault();
        document.body.classList.toggle("dropping", kind === "dragenter" || kind === "dragover");
        if (kind === "drop") this.openFile(event.dataTransfer.files[0]);
      });
    }
  }

  press(event) {
    if (event.target.matches("input") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "m") find("microphone").click();
    if (event.key === "Escape") {
      this.sound.stop();
      find("save").open = false;
    }
  }
}

const pause = () => new Promise((resolve) => setTimeout(resolve, 100));
const rounded = (seconds) => Math.round(seconds * 1000) / 1000;

function rms(samples) {
  let sum = 0;
  for (let i = 0; i < samples.length; i++) sum += (samples[i] / 32768) ** 2;
  return Math.sqrt(sum / Math.max(samples.length, 1));
}

function moved({ start, end, text, confidence, words }, seconds) {
  const later = (word) => ({ ...word, start: rounded(word.start + seconds), end: rounded(word.end + seconds) });
  return { start: rounded(start + seconds), end: rounded(end + seconds), text, confidence, words: words.map(later) };
}

// Decode a file at the sample rate of this page. Return null if the browser cannot decode it.
async function decoded(file) {
  try {
    return await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await file.arrayBuffer());
  } catch {
    return null;
  }
}

// Return the mean of the channels as int16.
function mixed(channels) {
  const sum = channels[0].slice();
  for (const channel of channels.slice(1)) for (let i = 0; i < sum.length; i++) sum[i] += channel[i];
  for (let i = 0; i < sum.length; i++) sum[i] /= channels.length;
  return int16(sum);
}
