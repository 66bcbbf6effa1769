"""The JavaScript module beside the Python runtime: the same numbers in, the same words out."""

import json
import shutil
import subprocess

import conformance
import numpy as np
import pytest
import soundfile
from browsing import BROWSER, WEB, needs_onnxruntime_web
from javascript import NODE, needs_node, run_module
from manifests import adjusted, edited, flipped, without
from other_runtimes import assert_same_segments, recognized
from searches import random_frames

from u2moe.runtime import DecodingOptions, EndpointConfig, EndpointRule, Recognizer, parse_hotwords
from u2moe.runtime.audio.padding import Padding
from u2moe.runtime.audio.resampling import SincResampler

pytestmark = needs_node


SEARCH = """
  const { PrefixBeamSearch } = await part('ctc.js');
  const { ContextGraph } = await part('hotwords.js');
  const { Vocabulary } = await part('text.js');
  const vocabulary = new Vocabulary(input.symbols);
  console.log(JSON.stringify(input.cases.map(({ beam_size, frames, phrases }) => {
    const search = new PrefixBeamSearch(beam_size, 0, phrases && new ContextGraph(phrases, vocabulary));
    const split = Math.floor(frames.length / 3); // any split gives the same
    for (const part of [frames.slice(0, split), frames.slice(split)]) {
      search.advance(Float32Array.from(part.flat()), input.symbols.length);
    }
    const partial = search.hypotheses(1)[0].tokens;
    search.finish();
    const found = search.hypotheses(), { tokens } = found[0];
    return {
      partial,
      tokens: found.map((each) => each.tokens),
      times: found.map((each) => each.times),
      scores: found.map(({ score, contextScore }) => [score, contextScore, 0]),
      probabilities: found.map((each) => each.probabilities),
      text: vocabulary.text(tokens),
      words: vocabulary.words(tokens).map(({ text, begin, end }) => [text, begin, end]),
    };
  })));
"""
ENDPOINT = """
  const { Endpointer, endpointRules } = await part('endpoint.js');
  const { findCut } = await part('alignment.js');
  const { Vocabulary } = await part('text.js');
  const vocabulary = new Vocabulary(input.symbols), width = input.symbols.length;
  const camel = (rule) => rule && {
    mustContainNonsilence: rule.must_contain_nonsilence,
    minTrailingSilence: rule.min_trailing_silence,
    minUtteranceLength: rule.min_utterance_length,
  };
  console.log(JSON.stringify(input.cases.map(({ frames, tokens, endpoint, frame_s }) => {
    const logProbs = Float32Array.from(frames.flat());
    const rules = Object.fromEntries(Object.entries(endpoint).map(([name, rule]) => [name, camel(rule)]));
    const found = new Endpointer(endpointRules(rules), frame_s, 0).advance(logProbs, width);
    return {
      endpoint: found && { num_frames: found.numFrames, trailing_silence: found.trailingSilence },
      cut: findCut(vocabulary, tokens, logProbs, width, 0),
    };
  })));
"""
PAUSES = """
  const { endAtPauses, findPauses } = await part('pauses.js');
  console.log(JSON.stringify(input.cases.map(({ levels, words, peaks, frame_s }) => {
    const pauses = findPauses(Float32Array.from(levels), frame_s);
    return { pauses, words: endAtPauses(words, peaks, pauses) };
  })));
"""
PADDING = """
  const { Padding } = await part('sound/padding.js');
  console.log(JSON.stringify(input.cases.map(({ samples, split, padding_s }) => {
    const padding = new Padding(padding_s, { sample_rate: 16000, frame_length_ms: 25 });
    const scaled = Float32Array.from(samples, (sample) => sample / 32768);
    const parts = [padding.accept(scaled.slice(0, split)), padding.accept(scaled.slice(split)), padding.finish()];
    const heard = parts.flatMap((each) => [...each]);
    return { num_before: padding.numBefore, num_heard: heard.length, num_sounds: heard.filter(Boolean).length };
  })));
"""
RESAMPLING = """
  const { Resampler } = await part('sound/resampler.js');
  console.log(JSON.stringify(input.cases.map(({ samples, rate }) => {
    const resampler = new Resampler(rate, 16000);
    const scaled = Float32Array.from(samples, (sample) => sample / 32768);
    return { samples: [...resampler.accept(scaled), ...resampler.finish()] };
  })));
"""


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("search", SEARCH),
        ("endpoint", ENDPOINT),
        ("pauses", PAUSES),
        ("padding", PADDING),
        ("resampling", RESAMPLING),
    ],
)
def test_cases_have_the_results_of_python(kind, code):
    """Those of what the module has: no language models, no search without a beam."""
    content = conformance.load(kind)
    if kind == "search":
        content["cases"] = [
            {**case, "phrases": case["hotwords"] and parse_hotwords(case["hotwords"])}
            for case in content["cases"]
            if case["search"] == "ctc_prefix_beam" and not case["language_model"]
        ]
    conformance.assert_same(kind, run_module(code, content), {case["name"] for case in content["cases"]})


