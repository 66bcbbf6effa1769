"""The JavaScript module beside the Python runtime: the same numbers in, the same words out."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import conformance
import pytest
import soundfile
from browsing import BROWSER, WEB, needs_onnxruntime_web
from javascript import NODE, needs_node, run_module
from manifests import LATER, LATER_FIELD, LOST, edited, flipped, of_later_version, without
from other_runtimes import assert_same_segments, recognized
from silero import write_vad

from u2moe.runtime import DecodingOptions, EndpointConfig, EndpointRule, Recognizer, parse_hotwords
from u2moe.runtime.bundle.manifest_file import format_manifest, parse_manifest
from u2moe.runtime.bundle_location import DEMO_FOLDER

pytestmark = needs_node
GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("kind", conformance.COMPUTED)
def test_cases_have_the_results_of_python(kind):
    """In the core that ships."""
    found = run_module(
        """
        const { Core } = await part('core.js');
        const core = await Core.load();
        console.log(core.text(core.call('case_results', input.kind, JSON.stringify(input.content))));
        """,
        {"kind": kind, "content": conformance.load(kind)},
    )
    conformance.assert_same(kind, found)


def in_javascript(options):
    """Options of a case of recordings, as the module has them."""
    renamed = {
        re.sub("_(.)", lambda match: match[1].upper(), name): in_javascript(value) if isinstance(value, dict) else value
        for name, value in options.items()
    }
    if options.get("chunk_size", 0) is None:
        renamed["chunkSize"] = "full"
    if renamed.pop("textFormat", None) is not None:
        renamed["written"] = True
    if "hotwords" in options:
        renamed["hotwords"] = list(parse_hotwords(options["hotwords"]))
    return renamed


@needs_onnxruntime_web
@pytest.mark.parametrize("kind", ["recordings", "defaults"])
def test_recordings_are_recognised_as_in_python(kind, tmp_path):
    """With every option, on the demo model and the same build of onnxruntime."""
    bundle, model = conformance.demo_with_defaults(kind, tmp_path), DEMO_FOLDER / "language.lm"
    samples = conformance.clips()
    for name in ("windows", "sequences"):
        write_vad(tmp_path / f"{name}.onnx", sequence=name == "sequences")
    cases = conformance.load(kind)["cases"]
    found = run_module(
        """
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
          if (options.vad) { // neither what came before a reset nor the split matters
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
        """,
        {
            "folder": str(bundle),
            "model": str(model),
            "networks": str(tmp_path),
            "samples": samples.tolist(),
            "cases": [{**case, "options": in_javascript(case["options"])} for case in cases],
        },
    )
    recognizer = Recognizer.from_pretrained(bundle, kernels="onnxruntime")
    for case, segments in zip(cases, found, strict=True):
        expected = conformance.recognized_case(recognizer, case, samples, model, tmp_path)
        assert expected, case["name"]
        assert_same_segments(segments, expected)


@pytest.mark.slow
def test_errors_and_resamplers_leave_nothing_behind():
    """An error unwinds the stack of WebAssembly, which would overflow otherwise; what is freed is used again."""
    before, after = run_module(
        """
        const { Core, Resampler } = await part('core.js');
        const core = await Core.load();
        const work = (num) => {
          for (let i = 0; i < num; i += 1) {
            try { new Resampler(core, 7, 16000); } catch (error) { if (error.name !== 'AudioError') throw error; }
            if (i % 400) continue;
            const resampler = new Resampler(core, 44100, 16000);
            resampler.accept(new Float32Array(441000));
            resampler.free();
          }
          return core.size;
        };
        console.log(JSON.stringify([work(2000), work(8000)]));
        """
    )
    assert after - before < 2**22  # 250 bytes an error


@needs_onnxruntime_web
@pytest.mark.parametrize(
    "other_bundle",
    [
        "mfcc",
        "squeezeformer",
        *(
            pytest.param(name, marks=pytest.mark.endurance)
            for name in ("branchformer", "e_branchformer_moe", "efficient_conformer_stream")
        ),
    ],
    indirect=True,
)
def test_other_networks(other_bundle, sound, tmp_path):
    assert_recognised_by_program(other_bundle, other_bundle.path, sound, tmp_path)


@needs_onnxruntime_web
def test_graphs_in_ort_format(bundle, ort_bundle, sound, tmp_path):
    assert_recognised_by_program(bundle, ort_bundle, sound, tmp_path)


def assert_recognised_by_program(bundle, folder, sound, tmp_path):
    """As in Python, by examples/browser/transcribe.mjs."""
    soundfile.write(tmp_path / "sound.wav", sound, 16_000, subtype="PCM_16")
    samples, _ = soundfile.read(tmp_path / "sound.wav", dtype="int16")
    endpoint = EndpointConfig(rule1=None, rule2=None, rule3=EndpointRule(min_utterance_length=1.0))
    expected = recognized(bundle, bundle.load(), samples, chunk_size=None, endpoint=endpoint)
    assert len(expected) > 1
    rules = {"rule1": None, "rule2": None, "rule3": {"minUtteranceLength": 1.0}}
    options = json.dumps({"numLeftChunks": 4, "endpoint": rules})
    command = [NODE, "transcribe.mjs", "--json", "--runtime", "web", "--options", options]
    done = subprocess.run(
        [*command, folder, tmp_path / "sound.wav"], cwd=BROWSER, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert_same_segments(json.loads(done.stdout)["segments"], expected)


DAMAGES = [
    (flipped("ctc.ort"), "IntegrityError: ctc.ort is not the file that the model lists. Load the model again"),
    (lambda folder: (folder / "bundle.json").unlink(), "BundleError: bundle.json: cannot be read: ENOENT"),
    (edited("", version=1), "BundleError: bundle.json: version: found 1, expected 4"),
    (without("", "model"), "BundleError: bundle.json: field 'model' is missing"),
    (without("model", "blank"), "BundleError: bundle.json: model: field 'blank' is missing"),
    (
        edited("model", right_context="6"),
        "BundleError: bundle.json: model: right_context: found '6', expected a number",
    ),
    (edited("features", frame_shift_ms=0), "BundleError: bundle.json: features: frame_shift_ms: found 0, expected"),
    (edited("", calibration={"scale": 0}), "BundleError: bundle.json: calibration: scale: found 0, expected a number"),
    (edited("decoding", ctc_weight="a"), "BundleError: bundle.json: decoding: ctc_weight: found 'a', expected"),
    (edited("files", **{"ctc.ort": {}}), "BundleError: bundle.json: files: ctc.ort: field 'sha256' is missing"),
    (edited("files", **{"ctc.ort": {"sha256": "", "size": 1}}), "BundleError: bundle.json: files.ctc.ort: found {"),
    (of_later_version("text", harmless=False), f"BundleError: bundle.json: text: {LATER_FIELD} is a field that this"),
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


def test_manifests_of_other_versions_are_read(tmp_path):
    """With every field, without those at their default, and with one that is unknown and harmless."""
    whole = (GOLDEN / "bundle_of_version_4.json").read_text(encoding="utf-8")
    brief = format_manifest(parse_manifest(whole, GOLDEN))
    (tmp_path / "bundle.json").write_text(brief, encoding="utf-8")
    of_later_version("decoding", harmless=True)(tmp_path)
    first, second, later, told = run_module(
        """
        const { Core } = await part('core.js');
        const core = await Core.load(), told = [];
        console.warn = (text) => told.push(text);
        console.log(JSON.stringify([...input.map((text) => core.parseManifest(text)), told]));
        """,
        [whole, brief, (tmp_path / "bundle.json").read_text(encoding="utf-8")],
    )
    assert first == second
    assert (first["features"]["sample_rate"], first["model"]["max_position"]) == (16_000, 5000)
    assert later["decoding"][LATER_FIELD] == 0.5
    unknown = f"u2moe: bundle.json: decoding: {LATER_FIELD} is a field that this version of u2moe does not know"
    assert told == [f"{unknown}; the bundle is by {LATER}, without it: {LOST}"]


@needs_onnxruntime_web
def test_misuse_is_refused_by_name(ort_bundle):
    found = run_module(
        """
        const { readFile } = await import('node:fs/promises');
        const { default: ort } = await import('onnxruntime-web/wasm');
        ort.env.wasm.numThreads = 1;
        const { LanguageModel, Recognizer, Resampler, Vad } = await part('index.js');
        const recognizer = await Recognizer.fromBundle({ read: (name) => readFile(`${input}/${name}`) }, { ort });
        const silence = new Float32Array(10);
        const caught = (call) => { try { call(); } catch ({ name, message }) { return `${name}: ${message}`; } };
        const running = recognizer.createStream(), finished = recognizer.createStream();
        await running.acceptWaveform(8000, silence);
        await finished.inputFinished();
        const refused = (promise) => promise.catch(({ name, message }) => `${name}: ${message}`);
        console.log(JSON.stringify([
          await refused(Resampler.create(999, 16000)),
          await refused(Vad.open(new Uint8Array(9), { ort, min_silence: 1 })),
          caught(() => recognizer.createStream({ vad: { threshold: 0.4 } })),
          caught(() => recognizer.languageModel(new Uint8Array(9))),
          caught(() => recognizer.languageModel(new TextEncoder().encode('u2moe-lm\x01'))),
          caught(() => recognizer.languageModel(new Uint8Array(9), { weight: -1 })),
          caught(() => recognizer.createStream({ search: 'beam' })),
          caught(() => recognizer.createStream({ beamSize: '5' })),
          caught(() => recognizer.createStream({ hotwords: ['ẞ'] })),
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
          caught(() => recognizer.createStream({ hotwords: [['ADA', 1, 2]] })),
          caught(() => recognizer.createStream({ hotwords: [[]] })),
          caught(() => recognizer.createStream({ hotwords: [{ phrase: 'ADA' }] })),
          caught(() => recognizer.createStream({ hotwords: [null] })),
          caught(() => recognizer.createStream({ hotwords: [['七'], ['ADA', 'BEN']] })),
          caught(() => recognizer.createStream({ hotwords: [['七'], ['七', 2], [1, 2]] })),
          caught(() => recognizer.createStream({ hotwords: [['七', NaN]] })),
          caught(() => recognizer.createStream({ hotwords: [['七', -1.5]] })),
          caught(() => recognizer.createStream({ endpoint: 0 })),
          caught(() => recognizer.createStream({ endpoint: { rule5: null } })),
          caught(() => recognizer.createStream({ beam_size: 4 })),
          await refused(Vad.open(new Uint8Array(9), { ort })),
          caught(() => recognizer.createStream({ beamSize: 0 })),
        ]));
        """,
        str(ort_bundle),
    )
    assert found[:-2] == [
        "AudioError: sample rate must be between 1000 and 384000 Hz, got 999",
        "RangeError: there is no option min_silence",
        "RangeError: vad must be a Vad, which a worker cannot be sent",
        "LanguageModelError: language model: line 1: there is no \\data\\: not an ARPA file",
        "LanguageModelError: language model: is not a compact language model of this version",
        "RangeError: weight: found -1, expected a number from 0 to 100",
        "RangeError: search must be one of attention_rescoring, ctc_prefix_beam, ctc_greedy, attention, got 'beam'",
        "RangeError: beamSize: found '5', expected a number",
        "RangeError: hotword 'ẞ': the vocabulary has no 'ẞ'",
        "AudioError: sample rate must be between 1000 and 384000 Hz, got 384001",
        "AudioError: sample rate must be between 1000 and 384000 Hz, got NaN",
        "AudioError: sample rate changed from 8000 to 16000 Hz in a stream",
        "AudioError: samples must be a Float32Array in [-1, 1] or an Int16Array",
        "AudioError: samples are far outside [-1, 1]: divide integers by the largest first",
        "StreamError: the input of this stream is finished: reset it, or create another",
        "StreamError: the input of this stream is already finished",
        "RangeError: ctcWeight must be a number, got NaN",
        "RangeError: reverseWeight: found 7, expected a number from 0 to 1",
        "RangeError: paddingS: found 11, expected a number from 0 to 10",
        "RangeError: hotwords: found 'ADA', expected an array",
        "RangeError: hotwords: 0: found an array, expected a phrase, alone or with its weight",
        "RangeError: hotwords: 0: found an array, expected a phrase, alone or with its weight",
        "RangeError: hotwords: 0: found an object, expected a phrase, alone or with its weight",
        "RangeError: hotwords: 0: found null, expected a phrase, alone or with its weight",
        "RangeError: hotwords: 1: 1: found 'BEN', expected a number",
        "RangeError: hotwords: 2: 0: found 1, expected a string",
        "RangeError: hotwords: 0: 1: found null, expected a number",
        "RangeError: hotword '七': weight must be above 0 and at most 100, got -1.5",
        "RangeError: endpoint: found 0, expected true or false",
        "RangeError: endpoint: rule5: found null, expected no field of this name",
        "RangeError: there is no option beam_size",
    ]
    assert found[-2].startswith("BundleError: this is not silero VAD 5 or 6: ")
    assert found[-1].startswith("RangeError: beamSize: found 0, expected ")


@pytest.mark.slow
@needs_onnxruntime_web
def test_types_describe_the_module():
    options = ["--module", "nodenext", "--target", "es2022", "--lib", "es2023,dom", "--strict", "--noEmit"]
    command = ["node_modules/.bin/tsc", *options, "--skipDefaultLibCheck", "types.test.ts"]
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
