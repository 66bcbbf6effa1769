// The page: loads the model, and shows how far it is.

import { Engine } from './connection.js';
import { Controls, complain, find, show } from './controls.js';

const MEGABYTE = 1e6;

const engine = new Engine({
  progress(loaded, total) {
    if (document.body.classList.contains('failed')) return; // other files still come
    find('progress').value = loaded / total;
    const share = `${(loaded / MEGABYTE).toFixed(1)} of ${(total / MEGABYTE).toFixed(1)} MB`;
    find('loaded').textContent = loaded === total ? 'Starting' : share;
  },
  ready() {
    document.body.classList.add('ready');
    find('lead').textContent = 'Press the microphone and speak.';
    find('loaded').textContent = 'Or open an audio file, or drop it on this page.';
    controls.ready();
    navigator.serviceWorker?.register('service-worker.js'); // not before: it reads all files of the page again
  },
  failed(message) {
    document.body.classList.add('failed');
    find('lead').textContent = 'The model is not loaded.';
    find('loaded').textContent = 'Reload the page to try again.';
    show('lost', 'Not loaded');
    complain(`The model cannot be loaded: ${message}`);
  },
});
const controls = new Controls((hotwords, on) => engine.recognise({ hotwords }, on));