def test_searches_leave_nothing_behind():
    """Also where promises follow promises, so that the event loop never gets a turn."""
    frames = random_frames(1, 60)
    growth = run_module(
        """
        const { PrefixBeamSearch } = await part('ctc.js');
        const frames = Float32Array.from(input.flat());
        const recognise = (times) => {
          for (let i = 0; i < times; i += 1) new PrefixBeamSearch(10, 0).advance(frames, frames.length / input.length);
          gc();
          return process.memoryUsage().heapUsed;
        };
        const before = recognise(20);
        console.log(JSON.stringify(recognise(400) - before));
        """,
        frames.tolist(),
        "--expose-gc",
    )
    assert growth < 1_000_000


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_056, 44_100, 48_000])
def test_resampling(rate):
    """Any split gives the same samples: to the last bit those of Python, whose tests measure their quality."""
    seconds = np.arange(rate) / rate
    tone = (0.5 * np.sin(2 * np.pi * 1000 * seconds)).astype(np.float32)
    whole, split = run_module(
        """
        const { Resampler } = await part('sound/resampler.js');
        const samples = Float32Array.from(input.samples);
        const resample = (sizes) => {
          const resampler = new Resampler(input.rate, 16000), out = [];
          let start = 0;
          for (const size of [...sizes, samples.length]) {
            out.push(...resampler.accept(samples.slice(start, start + size)));
            start += size;
          }
          return [...out, ...resampler.finish()];
        };
        console.log(JSON.stringify([resample([]), resample([1, 0, 300, 7, 4000])]));
        """,
        {"samples": tone.tolist(), "rate": rate},
    )
    assert whole == split
    assert whole == SincResampler(rate, 16_000).resample_chunk(tone, last=True).tolist()


def padded_cases():
    """Samples of several lengths, with a sound at the beginning, at the end, or both."""
    for begins, ends in ((True, True), (False, True), (True, False)):
        for num_samples in (0, 1, 128, 399, 400, 1000):
            samples = np.linspace(0.2, 0.21, 1000, dtype=np.float32)[:num_samples]
            samples[:400] += np.float32(0.1) * begins * (np.arange(len(samples[:400])) % 2).astype(np.float32)
            samples[-400:] += np.float32(0.1) * ends * (np.arange(len(samples[-400:])) % 2).astype(np.float32)
            yield samples


def test_padding():
    """Silence comes where it comes in Python, also from a program that fills the same array again and again."""
    found = run_module(
        """
        const { Padding } = await part('sound/padding.js');
        const padded = (samples) => {
          const padding = new Padding(0.18, { sample_rate: 16000, frame_length_ms: 25 });
          const array = new Float32Array(128), heard = [];
          for (let start = 0; start < samples.length; start += 128) {
            const portion = samples.slice(start, start + 128);
            array.set(portion);
            heard.push(...padding.accept(array.subarray(0, portion.length)));
          }
          heard.push(...padding.finish());
          return [padding.numBefore, heard];
        };
        console.log(JSON.stringify(input.map(padded)));
        """,
        [samples.tolist() for samples in padded_cases()],
    )
    for theirs, samples in zip(found, padded_cases(), strict=True):
        padding = Padding(0.18, 16000, 400)
        expected = np.concatenate([padding.accept(samples), padding.finish()])
        assert theirs == [padding.num_before, expected.tolist()]


