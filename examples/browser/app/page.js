// The page: microphone and files in, words out. What each part does is in the file of its name.

import { Engine, RATE } from './connection.js';
import { TYPES, format } from './formats.js';
import { Sound } from './sound.js';
import { Transcript } from './transcript.js';
import { Resampler } from './u2moe/resampler.js';

// What makes calls pleasant takes from speech what a recogniser needs.
const PLAIN_SOUND = { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false };
const MEGABYTE = 1e6;
const find = (id) => document.getElementById(id);
const sound = new Sound();
const transcript = new Transcript(find('segments'), find('partial'), listen);
let recognition = null; // of the source at hand
let microphone = null; // {context, tracks} while it is open
let offset = 0; // seconds of sound before the source at hand

const engine = new Engine({
  progress(loaded, total) {
    find('progress').value = loaded / total;
    find('loaded').textContent = `${(loaded / MEGABYTE).toFixed(1)} of ${(total / MEGABYTE).toFixed(1)} MB`;
    if (loaded === total) find('loaded').textContent = 'Starting';
  },
  ready() {
    document.body.classList.add('ready');
    find('lead').textContent = 'Press the microphone and speak.';
    find('loaded').textContent = 'Or drop an audio file anywhere on this page.';
    find('microphone').disabled = false;
    show('idle', 'Ready');
    refresh();
    navigator.serviceWorker?.register('service-worker.js'); // not before: it reads all files of the page again
  },
  failed(message) {
    show('lost', 'Not loaded');
    complain(`The model cannot be loaded: ${message}`);
  },
});

function show(state, text) {
  document.body.dataset.state = state;
  find('status-text').textContent = text;
}

function complain(text) {
  find('problem').textContent = text;
  find('problem').hidden = !text;
}

function refresh() {
  const hasText = transcript.segments.length > 0, isBusy = Boolean(recognition);
  find('empty').hidden = hasText || isBusy;
  find('clear').disabled = !hasText || isBusy;
  find('save').ariaDisabled = String(!hasText);
  find('microphone').ariaPressed = String(Boolean(microphone));
  find('microphone-label').textContent = microphone ? 'Stop the microphone' : 'Start the microphone';
  find('open').disabled = isBusy;
  find('hotwords').disabled = isBusy;
}

function begin() {
  complain('');
  sound.stop();
  offset = sound.duration;
  const hotwords = find('hotwords').value.split(/[,;]/).map((word) => word.trim()).filter(Boolean);
  recognition = engine.recognise({ hotwords }, {
    partial: (text) => transcript.showPartial(text),
    final(result) {
      transcript.add(moved(result, offset));
      find('spoken').textContent = result.text;
      refresh();
    },
    done: () => end(),
    problem(text) {
      end();
      complain(text);
    },
  });
  refresh();
}

const rounded = (seconds) => Math.round(seconds * 1000) / 1000;

function moved({ start, end: last, text, confidence, words }, seconds) {
  const later = (word) => ({ ...word, start: rounded(word.start + seconds), end: rounded(word.end + seconds) });
  return { start: rounded(start + seconds), end: rounded(last + seconds), text, confidence, words: words.map(later) };
}

function take(samples) {
  sound.push(Int16Array.from(samples, (value) => Math.max(-1, Math.min(1, value)) * 32767));
  recognition?.push(samples);
}

function end() {
  stopMicrophone();
  recognition?.close();
  recognition = null;
  transcript.showPartial('');
  show('idle', 'Ready');
  refresh();
}

async function startMicrophone() {
  if (!navigator.mediaDevices?.getUserMedia) {
    complain('Browsers give the microphone to pages over HTTPS and on localhost only.');
    return;
  }
  let media;
  try {
    media = await navigator.mediaDevices.getUserMedia({ audio: PLAIN_SOUND });
  } catch (error) {
    const none = error.name === 'NotFoundError';
    complain(none ? 'There is no microphone.' : "The microphone was refused. Allow it in the browser's settings of this page.");
    return;
  }
  const context = new AudioContext(); // at the device's own rate: some browsers refuse a microphone at another
  await context.audioWorklet.addModule(new URL('./capture.js', import.meta.url));
  begin();
  microphone = { context, tracks: media.getTracks(), resampler: new Resampler(context.sampleRate, RATE) };
  const capture = new AudioWorkletNode(context, 'capture', { numberOfOutputs: 0 });
  capture.port.onmessage = ({ data }) => {
    if (!microphone) return;
    take(microphone.resampler.accept(data));
    const level = Math.sqrt(data.reduce((sum, value) => sum + value * value, 0) / data.length);
    find('microphone').style.setProperty('--level', Math.min(1, level * 6).toFixed(2));
  };
  microphone.tracks[0].onended = () => {
    complain('The microphone has gone.');
    finish();
  };
  context.createMediaStreamSource(media).connect(capture);
  show('live', 'Listening');
  refresh();
}

function stopMicrophone() {
  microphone?.tracks.forEach((track) => track.stop());
  microphone?.context.close();
  microphone = null;
  find('microphone').style.setProperty('--level', 0);
}

function finish() {
  if (microphone) take(microphone.resampler.finish());
  stopMicrophone();
  if (recognition) {
    show('busy', 'Finishing');
    recognition.finish();
  }
  refresh();
}

async function openFile(file) {
  if (recognition || !file) return;
  complain('');
  show('busy', `Reading ${file.name}`);
  let audio;
  try {
    audio = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await file.arrayBuffer());
  } catch {
    show('idle', 'Ready');
    complain(`${file.name} is no audio that this browser can read.`);
    return;
  }
  begin();
  show('busy', `Recognising ${file.name}`);
  const channels = Array.from({ length: audio.numberOfChannels }, (_, index) => audio.getChannelData(index));
  for (let start = 0; start < audio.length && recognition; start += RATE) {
    const block = channels[0].slice(start, start + RATE);
    for (const channel of channels.slice(1)) for (let i = 0; i < block.length; i += 1) block[i] += channel[start + i];
    take(block.map((value) => value / channels.length));
    while (recognition && recognition.waiting > 30 * RATE) await new Promise((resolve) => setTimeout(resolve, 100));
  }
  recognition?.finish();
}

function listen(seconds) {
  if (!microphone) sound.play(seconds, (now) => transcript.mark(now));
}

function save(kind) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([format(transcript.segments, kind)], { type: TYPES[kind] }));
  link.download = `transcript.${kind}`;
  link.click();
  URL.revokeObjectURL(link.href);
  find('save').open = false;
}

find('microphone').onclick = () => {
  if (microphone) finish();
  else if (recognition) end();
  else startMicrophone();
};
find('open').onclick = () => find('file').click();
find('file').onchange = () => {
  openFile(find('file').files[0]);
  find('file').value = '';
};
for (const button of find('save').querySelectorAll('[data-format]')) button.onclick = () => save(button.dataset.format);
find('save').ontoggle = () => find('save').ariaDisabled === 'true' && (find('save').open = false);
find('clear').onclick = () => {
  transcript.clear();
  sound.clear();
  refresh();
};
document.addEventListener('keydown', (event) => {
  if (event.target.matches('input') || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === 'm') find('microphone').click();
  if (event.key === 'Escape') {
    sound.stop();
    find('save').open = false;
  }
});
for (const kind of ['dragenter', 'dragover', 'dragleave', 'drop']) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle('dropping', kind === 'dragenter' || kind === 'dragover');
    if (kind === 'drop') openFile(event.dataTransfer.files[0]);
  });
}
