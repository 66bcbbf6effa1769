// Damage and misuse for tests/test_javascript.py, after the prelude of toys/browsing.py.
const { readFile } = await import('node:fs/promises');
const { default: ort } = await import('onnxruntime-node');
const { Recognizer, Resampler, Vad } = await part('index.js');
const sessionOptions = { executionProviders: ['cpu'] };
const load = (folder) => Recognizer.fromBundle({ read: (name) => readFile(`${folder}/${name}`) }, { ort, sessionOptions });
const told = async (call) => {
  try { return `${await call()}`; } catch ({ name, message }) { return `${name}: ${message}`; }
};
const noise = Float32Array.from({ length: 32000 }, (_, place) => Math.sin(place ** 1.5) / 2);
const damaged = [];
for (const folder of input.damaged) damaged.push(await told(async () => (await load(folder)).transcribe(noise)));

// Names for the calls of MISUSE.
const recognizer = await load(input.bundle), other = await load(input.bundle);
const stream = (options) => recognizer.createStream(options), bytes = (text) => new TextEncoder().encode(text);
const model = (...args) => recognizer.languageModel(...args), ctc = await readFile(`${input.bundle}/ctc.ort`);
const arpa = bytes(String.raw`\data\|ngram 1=3||\1-grams:|-1 <s>|-1 </s>|-1 ADA||\end\|`.replaceAll('|', '\n'));
const silence = new Float32Array(10), running = stream(), finished = stream(), endless = {};
const resampler = await Resampler.create(8000, 16000);
endless.rule1 = endless;
await running.acceptWaveform(8000, silence);
await finished.inputFinished();
const texts = () => recognizer.transcribe(new Float32Array(32000)).then(JSON.stringify);
const before = await texts(), misuse = [];
for (const call of input.calls) misuse.push(await told(() => eval(call)));
console.log(JSON.stringify([damaged, misuse, await texts() === before])); // the recogniser still works