@needs_onnxruntime_web
@pytest.mark.parametrize("kind", ["onnx", "ort"])
def test_streams(bundle, model, ort_bundle, sound, tmp_path, kind):
    """Segments are those of Python, also with hotwords, calibration and padding."""
    file = tmp_path / "sound.wav"
    soundfile.write(file, sound, 16_000, subtype="PCM_16")
    samples, _ = soundfile.read(file, dtype="int16")
    hotwords, folder = None, bundle.path
    if kind == "ort":
        hotwords = [bundle.tokens[7], bundle.tokens[9]]
        bundle, folder = adjusted(bundle, ort_bundle, tmp_path / "bundle")
    endpoint = EndpointConfig(rule1=None, rule2=None, rule3=EndpointRule(min_utterance_length=1.5))
    options = {"chunk_size": 8, "num_left_chunks": 3, "beam_size": 6}
    expected = recognized(bundle, model, samples, hotwords=hotwords, endpoint=endpoint, **options)
    rules = {"rule1": None, "rule2": None, "rule3": {"minUtteranceLength": 1.5}}
    options = {"chunkSize": 8, "numLeftChunks": 3, "beamSize": 6, "endpoint": rules, "hotwords": hotwords}
    command = [NODE, "transcribe.mjs", "--json", "--runtime", "web", "--options", json.dumps(options), folder, file]
    done = subprocess.run(command, cwd=BROWSER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(expected) > 1
    assert_same_segments(json.loads(done.stdout)["segments"], expected)


@needs_onnxruntime_web
def test_other_networks(other_bundle, sound, tmp_path):
    soundfile.write(tmp_path / "sound.wav", sound, 16_000, subtype="PCM_16")
    samples, _ = soundfile.read(tmp_path / "sound.wav", dtype="int16")
    endpoint = EndpointConfig(rule1=None, rule2=None, rule3=EndpointRule(min_utterance_length=1.0))
    expected = recognized(other_bundle, other_bundle.load(), samples, chunk_size=None, endpoint=endpoint)
    assert len(expected) > 1
    rules = {"rule1": None, "rule2": None, "rule3": {"minUtteranceLength": 1.0}}
    options = json.dumps({"numLeftChunks": 4, "endpoint": rules})
    command = [NODE, "transcribe.mjs", "--json", "--runtime", "web", "--options", options]
    done = subprocess.run(
        [*command, other_bundle.path, tmp_path / "sound.wav"], cwd=BROWSER, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert_same_segments(json.loads(done.stdout)["segments"], expected)


DAMAGES = [
    (flipped("ctc.ort"), "IntegrityError: ctc.ort: sha256 is "),
    (lambda folder: (folder / "bundle.json").unlink(), "BundleError: bundle.json: cannot be read: ENOENT"),
    (edited("", version=1), "BundleError: bundle.json: version: found 1, expected 4"),
    (without("", "model"), "BundleError: bundle.json: model: found undefined, expected an object"),
    (without("model", "blank"), "BundleError: bundle.json: model.blank: found undefined, expected a number between 0"),
    (edited("model", right_context="6"), "BundleError: bundle.json: model.right_context: found 6, expected a number"),
    (edited("features", frame_shift_ms=0), "BundleError: bundle.json: features.frame_shift_ms: found 0, expected"),
    (edited("", calibration={"scale": 0}), "BundleError: bundle.json: calibration.scale: found 0, expected a number"),
    (edited("decoding", ctc_weight="a"), "BundleError: bundle.json: decoding.ctc_weight: found a, expected"),
    (edited("files", **{"ctc.ort": {}}), "BundleError: bundle.json: files.ctc.ort: found {}, expected its size and"),
]


@needs_onnxruntime_web
def test_damage_is_refused_by_name(ort_bundle, tmp_path):
    folders = [shutil.copytree(ort_bundle, tmp_path / str(number)) for number in range(len(DAMAGES))]
    for folder, (damage, _) in zip(folders, DAMAGES, strict=True):
        damage(folder)
    found = run_module(
        """
        const { readFile } = await import('node:fs/promises');
        const ort = await import('onnxruntime-web/wasm');
        const { Recognizer } = await part('index.js');
        const refusal = (folder) => Recognizer.fromBundle({ read: (name) => readFile(`${folder}/${name}`) }, { ort })
          .catch(({ name, message }) => `${name}: ${message}`);
        console.log(JSON.stringify(await Promise.all(input.map(refusal))));
        """,
        list(map(str, folders)),
    )
    for refusal, (_, expected) in zip(found, DAMAGES, strict=True):
        assert refusal.startswith(expected)


@needs_onnxruntime_web
def test_misuse_is_refused_by_name(ort_bundle):
    found = run_module(
        """
        const { readFile } = await import('node:fs/promises');
        const { default: ort } = await import('onnxruntime-web/wasm');
        ort.env.wasm.numThreads = 1;
        const { Recognizer, Resampler } = await part('index.js');
        const recognizer = await Recognizer.fromBundle({ read: (name) => readFile(`${input}/${name}`) }, { ort });
        const silence = new Float32Array(10);
        const caught = (call) => { try { call(); } catch ({ name, message }) { return `${name}: ${message}`; } };
        const running = recognizer.createStream(), finished = recognizer.createStream();
        await running.acceptWaveform(8000, silence);
        await finished.inputFinished();
        console.log(JSON.stringify([
          caught(() => new Resampler(999, 16000)),
          caught(() => recognizer.createStream().acceptWaveform(384001, silence)),
          caught(() => recognizer.createStream().acceptWaveform(NaN, silence)),
          caught(() => running.acceptWaveform(16000, silence)),
          caught(() => running.acceptWaveform(8000, [0, 0])),
          caught(() => running.acceptWaveform(8000, Float32Array.of(0, 9))),
          caught(() => finished.acceptWaveform(8000, silence)),
          caught(() => finished.inputFinished()),
          caught(() => recognizer.createStream({ ctcWeight: NaN })),
          caught(() => recognizer.createStream({ reverseWeight: 7 })),
          caught(() => recognizer.createStream({ paddingS: 11 })),
          caught(() => recognizer.createStream({ hotwords: 'ADA' })),
          caught(() => recognizer.createStream({ endpoint: 0 })),
          caught(() => recognizer.createStream({ endpoint: { rule5: null } })),
          caught(() => recognizer.createStream({ beam_size: 4 })),
          caught(() => recognizer.createStream({ beamSize: 0 })),
        ]));
        """,
        str(ort_bundle),
    )
    assert found[:-1] == [
        "RangeError: sample rate must be between 1000 and 384000 Hz, got 999",
        "AudioError: sample rate must be between 1000 and 384000 Hz, got 384001",
        "AudioError: sample rate must be between 1000 and 384000 Hz, got NaN",
        "AudioError: sample rate changed from 8000 to 16000 Hz in a stream",
        "AudioError: samples must be a Float32Array in [-1, 1] or an Int16Array",
        "AudioError: samples hold 9, expected floats in [-1, 1]",
        "StreamError: the input of this stream is finished: reset it, or create another",
        "StreamError: the input of this stream is already finished",
        "RangeError: ctcWeight must be a number from 0 to 1.7976931348623157e+308, got NaN",
        "RangeError: reverseWeight must be a number from 0 to 1, got 7",
        "RangeError: paddingS must be a number from 0 to 10, got 11",
        "RangeError: hotwords must be an array of phrases, got ADA",
        "RangeError: endpoint must be true, false or rules, got 0",
        "RangeError: endpoint has no rule5: there are rule1, rule2, rule3",
        "RangeError: there is no option beam_size",
    ]
    assert found[-1].startswith("RangeError: beamSize must be ")


@pytest.mark.slow
@needs_onnxruntime_web
def test_types_describe_the_module():
    options = ["--module", "nodenext", "--target", "es2022", "--lib", "es2023,dom", "--strict", "--noEmit"]
    command = ["node_modules/.bin/tsc", *options, "types.test.ts"]
    done = subprocess.run(command, cwd=BROWSER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@needs_onnxruntime_web
def test_the_snippet_for_node_runs(ort_bundle, bundle, model, sound, tmp_path):
    """What the README shows, with onnxruntime-node."""
    page = (WEB / "README.md").read_text(encoding="utf-8")
    snippet = page.partition("## In Node")[2].partition("```js\n")[2].partition("```")[0]
    soundfile.write(tmp_path / "sound.wav", sound, 16_000, subtype="PCM_16")
    command = [NODE, "--input-type=module", "-e", snippet, "--", ort_bundle, tmp_path / "sound.wav"]
    done = subprocess.run(command, cwd=BROWSER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    options = DecodingOptions(chunk_size=16, endpoint=EndpointConfig())
    expected = Recognizer(bundle, model, options).transcribe(tmp_path / "sound.wav").segments
    assert [line.split(maxsplit=2)[2] for line in done.stdout.splitlines()] == [item.text for item in expected]
    assert done.stderr
