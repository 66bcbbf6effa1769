// Recognise the recordings of tests/conformance for tests/test_javascript.py, after the prelude of toys/browsing.py.
const { readFile } = await import('node:fs/promises');
const { default: ort } = await import('onnxruntime-node');
const { Recognizer, Vad } = await part('index.js');
const sessionOptions = { executionProviders: ['cpu'], intraOpNumThreads: 1 }, sessions = new Map();

// onnxruntime that loads graphs of a size once, because the bundles differ only in their manifests.
const sharing = { Tensor: ort.Tensor, InferenceSession: { create(content, options) {
  if (!sessions.has(content.length)) sessions.set(content.length, ort.InferenceSession.create(content, options));
  return sessions.get(content.length);
} } };

const recognized = async (recognizer, { repeats, options }) => {
  const weights = options.languageModel;
  if (weights) options.languageModel = recognizer.languageModel(await readFile(input.model), weights);
  const samples = Int16Array.from(Array(repeats).fill(input.samples).flat());
  if (!options.vad) return recognizer.transcribe(samples, 16000, options);
  const { network, ...when } = options.vad;
  options.vad = await Vad.open(await readFile(`${input.networks}/${network}.onnx`), { ort, sessionOptions, ...when });
  const stream = recognizer.createStream(options), finals = []; // a reset discards earlier audio, and the split does not matter
  stream.acceptWaveform(8000, samples.subarray(0, 30000));
  stream.reset();
  stream.addEventListener('final', ({ detail }) => finals.push(detail));
  for (let n = 0; n < samples.length; n += 3001) stream.acceptWaveform(16000, samples.subarray(n, n + 3001));
  await stream.inputFinished();
  return finals;
};

const results = [];
for (const { folder, cases } of input.kinds) {
  const read = (name) => readFile(`${folder}/${name}`), found = [];
  const recognizer = await Recognizer.fromBundle({ read }, { ort: sharing, sessionOptions });
  for (const each of cases) found.push(await recognized(recognizer, each));
  results.push(found);
}
console.log(JSON.stringify(results));
