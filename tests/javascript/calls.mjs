// Calls of the JavaScript module that are cancelled, reset or fail: each returns results and the remaining resources. For
// tests/test_javascript_calls.py, after the prelude of toys/browsing.py.
const { readFile } = await import('node:fs/promises');
const { getEventListeners } = await import('node:events');
process.env.ORT_DISABLE_TELEMETRY = '1';
const { default: node } = await import('onnxruntime-node'); // onnxruntime-web takes seconds to compile
const settings = { executionProviders: ['cpu'], intraOpNumThreads: 1 };
const start = (content, options) => node.InferenceSession.create(content, { ...options, ...settings });
const ort = { Tensor: node.Tensor, InferenceSession: { create: start } };
const { Recognizer } = await part('index.js');
const source = { read: (name) => readFile(`${input.bundle}/${name}`) };
const caught = (promise) => promise.then(() => null, (error) => error);
const turn = () => new Promise((resolve) => setTimeout(resolve, 20));

// onnxruntime that counts its sessions and their runs. `on.create` and `on.run` may fail, or abort something.
const counted = (on = {}) => {
  const counts = { created: 0, open: 0, runs: 0 };
  const create = async (...args) => {
    const session = await ort.InferenceSession.create(...args), { run, release } = session;
    counts.created += 1;
    counts.open += 1;
    session.release = async () => {
      counts.open -= 1;
      await release.call(session);
    };
    session.run = async (feeds) => {
      counts.runs += 1;
      return (await on.run?.(counts.runs, feeds)) ?? run.call(session, feeds);
    };
    await on.create?.(counts.created);
    return session;
  };
  return { counts, Tensor: ort.Tensor, InferenceSession: { create } };
};

const bounded = async (recognizer) => { // feed 0.1 s at a time up to the limit; nothing is lost
  const stream = recognizer.createStream({ maxQueueS: 0.45 }), samples = Int16Array.from(input.samples);
  const found = [], refused = [], part = samples.subarray(0, 6400);
  stream.addEventListener('final', ({ detail }) => found.push(detail));
  for (let n = 0, last = null; n < samples.length;) {
    try {
      last = stream.acceptWaveform(16000, samples.subarray(n, n + 1600));
      n += 1600;
    } catch ({ name, message }) {
      refused.push(`${name}: ${message}`);
      await last;
    }
  }
  await Promise.all([1, 2].map(() => stream.reset() ?? stream.acceptWaveform(16000, part))); // each fits the limit
  stream.reset();
  found.length = 0;
  for (let n = 0; n < samples.length; n += 1600) await stream.acceptWaveform(16000, samples.subarray(n, n + 1600));
  await stream.inputFinished();
  return [JSON.stringify(found), [...new Set(refused)]];
};

