// The page of a static host: loads the model into a worker, shows how far it is, and recognises there. All else is as the server has it.

import { Controls, complain, find, show } from './controls.js';
import { RATE } from './sound.js';
import { Recognizer } from './u2moe/worker.js';

const MEGABYTE = 1e6;
const LEFT_CHUNKS = 4; // as the server has it: time and memory stay the same however long somebody speaks

let recognizer = null; // none while it is loaded, and once it has failed
const controls = new Controls(async (hotwords, on) => {
  if (!recognizer && !(await load())) return null;
  return new Recognition({ hotwords, numLeftChunks: LEFT_CHUNKS, written: true }, on);
});

// on: {partial(result), final(result), done(), problem(text)}
class Recognition {
  waiting = 0; // samples that the worker has not recognised yet

  constructor(options, on) {
    this.on = on;
    this.stream = recognizer.createStream(options);
    const heard = (type, take) => this.stream.addEventListener(type, ({ detail }) => this.on && take(detail));
    heard('partial', (result) => this.on.partial(result));
    heard('final', (result) => this.on.final(result));
    heard('error', (error) => this.fail(error));
  }

  // Where no option was wrong, worker and model are of no use any more, for want of memory for example.
  fail(error) {
    if (error instanceof RangeError) return this.on.problem(error.message);
    recognizer?.release().catch(() => {});
    recognizer = null;
    this.on.problem(`Recognition has failed: ${error.message}. Start again: then the model is loaded anew.`);
  }

  push(samples) {
    this.waiting += samples.length;
    this.stream.acceptWaveform(RATE, samples).then(() => { this.waiting -= samples.length; }, () => {}); // an error is an event, too
  }

  finish() {
    this.stream.inputFinished().then(() => this.on?.done(), () => {});
  }

  close() {
    this.on = null;
    this.stream.reset();
  }
}

function progress({ loaded, total }) {
  find('progress').value = loaded / total;
  const share = `${(loaded / MEGABYTE).toFixed(1)} of ${(total / MEGABYTE).toFixed(1)} MB`;
  find('loaded').textContent = loaded === total ? 'Starting' : share;
}

// Whether there is a recogniser.
async function load() {
  show('busy', 'Loading');
  const worker = new Worker(new URL('./worker.js', import.meta.url), { type: 'module' });
  try {
    recognizer = await Recognizer.fromBundle(new URL('./model/', import.meta.url), { worker, onProgress: progress });
  } catch (error) {
    document.body.classList.add('failed');
    find('lead').textContent = 'The model is not loaded.';
    find('loaded').textContent = 'Reload the page to try again.';
    show('lost', 'Not loaded');
    complain(`The model cannot be loaded: ${error.message}`);
    return false;
  }
  document.body.classList.add('ready');
  find('lead').textContent = 'Press the microphone and speak.';
  find('loaded').textContent = 'Or open an audio file, or drop it on this page.';
  controls.ready();
  navigator.serviceWorker?.register('service-worker.js').catch(() => {}); // not before: it reads all files of the page again
  return true;
}

document.head.insertAdjacentHTML('beforeend', '<link rel="manifest" href="app.webmanifest">');
document.title = document.querySelector('h1').lastChild.textContent = 'Speech recognition in your browser';
find('lead').textContent = 'Loading the model';
find('promise').textContent = 'Nothing leaves this page: the recogniser runs here, and works offline once it is loaded.';
find('progress').hidden = find('loaded').hidden = false;
load();
