// Recognise the recordings of tests/conformance for tests/test_javascript.py, after the prelude of toys/browsing.py.
const { readFile } = await import('node:fs/promises');
const { default: ort } = await import('onnxruntime-node');
const { Recognizer, Vad } = await part('index.js');
const read = (name) => readFile(`${input.folder}/${name}`);
const sessionOptions = { executionProviders: ['cpu'], intraOpNumThreads: 1 };
const recognizer = await Recognizer.fromBundle({ read }, { ort, sessionOptions }), results = [];
for (const { repeats, options } of input.cases) {
  const weights = options.languageModel;
  if (weights) options.languageModel = recognizer.languageModel(await readFile(input.model), weights);
  if (options.vad) {
    const { network, ...when } = options.vad;
    const content = await readFile(`${input.networks}/${network}.onnx`);
    options.vad = await Vad.open(content, { ort, sessionOptions, ...when });
  }
  const samples = Int16Array.from(Array(repeats).fill(input.samples).flat());
  if (options.vad) { // a reset discards earlier audio, and the split does not matter
    const stream = recognizer.createStream(options), finals = [];
    stream.acceptWaveform(8000, samples.subarray(0, 30000));
    stream.reset();
    stream.addEventListener('final', ({ detail }) => finals.push(detail));
    for (let n = 0; n < samples.length; n += 3001) stream.acceptWaveform(16000, samples.subarray(n, n + 3001));
    await stream.inputFinished();
    results.push(finals);
    continue;
  }
  results.push(await recognizer.transcribe(samples, 16000, options));
}
console.log(JSON.stringify(results));