// The request is cancelled, sessions are released, and no more progress is reported.
const loadingFromUrl = async () => {
  const { createServer } = await import('node:http');
  const controller = new AbortController(), reason = new Error('the page was left'), closed = [];
  const server = createServer(async ({ url }, response) => {
    const content = await readFile(`${input.bundle}${url}`);
    response.on('close', () => response.writableFinished || closed.push(url));
    if (url !== '/encoder.onnx') return response.end(content);
    response.writeHead(200).write(content.subarray(0, 1000)); // and never the rest
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  const counting = counted({ create: (num) => num === 2 && setTimeout(() => controller.abort(reason), 20) });
  let numReports = 0;
  const { signal } = controller, onProgress = () => { numReports += 1; };
  const url = `http://127.0.0.1:${server.address().port}/`;
  const error = await caught(Recognizer.fromBundle(url, { ort: counting, signal, onProgress }));
  const before = numReports;
  while (!closed.length || counting.counts.open) await turn();
  server.closeAllConnections();
  server.close();
  return {
    isReason: error === reason, closed, isQuiet: numReports === before, ...counting.counts,
  };
};

// Without a network, a cache that fails once is tried again.
const cacheThatFails = async () => {
  const { openBundle } = await part('bundle.js');
  const kept = new Map();
  let isOnline = true, numFailures = 0;
  const cache = {
    match: async (key) => kept.get(key)?.clone(),
    put: async (key, response) => void kept.set(key, response),
    keys: async () => [...kept.keys()].map((url) => ({ url })),
  };
  const open = async () => { if (numFailures-- > 0) throw new Error('it is lost'); return cache; };
  const { fetch } = globalThis;
  globalThis.caches = { open };
  globalThis.fetch = async (url) => {
    if (!isOnline) throw new TypeError('no network');
    return new Response(await readFile(`${input.bundle}${new URL(url).pathname}`));
  };
  const load = async () => {
    const { files } = await openBundle('http://here/', { parse: JSON.parse });
    return (await Promise.all(files.values())).length;
  };
  const numFiles = await load();
  while (kept.size <= numFiles) await turn(); // plus the manifest
  isOnline = false;
  numFailures = 1;
  const again = await load();
  numFailures = 2;
  const { message } = await caught(load());
  delete globalThis.caches;
  globalThis.fetch = fetch;
  return [numFiles, again, message];
};

// Loading ends immediately, even if `read` ignores the signal; its late result is not reported. Sessions are released if
// it is cancelled while one of the three graphs is being loaded; after the last one, the recogniser is.
const loadingFromReader = async () => {
  const names = [], controller = new AbortController();
  const endless = { read(name, { signal }) {
    names.push([name, signal === controller.signal]);
    return new Promise(() => {});
  } };
  const aborted = await caught(Recognizer.fromBundle(endless, { ort, signal: AbortSignal.abort('before') }));
  let giveRest = () => {}, numReports = 0;
  const rest = new Promise((resolve) => { giveRest = resolve; });
  const slow = { read: async (name) => {
    if (name.endsWith('.onnx')) await rest;
    return source.read(name);
  } };
  const { signal } = controller, onProgress = () => { numReports += 1; };
  const loading = [endless, slow].map((each) => caught(Recognizer.fromBundle(each, { ort, signal, onProgress })));
  while (!numReports) await turn();
  controller.abort();
  const errors = (await Promise.all(loading)).map(({ name }) => name), before = numReports;
  giveRest();
  const listening = { read: (name, { signal }) => readFile(`${input.bundle}/${name}`, { signal }) };
  const refused = await caught(Recognizer.fromBundle(source, { ort, signal: {} }));
  const recognizer = await Recognizer.fromBundle(listening, { ort, signal: new AbortController().signal });
  await recognizer.release();
  await recognizer.release();
  const left = [];
  for (const last of [1, 2, 3]) {
    const controller = new AbortController();
    const counting = counted({ create: (num) => num === last && controller.abort('enough') });
    const error = await caught(Recognizer.fromBundle(source, { ort: counting, signal: controller.signal }));
    await turn();
    left.push({ error, ...counting.counts });
  }
  return [[names, aborted, ...errors, numReports === before, `${refused}`], left];
};

// No further graph runs, the recogniser stays usable, and it can be released while a graph runs.
const transcription = async () => {
  let controller = new AbortController(), isSlow = false;
  const counting = counted({ run: async (num) => {
    if (num === 7) controller.abort('enough'); // within a chunk, whose second graph is skipped
    if (isSlow) await turn();
  } });
  const recognizer = await Recognizer.fromBundle(source, { ort: counting });
  const samples = Int16Array.from(input.samples), texts = (segments) => segments.map(({ text }) => text);
  const { signal } = controller;
  const before = await caught(recognizer.transcribe(samples, 16000, { signal: AbortSignal.abort('before') }));
  const error = await caught(recognizer.transcribe(samples, 16000, { signal, beamSize: 4 }));
  await turn();
  const { runs } = counting.counts;
  const again = new AbortController();
  const whole = texts(await recognizer.transcribe(samples, 16000, { signal: again.signal }));
  const listeners = getEventListeners(again.signal, 'abort').length;
  again.abort(); // too late to have an effect
  const expected = texts(await recognizer.transcribe(samples, 16000));
  counting.counts.runs = 0;
  controller = new AbortController();
  isSlow = true;
  const late = await caught(recognizer.transcribe(samples, 16000, { signal: controller.signal }));
  const releasing = recognizer.release(), { open } = counting.counts;
  await releasing;
  const after = await caught(recognizer.transcribe(samples, 16000));
  const stopped = await caught(recognizer.warmUp({ signal: AbortSignal.abort('no noise') }));
  return {
    before, error, late, runs, isSame: whole.join() === expected.join() && expected.length > 0, open,
    left: counting.counts.open, after: `${after}`, stopped, listeners,
  };
};

// Whichever graph is running when a stream is reset, its output is dropped, and the stream behaves like a new one.
const resets = async () => {
  const samples = Int16Array.from(input.samples);
  const endpoint = { rule1: null, rule2: null, rule3: { minUtteranceLength: 1 } };
  const options = { chunkSize: 8, numLeftChunks: 3, endpoint, hotwords: ['七'] };
  const recorded = (stream) => {
    const events = [];
    for (const type of ['partial', 'final', 'error']) {
      stream.addEventListener(type, ({ detail }) => events.push([type, detail.message ?? detail]));
    }
    return events;
  };
  const fed = async (stream) => {
    for (let start = 0; start < samples.length; start += 4000) {
      await stream.acceptWaveform(16000, samples.subarray(start, start + 4000));
    }
    await stream.inputFinished();
  };
  let onRun = () => {};
  const counting = counted({ run: (num) => onRun(num) }), { counts } = counting;
  const recognizer = await Recognizer.fromBundle(source, { ort: counting });
  const plain = recognizer.createStream(options), wanted = recorded(plain);
  await fed(plain);
  const expected = JSON.stringify(wanted), numExpected = counts.runs;
  const inFlight = async (run) => {
    counts.runs = 0;
    const reached = new Promise((resolve) => { onRun = (num) => { if (num === run) resolve(); }; });
    const stream = recognizer.createStream(options), events = recorded(stream);
    const pending = [1, 2].map(() => stream.acceptWaveform(8000, samples));
    pending.push(stream.inputFinished());
    await reached;
    stream.reset();
    const before = events.length, { text, segment, times } = stream.result;
    await fed(stream);
    const settled = await Promise.allSettled(pending);
    return {
      isSame: JSON.stringify(events.slice(before)) === expected, isLong: events.length - before > 5,
      isIdle: counts.runs - run === numExpected, // the old source ran no more graphs
      settled: settled.map(({ status }) => status), result: [text, segment, times],
    };
  };
  const landed = async (moment) => {
    let isBroken = ['failed', 'error'].includes(moment);
    counts.runs = 0;
    onRun = (num) => { if (isBroken && num > 10) throw new Error('out of memory'); };
    const stream = recognizer.createStream(options), events = recorded(stream);
    let before = 0, numRuns = 0;
    const reset = () => {
      stream.reset();
      before = events.length;
      numRuns = counts.runs;
    };
    stream.addEventListener(moment, reset, { once: true }); // some moments have no event
    const outcome = await caught(Promise.all([1, 2].map(() => stream.acceptWaveform(16000, samples))));
    await turn();
    if (moment === 'finished') await stream.inputFinished();
    if (!before) reset();
    const silent = events.length === before && counts.runs === numRuns;
    isBroken = false;
    await fed(stream);
    const isSame = JSON.stringify(events.slice(before)) === expected;
    return [moment, silent, isSame, outcome?.name ?? null];
  };
  const found = [[], []];
  for (const run of [1, 2, 3, 12]) found[0].push(await inFlight(run));
  for (const moment of ['finished', 'partial', 'final', 'failed', 'error']) found[1].push(await landed(moment));
  return found;
};

// Errors of a build of onnxruntime for damaged graphs: name, message, whether they have a cause, and an event.
const errorsOfOnnxruntime = async (name) => {
  const { default: runtime } = await import(name);
  runtime.env.wasm.numThreads = 1;
  const silence = new Float32Array(32000), sessionOptions = { logSeverityLevel: 4 };
  if (name === 'onnxruntime-node') sessionOptions.executionProviders = ['cpu'];
  const told = ({ name, message, cause }) => [name, message, cause instanceof Error && !(cause.name === name)];
  const changed = (change) => ({ read: async (name) => {
    const content = await source.read(name);
    if (name !== 'bundle.json') return change[name] ?? content;
    const manifest = JSON.parse(content), { createHash } = await import('node:crypto');
    Object.assign(manifest.model, change.model);
    for (const [name, found] of Object.entries(change)) {
      if (!manifest.files[name]) continue;
      manifest.files[name] = { size: found.length, sha256: createHash('sha256').update(found).digest('hex') };
    }
    return new TextEncoder().encode(JSON.stringify(manifest));
  } });
  const { model } = JSON.parse(new TextDecoder().decode(await source.read('bundle.json')));
  const [attention, convolution] = model.caches;
  const load = (change) => Recognizer.fromBundle(changed(change), { ort: runtime, sessionOptions });
  const failed = async (change) => {
    const recognizer = await load(change), stream = recognizer.createStream();
    let event = null;
    stream.addEventListener('error', ({ detail }) => { event = detail; });
    const error = await caught(stream.acceptWaveform(16000, silence));
    await recognizer.release();
    return [...told(error), event === error];
  };
  return [
    told(await caught(load({ 'ctc.onnx': Uint8Array.of(1, 2, 3) }))),
    await failed({ model: { caches: [{ ...attention, shape: [4, 0, 17] }, convolution] } }),
    await failed({ model: { caches: [attention] } }),
    await failed({ model: { output_size: 33 } }),
    await failed({ 'ctc.onnx': await source.read('features.onnx') }),
  ];
};

// Names, messages and causes.
const otherErrors = async () => {
  const told = ({ name, message, cause }) => [name, message, cause?.code ?? cause?.name ?? null];
  const gives = (found) => ({ run: () => found });
  const failed = async (on) => {
    const recognizer = await Recognizer.fromBundle(source, { ort: counted(on) });
    return told(await caught(recognizer.transcribe(new Float32Array(32000))));
  };
  const brief = { read: async () => new TextEncoder().encode('{') };
  const missing = { read: (name) => readFile(`${input.bundle}/${name.replace('tokens', 'none')}`) };
  const { model } = JSON.parse(await readFile(`${input.bundle}/bundle.json`));
  const log_probs = { data: Float32Array.of(NaN), dims: [1, 16, model.vocab_size] };
  return [
    told(await caught(Recognizer.fromBundle(brief, { ort }))),
    told(await caught(Recognizer.fromBundle(missing, { ort }))),
    told(await caught(Recognizer.fromBundle('http://127.0.0.1:9/', { ort }))),
    await failed(gives({ other: 1 })),
    await failed({ run: (num, { encoder_out }) => encoder_out && { log_probs } }),
  ];
};

// A worker has the results of this thread, cancellation and error classes, and it can be terminated.
const threads = async () => {
  const { Worker } = await import('node:worker_threads');
  const { pathToFileURL } = await import('node:url');
  const { Recognizer: Threaded, serve } = await part('worker.js');
  const errors = await part('index.js');
  const threaded = (script, folder = input.bundle) => {
    const worker = new Worker(new URL(script, pathToFileURL(`${input.folder}/`)), { execArgv: [] });
    return Threaded.fromBundle(pathToFileURL(folder), { worker }).catch(async (error) => {
      await worker.terminate(); // a worker stays usable after a failure
      throw error;
    });
  };
  const told = (error) => [error.name, error instanceof errors[error.name] || error.name, error.message];
  const local = await Recognizer.fromBundle(pathToFileURL(input.bundle), { ort });
  const recognizer = await threaded('serve.mjs'), stream = recognizer.createStream(), events = [];
  const samples = Int16Array.from(input.samples), expected = JSON.stringify(await local.transcribe(samples));
  const segments = JSON.stringify(await recognizer.transcribe(samples));
  for (const type of ['partial', 'final']) stream.addEventListener(type, () => events.push(type));
  for (let n = 0; n < samples.length; n += 4000) {
    await stream.acceptWaveform(16000, samples.subarray(n, n + 4000));
  }
  await stream.inputFinished();
  const controller = new AbortController(), { signal } = controller;
  const long = caught(recognizer.transcribe(new Int16Array(16000 * 600), 16000, { signal }));
  setTimeout(() => controller.abort('enough'), 50);
  const reason = await long, again = JSON.stringify(await recognizer.transcribe(samples));
  const late = await caught(recognizer.transcribe(samples, 16000, { signal })); // with an aborted signal
  const queues = [await bounded(local), await bounded(recognizer)];
  const languageModel = recognizer.languageModel(new Uint8Array(9));
  const damaged = recognizer.createStream({ languageModel }), damage = new Promise((resolve) => {
    damaged.addEventListener('error', ({ detail }) => resolve(told(detail)));
  });
  const found = [
    await damage,
    told(await caught(recognizer.transcribe(samples, 16000, { languageModel }))),
    told(await caught(threaded('serve.mjs', `${input.folder}/damaged`))),
    told(await caught(threaded('fail.mjs'))),
    told(await caught(threaded('exit.mjs'))),
  ];
  await recognizer.release();
  await recognizer.release();
  found.push(told(await caught(recognizer.transcribe(samples))));
  let refused;
  try { serve({ ort }); } catch ({ message }) { refused = message; }
  return [
    segments === expected && again === expected && expected.length > 50, events, [reason, late], found, refused,
    `${await caught(Threaded.fromBundle(source, { worker: new Worker('', { eval: true, execArgv: [] }) }))}`,
    queues.map(([finals, told]) => [finals === expected, told]),
  ];
};

// A worker may send events of a source that is already reset: they came too late.
const lateEvents = async () => {
  const { Recognizer: Threaded } = await part('worker.js'), asked = [], texts = [];
  let take = null;
  const on = (type, listener) => { if (type === 'message') take = listener; };
  const answer = (value) => take({ id: asked.shift().id, value });
  const loading = Threaded.fromBundle('file:///none/', { worker: { on, postMessage: (message) => asked.push(message), terminate() {} } });
  answer({ sampleRate: 16000 });
  const stream = (await loading).createStream(), [object] = asked[0].args, first = stream.result;
  const send = (text) => take({ object, type: 'partial', detail: { text } });
  stream.addEventListener('partial', ({ detail }) => texts.push(detail.text));
  answer();
  send('before');
  stream.reset();
  stream.reset();
  send('late');
  answer();
  await turn();
  send('also late');
  const { text } = stream.result;
  answer();
  await turn();
  send('after');
  return [texts, text, first.phrases];
};

// Samples of another context, as of a frame, are recognised. Those whose memory was transferred are refused, even later.
const foreignSamples = async () => {
  const { runInNewContext } = await import('node:vm');
  const recognizer = await Recognizer.fromBundle(source, { ort }), own = Int16Array.from(input.samples);
  const texts = async (samples) => JSON.stringify(await recognizer.transcribe(samples));
  const [Floats, Shorts] = runInNewContext('[Float32Array, Int16Array]'), float = Float32Array.from(own, (sample) => sample / 32768);
  const expected = await texts(own), isSame = [await texts(Floats.from(float)) === expected, await texts(Shorts.from(own)) === expected];
  const refusals = [];
  for (const samples of [own, float]) {
    const during = samples.slice(), running = caught(recognizer.transcribe(during));
    for (const each of [during, samples]) structuredClone(each, { transfer: [each.buffer] });
    refusals.push((await caught(recognizer.transcribe(samples)))?.name, (await running)?.name ?? null);
  }
  return [isSame, refusals];
};

const outcome = (call) => call().catch(({ stack }) => stack); // the test then shows it
console.log(JSON.stringify({
  loadingFromUrl: await outcome(loadingFromUrl),
  cacheThatFails: await outcome(cacheThatFails),
  loadingFromReader: await outcome(loadingFromReader),
  transcription: await outcome(transcription),
  resets: await outcome(resets),
  errorsOfOnnxruntime: await outcome(async () => [
    await errorsOfOnnxruntime('onnxruntime-node'), await errorsOfOnnxruntime('onnxruntime-web/wasm'),
  ]),
  otherErrors: await outcome(otherErrors),
  threads: await outcome(threads),
  lateEvents: await outcome(lateEvents),
  foreignSamples: await outcome(foreignSamples),
}));
