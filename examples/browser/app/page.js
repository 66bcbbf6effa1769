// The page for static hosts. It loads the model in a worker, shows the progress, and recognises in the worker. The rest is the
// server's page.

import { Controls, complain, find, show } from './controls.js';
import { RATE } from './sound.js';
import { Recognizer } from './u2moe/worker.js';

const MEGABYTE = 1e6;
const LEFT_CHUNKS = 4; // as on the server, to bound time and memory for long speech

let recognizer = null; // null while loading and after a failure
const controls = new Controls(async (hotwords, on) => {
  if (!recognizer && !(await load())) return null;
  return new Recognition({ hotwords, numLeftChunks: LEFT_CHUNKS, written: true }, on);
});

// `on` has the callbacks {partial(result), final(result), done(), problem(text)}.
class Recognition {
  waiting = 0; // number of samples that the worker has not recognised yet

  constructor(options, on) {
    this.on = on;
    this.stream = recognizer.createStream(options);
    const heard = (type, take) => this.stream.addEventListener(type, ({ detail }) => this.on && take(detail));
    heard('partial', (result) => this.on.partial(result));
    heard('final', (result) => this.on.final(result));
    heard('error', (error) => this.fail(error));
  }

  // Report an error. A RangeError means an invalid option. After any other error, such as a lack of memory, the worker cannot
  // be used.
  fail(error) {
    if (error instanceof RangeError) return this.on.problem(error.message);
    recognizer?.release().catch(() => {});
    recognizer = null;
    this.on.problem(`Recognition failed: ${error.message}. Start again to reload the model.`);
  }

  push(samples) {
    this.waiting += samples.length;
    this.stream.acceptWaveform(RATE, samples).then(() => { this.waiting -= samples.length; }, () => {}); // errors are also events
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

// Load the recogniser. Return whether it was loaded.
async function load() {
  show('busy', 'Loading');
  const worker = new Worker(new URL('./worker.js', import.meta.url), { type: 'module' });
  try {
    recognizer = await Recognizer.fromBundle(new URL('./model/', import.meta.url), { worker, onProgress: progress });
  } catch (error) {
    document.body.classList.add('failed');
    find('lead').textContent = 'The model could not be loaded.';
    find('loaded').textContent = 'Reload the page to try again.';
    show('lost', 'Not loaded');
    complain(`The model cannot be loaded: ${error.message}`);
    return false;
  }
  document.body.classList.add('ready');
  find('lead').textContent = 'Press the microphone and speak.';
  find('loaded').textContent = 'Or open an audio file, or drop it on this page.';
  controls.ready();
  navigator.serviceWorker?.register('service-worker.js').catch(() => {}); // late, since it fetches all files again
  return true;
}

document.head.insertAdjacentHTML('beforeend', '<link rel="manifest" href="app.webmanifest">');
document.title = document.querySelector('h1').lastChild.textContent = 'Speech recognition in your browser';
find('lead').textContent = 'Loading the model';
find('promise').textContent = 'Speech never leaves the browser. Recognition runs on this page, also offline once it is loaded.';
find('progress').hidden = find('loaded').hidden = false;
load();
