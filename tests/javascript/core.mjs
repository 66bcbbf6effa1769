// Calls of core.wasm for tests/test_javascript.py, after the prelude of toys/browsing.py.
const { Core, Resampler } = await part('core.js'), { instantiate } = WebAssembly, told = [];
let memory;
WebAssembly.instantiate = async (...given) => {
  const instance = await instantiate(...given);
  ({ memory } = instance.exports);
  return instance;
};
console.warn = (text) => told.push(text);
const core = await Core.load();

// Return the size of the memory after errors, each of which unwinds the stack, and after resamplers were freed.
const sizeAfter = (num) => {
  for (let i = 0; i < num; i += 1) {
    try { new Resampler(core, 7, 16000); } catch (error) { if (error.name !== 'AudioError') throw error; }
    if (i % 400) continue;
    const resampler = new Resampler(core, 44100, 16000);
    resampler.accept(new Float32Array(441000));
    resampler.free();
  }
  return memory.buffer.byteLength;
};

console.log(JSON.stringify({
  cases: input.cases.map(([kind, content]) => JSON.parse(core.text(core.call('case_results', kind, content)))),
  manifests: input.manifests.map((text) => core.parseManifest(text)),
  told,
  sizes: [sizeAfter(2000), sizeAfter(8000)],
}));
