// The page: microphone and files in, words out. What each part does is in the file of its name.

import { RATE, Recognition } from "./connection.js";
import { TYPES, format } from "./formats.js";
import { Sound } from "./sound.js";
import { Transcript } from "./transcript.js";

// What makes calls pleasant takes from speech what a recogniser needs.
const PLAIN_SOUND = { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false };
const KEY = "u2moe-api-key";
const find = (id) => document.getElementById(id);
const sound = new Sound();
const transcript = new Transcript(find("segments"), find("partial"), listen);
let recognition = null;  // of the source at hand
let microphone = null;  // {context, tracks} while it is open
let offset = 0;  // seconds of sound before the source at hand

function show(state, text) {
  document.body.dataset.state = state;
  find("status-text").textContent = text;
}

function complain(text) {
  find("problem").textContent = text;
  find("problem").hidden = !text;
}

function refresh() {
  const hasText = transcript.segments.length > 0;
  find("empty").hidden = hasText || Boolean(recognition);
  find("clear").disabled = !hasText || Boolean(recognition);
  find("save").ariaDisabled = String(!hasText);
  find("microphone").ariaPressed = String(Boolean(microphone));
  find("microphone-label").textContent = microphone ? "Stop the microphone" : "Start the microphone";
  find("open").disabled = Boolean(recognition);
  find("hotwords").disabled = Boolean(recognition);
}

function hotwords() {
  return find("hotwords").value.split(/[,;]/).map((word) => word.trim()).filter(Boolean);
}

const key = () => sessionStorage.getItem(KEY);

// A key is only asked for where the server wants one.
async function askForKey() {
  const headers = () => (key() ? { Authorization: `Bearer ${key()}` } : {});
  while ((await fetch("v1/models", { headers: headers() })).status === 401) {
    const dialog = find("key-dialog");
    dialog.returnValue = "";
    dialog.showModal();
    await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
    if (dialog.returnValue !== "ok") return false;
    sessionStorage.setItem(KEY, find("key").value.trim());
  }
  return true;
}

async function begin() {
  complain("");
  try {
    if (!(await askForKey())) return false;
  } catch {
    complain("The server does not answer. Is it running?");
    return false;
  }
  sound.stop();
  offset = sound.duration;
  const live = () => (microphone ? show("live", "Listening") : show("busy", "Recognising"));
  recognition = new Recognition({
    hotwords: hotwords(),
    key: key(),
    on: {
      partial: (text) => transcript.showPartial(text),
      final: (result) => {
        transcript.add(moved(result, offset));
        find("spoken").textContent = result.text;
        refresh();
      },
      state: (name, seconds) => {
        if (name === "connected") {
          complain("");
          live();
        } else {
          const reason = name === "full" ? "The server is full" : "The connection is lost";
          complain(`${reason}. Nothing of what you say is lost: it is sent when the server takes it.`);
          show("lost", `Trying again in ${Math.ceil(seconds)} s`);
        }
      },
      done: () => end("Ready"),
      problem: (text) => {
        end("Ready");
        complain(text);
      },
    },
  });
  refresh();
  return true;
}

function moved(result, seconds) {
  const words = result.words.map((word) => ({ ...word, start: round(word.start + seconds), end: round(word.end + seconds) }));
  const { text, confidence } = result;
  return { start: round(result.start + seconds), end: round(result.end + seconds), text, confidence, words };
}

const round = (seconds) => Math.round(seconds * 1000) / 1000;

function take(samples) {
  sound.push(samples);
  recognition?.push(samples);
}

function end(text) {
  stopMicrophone();
  recognition?.close();
  recognition = null;
  transcript.showPartial("");
  show("idle", text);
  refresh();
}

