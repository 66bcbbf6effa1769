// The page's side of the worker: the model that it loads, and sources of audio on their way to it.

import { RATE } from './sound.js';

export class Engine {
  #worker = new Worker(new URL('./worker.js', import.meta.url), { type: 'module' });
  #recognitions = new Map();
  #num = 0;

  // on: {progress(loaded, total), ready(), failed(message)}
  constructor(on) {
    this.#worker.onerror = (event) => on.failed(event.message || 'the worker did not start');
    this.#worker.onmessage = ({ data }) => {
      if (data.type === 'progress') on.progress(data.loaded, data.total);
      else if (data.type === 'ready') on.ready();
      else if (data.type === 'failed') on.failed(data.message);
      else this.#recognitions.get(data.id)?.take(data);
    };
  }

  recognise(options, on) {
    const id = (this.#num += 1);
    const send = (message, transfer = []) => this.#worker.postMessage({ id, ...message }, transfer);
    const recognition = new Recognition(send, options, on, () => this.#recognitions.delete(id));
    this.#recognitions.set(id, recognition);
    return recognition;
  }
}

class Recognition {
  // on: {partial(text), final(result), done(), problem(text)}
  constructor(send, options, on, forget) {
    this.send = send;
    this.on = on;
    this.forget = forget;
    this.waiting = 0; // samples that the worker has not recognised yet
    send({ type: 'start', options });
  }

  push(samples) {
    this.waiting += samples.length;
    const copy = samples.slice();
    this.send({ type: 'audio', sampleRate: RATE, samples: copy }, [copy.buffer]);
  }

  finish() {
    this.send({ type: 'finish' });
  }

  close() {
    this.send({ type: 'close' });
    this.forget();
  }

  take({ type, result, length, message }) {
    if (type === 'partial') this.on.partial(result.text);
    else if (type === 'final') this.on.final(result);
    else if (type === 'taken') this.waiting -= length;
    else if (type === 'done') this.on.done();
    else this.on.problem(message);
  }
}
