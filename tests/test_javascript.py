"""The JavaScript module compared with the Python runtime: the same samples must produce the same words."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import conformance
import pytest
import soundfile
from browsing import BROWSER, NODE, WEB, needs_node, needs_onnxruntime_web, run_module
from conformance import assert_same_segments, recognized
from manifests import LATER, LATER_FIELD, LOST, edited, flipped, of_later_version, without
from silero import write_vad
from static_damage import SHORTER, damaged, shorter

from u2moe.runtime import DecodingOptions, EndpointConfig, EndpointRule, Recognizer, SessionSettings, parse_hotwords
from u2moe.runtime.bundle.manifest_file import format_manifest, parse_manifest
from u2moe.runtime.bundle_location import DEMO_FOLDER

pytestmark = [needs_node, pytest.mark.slow]
GOLDEN = Path(__file__).parent / "golden"


def script(name):
    return (Path(__file__).parent / "javascript" / f"{name}.mjs").read_text(encoding="utf-8")


def test_the_core_gives_results_of_python_reads_other_manifests_and_frees_memory(tmp_path):
    """Tests the core.wasm that ships. Manifests have every field, no default values, or an unknown harmless field. An
    error unwinds the stack of WebAssembly, which would otherwise overflow; freed memory is reused."""
    whole = (GOLDEN / "bundle_of_version_4.json").read_text(encoding="utf-8")
    brief = format_manifest(parse_manifest(whole, GOLDEN))
    (tmp_path / "bundle.json").write_text(brief, encoding="utf-8")
    of_later_version("decoding", harmless=True)(tmp_path)
    manifests = [whole, brief, (tmp_path / "bundle.json").read_text(encoding="utf-8")]
    cases = [[kind, conformance.text_of(kind)] for kind in conformance.COMPUTED]
    found = run_module(script("core"), {"manifests": manifests, "cases": cases})
    for kind, results in zip(conformance.COMPUTED, found["cases"], strict=True):
        conformance.assert_same(kind, results)
    first, second, later = found["manifests"]
    assert first == second
    assert (first["features"]["sample_rate"], first["model"]["max_position"]) == (16_000, 5000)
    assert later["decoding"][LATER_FIELD] == 0.5
    unknown = f"u2moe: bundle.json: decoding: {LATER_FIELD} is a field that this version of u2moe does not know"
    assert found["told"] == [f"{unknown}; the bundle was written by {LATER}. Without the field: {LOST}"]
    before, after = found["sizes"]
    assert after - before < 2**22  # about 250 bytes per error


def in_javascript(options):
    """Return the options of a case of recordings in the form of the module."""
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
def test_recordings_are_recognised_as_in_python(tmp_path):
    """Tests every option, also as a default of a bundle, with the demo model and the same build of onnxruntime."""
    bundles = {kind: conformance.demo_with_defaults(kind, tmp_path) for kind in ("recordings", "defaults")}
    cases, samples = {kind: conformance.load(kind)["cases"] for kind in bundles}, conformance.clips()
    for name in ("windows", "sequences"):
        write_vad(tmp_path / f"{name}.onnx", sequence=name == "sequences")
    kinds = [
        {"folder": str(bundle), "cases": [{**case, "options": in_javascript(case["options"])} for case in cases[kind]]}
        for kind, bundle in bundles.items()
    ]
    model = DEMO_FOLDER / "language.lm"
    given = {"model": str(model), "networks": str(tmp_path), "samples": samples.tolist(), "kinds": kinds}
    for (kind, bundle), results in zip(bundles.items(), run_module(script("recordings"), given), strict=True):
        recognizer = Recognizer.from_pretrained(bundle, kernels="onnxruntime")
        recognizer.model.search_library = SessionSettings().search_library  # quicker, and bit-identical
        for case, segments in zip(cases[kind], results, strict=True):
            expected = conformance.recognized_case(recognizer, case, samples, model, tmp_path)
            assert expected, case["name"]
            assert_same_segments(segments, expected)


OTHERS = ("branchformer", "e_branchformer_moe", "efficient_conformer_stream")


@needs_onnxruntime_web
@pytest.mark.parametrize(
    ("other_bundle", "runtime"),
    [
        ("mfcc", "web"),
        ("squeezeformer", "node"),
        *(pytest.param(name, "web", marks=pytest.mark.endurance) for name in OTHERS),
    ],
    indirect=["other_bundle"],
)
def test_other_networks_are_recognised_by_the_program_as_by_python(other_bundle, runtime, sound, tmp_path):
    soundfile.write(tmp_path / "sound.wav", sound, 16_000, subtype="PCM_16")
    samples, _ = soundfile.read(tmp_path / "sound.wav", dtype="int16")
    endpoint = EndpointConfig(rule1=None, rule2=None, rule3=EndpointRule(min_utterance_length=1.0))
    expected = recognized(other_bundle, other_bundle.load(), samples, chunk_size=None, endpoint=endpoint)
    assert len(expected) > 1
    rules = {"rule1": None, "rule2": None, "rule3": {"minUtteranceLength": 1.0}}
    options = json.dumps({"numLeftChunks": 4, "endpoint": rules})
    program = [NODE, "transcribe.mjs", "--json", "--runtime", runtime, "--options", options]
    command = [*program, other_bundle.path, tmp_path / "sound.wav"]
    done = subprocess.run(command, cwd=BROWSER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same_segments(json.loads(done.stdout)["segments"], expected)


DAMAGES = [
    (flipped("ctc.ort"), "IntegrityError: ctc.ort does not match the manifest of the model. Load the model again"),
    (lambda folder: (folder / "bundle.json").unlink(), "BundleError: bundle.json: cannot be read: ENOENT"),
    (without("model", "blank"), "BundleError: bundle.json: model: field 'blank' is missing"),
    (edited("model", static={}), "BundleError: bundle.json: model: static: JavaScript does not support graphs"),
    (edited("files", **{"ctc.ort": {}}), "BundleError: bundle.json: files: ctc.ort: field 'sha256' is missing"),
    (edited("files", **{"../ctc.ort": {"sha256": "", "size": 1}}),
     "BundleError: bundle.json: files: found '../ctc.ort', expected a plain file"),
    (edited("files", **{"ctc.ort": {"sha256": "", "size": 1}}), "BundleError: bundle.json: files.ctc.ort: found {"),
    (edited("decoding", hotwords=["七 :"]), "BundleError: bundle.json: decoding: hotwords: hotwords line 1: weight "),
    (edited("decoding", hotwords=["七 :-2"]), "BundleError: bundle.json: decoding: hotwords: hotword '七': weight "),
    (edited("decoding", hotwords=["ẞ"]), "BundleError: bundle.json: decoding: hotwords: hotword 'ẞ': the "),
    (of_later_version("text", harmless=False), f"BundleError: bundle.json: text: {LATER_FIELD} is a field that this"),
]  # fmt: skip


RATE = "AudioError: sample rate must be a whole number between 1000 and 384000 Hz, got "
SAMPLES = "AudioError: samples must be a Float32Array in [-1, 1] or an Int16Array, got [object "
PHRASE = "expected a phrase, or a list of a phrase and its weight"
OTHER_MODEL = "RangeError: languageModel must come from languageModel() of this recogniser, got [object "
RELEASED = "StreamError: this recogniser has been released"
NO_VAD = "BundleError: this is not silero VAD 5 or 6: "
MISUSE = [
    ("Resampler.create(999, 16000)", RATE + "999"),
    ("Resampler.create(16000, 0)", RATE + "0"),
    ("Resampler.create('44100', 16000)", RATE + "'44100'"),
    ("resampler.accept([0, 0])", SAMPLES + "Array]"),
    ("resampler.free() ?? resampler.free() ?? resampler.accept(silence)", "StreamError: this resampler was freed"),
    ("Vad.open(new Uint8Array(9), { ort, min_silence: 1 })", "RangeError: unknown option 'min_silence'"),
    ("Vad.open(new Uint8Array(9), { ort })", NO_VAD),
    ("Vad.open(ctc, { ort })", NO_VAD + "its inputs are encoder_out, its outputs log_probs"),
    ("Vad.open(new Uint8Array(9))", "TypeError: ort must be the module 'onnxruntime-web' or 'onnxruntime-node'"),
    ("stream({ vad: { threshold: 0.4 } })", "RangeError: vad must be a Vad, which cannot be sent to a worker"),
    ("model(new Uint8Array(9))", "LanguageModelError: language model: line 1: there is no \\data\\: not an ARPA file"),
    ("model(bytes('u2moe-lm\x01'))", "LanguageModelError: language model: is not a compact language model that thi"),
    ("model(5)", "LanguageModelError: a language model must be a Uint8Array or an ArrayBuffer, got [object Number]"),
    ("model(new Uint8Array(9), { weight: -1 })", "RangeError: weight: found -1, expected a number from 0 to 100"),
    ("stream({ languageModel: 5 })", OTHER_MODEL + "Number]"),
    ("stream({ languageModel: {} })", OTHER_MODEL + "Object]"),
    ("other.createStream({ languageModel: model(arpa) })", OTHER_MODEL + "Object]"),
    ("stream({ search: 'beam' })",
     "RangeError: search must be one of attention_rescoring, ctc_prefix_beam, ctc_greedy, "),
    ("stream({ beamSize: '5' })", "RangeError: beamSize: found '5', expected a number"),
    ("stream({ beamSize: 0 })", "RangeError: beamSize: found 0, expected "),
    ("stream({ beamSize: 9n })", "RangeError: beamSize must not be a bigint"),
    ("stream({ ctcWeight: NaN })", "RangeError: ctcWeight must be a number, got NaN"),
    ("stream({ reverseWeight: 7 })", "RangeError: reverseWeight: found 7, expected a number from 0 to 1"),
    ("stream({ paddingS: 11 })", "RangeError: paddingS: found 11, expected a number from 0 to 10"),
    ("stream({ endpoint: 0 })", "RangeError: endpoint: found 0, expected true or false"),
    ("stream({ endpoint: new Map() })", "RangeError: endpoint must not be a Map"),
    ("stream({ endpoint: { rule5: null } })",
     "RangeError: endpoint: rule5: found null, expected no field of this name"),
    ("stream({ endpoint: endless })",
     "RangeError: endpoint: rule1: rule1: rule1: rule1: rule1: rule1: rule1: rule1: rule1 i"),
    ("stream({ beam_size: 4 })", "RangeError: unknown option 'beam_size'"),
    ("stream({ '': 4 })", "RangeError: unknown option ''"),
    ("stream(null)", "RangeError: options must be an object, got [object Null]"),
    ("stream(new Map())", "RangeError: options must be an object, got [object Map]"),
    ("stream({ maxQueueS: '5' })", "RangeError: maxQueueS must be a number above 0, or null, got 5"),
    ("stream({ maxQueueS: 1 }).acceptWaveform(16000, new Float32Array(16160))",
     "AudioOverflowError: 0.00 s of audio is waiting to be recognised: 1.01 s more would exceed the limit of 1 s"),
    ("stream().acceptWaveform(384001, silence)", RATE + "384001"),
    ("stream().acceptWaveform(NaN, silence)", RATE + "NaN"),
    ("stream().acceptWaveform('16000', silence)", RATE + "'16000'"),
    ("stream().acceptWaveform(44100.5, silence)", RATE + "44100.5"),
    ("running.acceptWaveform(16000, silence)", "AudioError: sample rate changed from 8000 to 16000 Hz in a stream"),
    ("running.acceptWaveform(8000, [0, 0])", SAMPLES + "Array]"),
    ("running.acceptWaveform(8000, Float32Array.of(0, 9))", "AudioError: samples are far outside [-1, 1]: divide "),
    ("recognizer.transcribe([1, 2])", SAMPLES + "Array]"),
    ("recognizer.transcribe(silence, '16000')", RATE + "'16000'"),
    ("finished.acceptWaveform(8000, silence)",
     "StreamError: the input is finished: reset the stream, or create "),
    ("finished.inputFinished()", "StreamError: the input of this stream is already finished"),
    ("stream({ hotwords: 'ADA' })", "RangeError: hotwords: found 'ADA', expected an array"),
    ("stream({ hotwords: ['ẞ'] })", "RangeError: hotword 'ẞ': the vocabulary has no 'ẞ'"),
    ("stream({ hotwords: ['a\\ud800'] })", "RangeError: hotwords: 0 contains half of a surrogate pair"),
    ("stream({ hotwords: [['ADA', 1, 2]] })", f"RangeError: hotwords: 0: found an array, {PHRASE}"),
    ("stream({ hotwords: [[]] })", f"RangeError: hotwords: 0: found an array, {PHRASE}"),
    ("stream({ hotwords: [{ phrase: 'ADA' }] })", f"RangeError: hotwords: 0: found an object, {PHRASE}"),
    ("stream({ hotwords: [null] })", f"RangeError: hotwords: 0: found null, {PHRASE}"),
    ("stream({ hotwords: [['七'], ['ADA', 'BEN']] })", "RangeError: hotwords: 1: 1: found 'BEN', expected a number"),
    ("stream({ hotwords: [['七'], ['七', 2], [1, 2]] })", "RangeError: hotwords: 2: 0: found 1, expected a string"),
    ("stream({ hotwords: [['七', NaN]] })", "RangeError: hotwords: 0: 1 must be a number, got NaN"),
    ("stream({ hotwords: [['七', -1.5]] })",
     "RangeError: hotword '七': weight must be above 0 and at most 100, got -1.5"),
    ("other.release() && other.createStream()", RELEASED),
    ("other.languageModel(arpa)", RELEASED),
    ("other.transcribe(silence)", RELEASED),
]  # fmt: skip
"""Calls, in this order, and the start of the error that each throws."""


@needs_onnxruntime_web
def test_misuse_damaged_files_and_outputs_of_unexpected_shapes_are_refused_by_name(bundle, ort_bundle, tmp_path):
    """The core would otherwise read memory beyond the outputs."""
    folders = [shutil.copytree(ort_bundle, tmp_path / str(number)) for number in range(len(DAMAGES))]
    for folder, (damage, _) in zip(folders, DAMAGES, strict=True):
        damage(folder)
    starts = [re.escape(message) for _, message in DAMAGES]
    for graph, output, axis in SHORTER:
        change = shorter(output, axis)
        folders.append(damaged(bundle.path, tmp_path / str(len(folders)), f"{graph}.onnx", change))
        starts.append(rf"InferenceError: {graph}.onnx: output {output} is \[.*\], expected \[")
    given = {"damaged": list(map(str, folders)), "bundle": str(ort_bundle), "calls": [call for call, _ in MISUSE]}
    refusals, errors, still_works = run_module(script("refusals"), given)
    assert still_works
    for refusal, start in zip(refusals, starts, strict=True):
        assert re.match(start, refusal)
    for (call, expected), message in zip(MISUSE, errors, strict=True):
        assert message.startswith(expected), call


@needs_onnxruntime_web
def test_types_describe_the_module():
    """In a page, which has no types of Node."""
    options = ["--module", "nodenext", "--target", "es2022", "--lib", "es2023,dom", "--typeRoots", "none", "--strict"]
    command = ["node_modules/.bin/tsc", *options, "--noEmit", "--skipDefaultLibCheck", "types.test.ts"]
    done = subprocess.run(command, cwd=BROWSER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    described = "(await import('u2moe/package.json', { with: { type: 'json' } })).default"
    assert run_module(f"console.log(JSON.stringify({described}))") == json.loads((WEB / "package.json").read_text())


@needs_onnxruntime_web
def test_the_snippet_for_node_runs(ort_bundle, bundle, model, sound, tmp_path):
    """Runs the snippet of the README with onnxruntime-node."""
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