async function startMicrophone() {
  if (!navigator.mediaDevices?.getUserMedia) {
    complain("Browsers give the microphone to pages over HTTPS and on localhost only.");
    return;
  }
  let media;
  try {
    media = await navigator.mediaDevices.getUserMedia({ audio: PLAIN_SOUND });
  } catch (error) {
    const none = error.name === "NotFoundError";
    complain(none ? "There is no microphone." : "The microphone was refused. Allow it in the browser's settings of this page.");
    return;
  }
  const context = new AudioContext();  // at the device's own rate
  await context.audioWorklet.addModule("recorder.js");
  const started = await begin();
  if (!started) {
    media.getTracks().forEach((track) => track.stop());
    context.close();
    return;
  }
  microphone = { context, tracks: media.getTracks() };
  const recorder = new AudioWorkletNode(context, "recorder", { numberOfOutputs: 0 });
  recorder.port.onmessage = ({ data }) => {
    if (!microphone) return;
    take(data);
    find("microphone").style.setProperty("--level", Math.min(1, rms(data) * 6).toFixed(2));
  };
  microphone.tracks[0].onended = () => {
    complain("The microphone has gone.");
    finish();
  };
  context.createMediaStreamSource(media).connect(recorder);
  show("live", "Listening");
  refresh();
}

const rms = (samples) => Math.sqrt(samples.reduce((sum, value) => sum + (value / 32768) ** 2, 0) / samples.length);

function stopMicrophone() {
  microphone?.tracks.forEach((track) => track.stop());
  microphone?.context.close();
  microphone = null;
  find("microphone").style.setProperty("--level", 0);
}

function finish() {
  stopMicrophone();
  if (recognition) {
    show("busy", "Finishing");
    recognition.finish();
  }
  refresh();
}

async function openFile(file) {
  if (recognition || !file) return;
  complain("");
  show("busy", `Reading ${file.name}`);
  let audio;
  try {
    const context = new OfflineAudioContext(1, 1, RATE);
    audio = await context.decodeAudioData(await file.arrayBuffer());
  } catch {
    show("idle", "Ready");
    complain(`${file.name} is no audio that this browser can read.`);
    return;
  }
  if (!(await begin())) return;
  show("busy", `Recognising ${file.name}`);
  const channels = Array.from({ length: audio.numberOfChannels }, (_, index) => audio.getChannelData(index));
  for (let start = 0; start < audio.length && recognition; start += RATE) {
    const block = new Int16Array(Math.min(RATE, audio.length - start));
    for (let i = 0; i < block.length; i++) {
      const mixed = channels.reduce((sum, channel) => sum + channel[start + i], 0) / channels.length;
      block[i] = Math.max(-1, Math.min(1, mixed)) * 32767;
    }
    take(block);
    while (recognition && recognition.waiting > 30 * RATE) await new Promise((resolve) => setTimeout(resolve, 100));
  }
  recognition?.finish();
}

function listen(seconds) {
  if (!microphone) sound.play(seconds, (now) => transcript.mark(now));
}

function save(kind) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([format(transcript.segments, kind)], { type: TYPES[kind] }));
  link.download = `transcript.${kind}`;
  link.click();
  URL.revokeObjectURL(link.href);
  find("save").open = false;
}

find("microphone").onclick = () => (microphone ? finish() : recognition ? end("Ready") : startMicrophone());
find("open").onclick = () => find("file").click();
find("file").onchange = () => {
  openFile(find("file").files[0]);
  find("file").value = "";
};
find("save").querySelectorAll("[data-format]").forEach((button) => (button.onclick = () => save(button.dataset.format)));
find("save").ontoggle = () => find("save").ariaDisabled === "true" && (find("save").open = false);
find("clear").onclick = () => {
  if (recognition) return;
  transcript.clear();
  sound.clear();
  refresh();
};
find("key-cancel").onclick = () => find("key-dialog").close();
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "m") find("microphone").click();
  if (event.key === "Escape") {
    sound.stop();
    find("save").open = false;
  }
});
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dropping", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") openFile(event.dataTransfer.files[0]);
  });
}
refresh();
