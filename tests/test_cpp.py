"""The C++ library, its C interface and its programs: results equal to Python's."""

import functools
import hashlib
import json
import re
import shutil
import subprocess
import sys

import compiled
import conformance
import manifests
import numpy as np
import onnx
import pytest
import soundfile
from compiled import CHECKS, TRANSCRIBE, Library, build
from conformance import assert_same_segments, recognized
from silero import write_vad
from wenet_directories import write_configuration

from u2moe.export import convert_static
from u2moe.quantize import quantize_bundle, recipe
from u2moe.runtime import Bundle, DecodingOptions, EndpointConfig, Recognizer, SessionSettings
from u2moe.runtime.bundle_location import DEMO_FOLDER

PROGRAM = compiled.ROOT / "examples" / "cpp"
WITHOUT_KERNELS = [compiled.ONNXRUNTIME, "-DU2MOE_KERNELS=OFF"]
"""For builds with other compilers and tools; tests/kernels tests the kernels with them."""
pytestmark = compiled.NEEDED


@pytest.fixture(scope="module", params=compiled.sanitized(compiled.ADDRESSES), ids=["plain", "compiled.sanitized"])
def library(request, tmp_path_factory):
    return Library(tmp_path_factory, request.param)


def assert_found_by_python(library, bundle, talk, *forms, left_chunks=4, **options):
    """Check that the program finds several segments in `talk`, the same as Python, with a bundle and other forms of it.
    Return those with the bundle."""
    samples, _ = soundfile.read(talk, dtype="int16")
    expected = recognized(bundle, bundle.load(), samples, num_left_chunks=left_chunks, **options)
    assert len(expected) > 1
    found = [library.segments("--left-chunks", left_chunks, folder, talk) for folder in (bundle.path, *forms)]
    for segments in found:
        assert_same_segments(segments, expected)
    return found[0]


def test_it_prints_what_python_gives_with_partial_results_and_times(library, bundle, model, ort_bundle, talk):
    """Also with graphs in ORT format. Files do not affect each other."""
    assert not list(ort_bundle.glob("*.onnx"))
    expected = assert_found_by_python(library, bundle, talk, ort_bundle)
    options = ["--left-chunks", 4, bundle.path]
    samples = soundfile.read(talk, dtype="int16")[0].tobytes()
    raw = library.segments("--raw", "--rate", 16_000, *options, input=samples)
    piped = library.segments(*options, "-", input=talk.read_bytes())
    assert raw == piped == [{**each, "file": "-"} for each in expected]
    assert library.segments(*options, talk, talk) == expected * 2
    for num_samples in (0, 399):
        assert library.printed(TRANSCRIBE, "--raw", bundle.path, input=bytes(2 * num_samples)) == ""
    done = library.run(TRANSCRIBE, bundle.path, talk)
    options = DecodingOptions(chunk_size=16, endpoint=EndpointConfig())
    found = Recognizer(bundle, model, options).transcribe(talk).segments
    assert done.stdout.decode().splitlines() == [f"{each.start:.2f} {each.end:.2f} {each.text}" for each in found]
    partial = [line for line in done.stderr.decode().splitlines() if line and "chema" not in line]
    assert len(partial) > len(found)
    assert any(partial[0][:3] in each.text for each in found)
    *_, timing = library.segments("--timing", bundle.path, talk)
    assert set(timing) == {"file", "load_ms", "ms"}


def test_other_networks(library, other_bundle, talk):
    assert_found_by_python(library, other_bundle, talk, chunk_size=None)


@pytest.mark.parametrize("kind", conformance.COMPUTED)
def test_cases_have_the_results_of_python(library, tmp_path, kind):
    found = library.check("conformance", kind, conformance.unpacked(kind, tmp_path))
    conformance.assert_same(kind, json.loads(found))


@pytest.mark.parametrize("kind", ["recordings", "defaults"])
def test_recordings_are_recognised_as_in_python(library, tmp_path, kind):
    """Every option on the demo model, with its native kernels or, without them, on onnxruntime."""
    samples = conformance.clips()
    soundfile.write(tmp_path / "clips.wav", samples, 16_000, subtype="PCM_16")
    model = DEMO_FOLDER / "language.lm"
    file, bundle = conformance.FOLDER / f"{kind}.json", conformance.demo_with_defaults(kind, tmp_path)
    for name in ("windows", "sequences"):
        write_vad(tmp_path / f"{name}.onnx", sequence=name == "sequences")
    lines = library.check("recordings", bundle, file, tmp_path / "clips.wav", model, tmp_path).splitlines()
    recognizer = Recognizer.from_pretrained(bundle)
    for case, found in zip(conformance.load(kind)["cases"], map(json.loads, lines), strict=True):
        expected = conformance.recognized_case(recognizer, case, samples, model, tmp_path)
        assert expected, case["name"]
        assert_same_segments(found, expected)
        for theirs, ours in zip(found, expected, strict=True):
            assert [each["score"] for each in theirs["nbest"]] == [each.score for each in ours.nbest], case["name"]
            is_single = case["options"].get("search") in ("attention", "ctc_greedy")  # numpy's float32 exp differs
            limit = 1e-7 if is_single else 1e-15
            confidences = [each["confidence"] for each in theirs["words"]]
            assert confidences == pytest.approx([each.confidence for each in ours.words], rel=0, abs=limit)


@pytest.mark.parametrize("kind", [
    (8000, "PCM_16", 1), (44_100, "PCM_24", 2), (48_000, "FLOAT", 1), (16_000, "PCM_U8", 1), (22_050, "PCM_32", 3),
])  # fmt: skip
def test_files_of_any_rate_and_kind(library, bundle, model, sound, tmp_path, monkeypatch, kind):
    """Results equal those of Python without soxr."""
    rate, subtype, channels = kind
    samples = np.tile(sound[:, np.newaxis], (1, channels)) * np.linspace(0.5, 1, channels, dtype=np.float32)
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype=subtype)
    monkeypatch.setitem(sys.modules, "soxr", None)
    content, _ = soundfile.read(tmp_path / "a.wav", dtype="float32", always_2d=True)
    expected = recognized(bundle, model, content.mean(axis=1, dtype=np.float32), rate)
    assert expected[0].text
    assert_same_segments(library.segments("--left-chunks", 4, bundle.path, tmp_path / "a.wav"), expected)


def test_letters_and_digests_are_those_of_python(library, tmp_path):
    """Newer versions of Unicode may add letters to the table, but not change any."""
    for line in library.check("letters").splitlines():
        code, upper, lower = (chr(int(item, 16)) for item in line.split())
        assert upper in (code, code.upper())
        assert lower in (code, code.lower())
    header = (compiled.SOURCE / "source" / "letter_case.hpp").read_text(encoding="utf-8")
    done = subprocess.run([sys.executable, CHECKS / "make_letter_case.py"], capture_output=True, text=True, check=True)
    version = header.split("Unicode ")[1].split(")")[0]
    assert done.stdout == header or f"Unicode {version})" not in done.stdout
    # At lengths around block boundaries, with and without SHA-256 instructions of the processor
    content = np.random.default_rng(32).bytes(200)
    (tmp_path / "content").write_bytes(content)
    expected = [hashlib.sha256(content[:num]).hexdigest() for num in range(201)]
    assert library.check("digests", tmp_path / "content").split() == [each for each in expected for _ in range(2)]


def test_threads_share_a_recognizer_but_no_stream_in_any_locale(library, bundle, model, clips, tmp_path, monkeypatch):
    """GUI programs set the user's locale, which may have a decimal comma."""
    samples, _ = soundfile.read(clips / "a.wav", dtype="float32")
    text = "".join(f"{each.text}|" for each in recognized(bundle, model, samples))
    assert library.check("threads", bundle.path, clips / "a.wav").splitlines() == [text] * 4
    told = library.check("two-threads", bundle.path, clips / "a.wav")
    assert told == "this stream is being decoded by another thread\n"
    command = ["localedef", "-i", "de_DE", "-f", "UTF-8", tmp_path / "de_DE.UTF-8"]
    if shutil.which("localedef") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the sources of locales: apt-get install locales")
    monkeypatch.setenv("LOCPATH", str(tmp_path))
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    (tmp_path / "hotwords.txt").write_text("a :2.5\n", encoding="utf-8")
    assert library.check("hotwords", tmp_path / "hotwords.txt") == "a 2,5\n"
    assert library.check("threads", bundle.path, clips / "a.wav").startswith(text)


def test_long_audio_takes_no_more_memory_and_grammars_and_states_are_kept(library, bundle, talk):
    """Otherwise each window would move all later samples, in time that grows with the square of their number. The fifth
    grammar replaces the one used the longest ago; each finds the phrase of its letter."""
    found = re.fullmatch(r"the same, (\d+) of (\d+)\n", library.check("at-once", bundle.path, talk))
    bytes_in_one_piece, all_bytes = map(int, found.groups())
    assert bytes_in_one_piece < 1_000_000 < all_bytes // 3  # the model runs at a third of the rate
    assert library.check("states") == "1 1"
    assert library.check("grammars", "abcdaeba") == "0:1 1:1 2:1 3:1 0:1 4:1 5:1 0:1 "


@pytest.mark.endurance
@pytest.mark.skipif(shutil.which("clang++") is None, reason="needs clang: apt-get install clang")
def test_clang_compiles_it_without_a_warning_and_computes_the_same(library, bundle, talk, tmp_path):
    by_clang = build(tmp_path, "u2moe_transcribe", "-DCMAKE_CXX_COMPILER=clang++", *WITHOUT_KERNELS, source=PROGRAM)
    found, expected = (library.segments(bundle.path, talk, program=each) for each in (by_clang, TRANSCRIBE))
    assert found == expected != []


def test_a_bundle_in_memory_is_that_of_its_folder(library, bundle, static, clips, tmp_path):
    """The bundle in memory uses session options of the caller, in a bundle of fixed shape only for static.onnx."""
    form = json.loads((static("moe_tiny") / "static.json").read_text())
    decoder = {"hyps", "hyps_lens", "encoder_out", "encoder_lens"}
    for folder, inputs in ((bundle.path, decoder), (static("moe_tiny"), {each["name"] for each in form["inputs"]})):
        first, second = library.check("memory", folder, clips / "a.wav", tmp_path / "last.onnx").splitlines()
        assert first == second
        assert len(first) > len("|")
        assert {each.name for each in onnx.load(tmp_path / "last.onnx").graph.input} == inputs


def test_native_kernels_run_packed_bundles_and_all_that_they_do_not_refuse(library, bundle, quantized, talk, tmp_path):
    """As in Python, with equal results: onnxruntime runs only the refused function."""
    pytest.importorskip("u2moe_kernels", reason="u2moe-kernels is not installed", exc_type=ImportError)
    packed, _ = quantize_bundle(bundle.path, tmp_path / "packed", recipe("int8", packed=True))
    later = manifests.with_activation(quantized("int8"), "cube", tmp_path / "later")
    for each, kernels, message in (
        (packed, "onnxruntime", "weights are packed for native kernels, but onnxruntime runs the graph: as requested"),
        (later, "native", "encoder.onnx: native kernels cannot run it (onnxruntime's own kernels can): "),
    ):
        model = each.load(SessionSettings())
        assert_found_by_python(library, each, talk)
        described = json.loads(library.printed(TRANSCRIBE, "--describe", each.path))
        refused = [f"{name}: {reason}" for name, reason in model.kernels.refused.items()]
        assert (described["native_kernels"], described["reason"], described["refused"]) == (True, "", refused)
        assert all(each.startswith("Int8MixtureOfExperts of encoder: attribute activation must") for each in refused)
        assert len(refused) == (each is later)
        assert message in library.problem("--kernels", kernels, each.path, talk)


@pytest.fixture(scope="module")
def static(exported, export_quickly, tmp_path_factory):
    """Return a function that returns the folder of a network's bundle with fixed shapes, and creates it once."""

    @functools.cache
    def convert(name):
        folder = tmp_path_factory.mktemp(name)
        if name.endswith("_tiny"):
            source = exported(name)
        else:
            checkpoint = write_configuration(name, folder / "checkpoint", blank_bias=4.0)
            source = export_quickly(checkpoint, folder / "bundle")
        return convert_static(source, folder / "static", num_left_chunks=2).path

    return convert


@pytest.mark.parametrize(
    "name", ["moe_tiny", "efficient_conformer_stream_three_rates", "stack_n_frames_whisper_positions"]
)
def test_graphs_of_fixed_shape(library, static, talk, name):
    """With all frame rates, positions and caches, utterances that end within a chunk, and a short last chunk."""
    bundle = Bundle.open(static(name))
    size = bundle.manifest.model.static.chunk_size
    assert_found_by_python(library, bundle, talk, left_chunks=2, chunk_size=size)
    refused = library.problem("--left-chunks", 3, bundle.path, talk)
    assert f"this bundle supports only chunk_size {size} and num_left_chunks 2, got" in refused


def test_a_runner_of_the_program(library, static, bundle, clips, tmp_path):
    """It replaces static.onnx, which may be missing. Errors name the output."""
    source, audio = static("moe_tiny"), clips / "a.wav"
    folder = shutil.copytree(source, tmp_path / "static", ignore=shutil.ignore_patterns("static.onnx"))
    expected = library.segments("--left-chunks", 2, source, audio)
    text, *errors = library.check("runner", folder, source / "static.onnx", audio, bundle.path).splitlines()
    assert text == "".join(f"{each['text']}|" for each in expected) != ""
    shape = json.loads((source / "static.json").read_text())["outputs"][-1]["shape"]
    assert errors == [
        f"U2MOE_PROVIDER_ERROR: static: output r_cnn_cache: found NaN or infinity, expected float32 {shape}",
        "U2MOE_PROVIDER_ERROR: static: the runner returned 7, expected 0",
        f"U2MOE_INVALID_ARGUMENT: runner needs a bundle of fixed shape, which {bundle.path}/bundle.json is not",
    ]


@pytest.mark.endurance
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind: apt-get install valgrind")
@pytest.mark.parametrize("library", [""], indirect=True)
def test_valgrind_finds_nothing(library, bundle, sound, tmp_path):
    """In the program as users build it. Valgrind also finds uninitialised values, which sanitizers miss."""
    soundfile.write(tmp_path / "a.wav", sound[:12_000], 8000, subtype="PCM_16")
    (tmp_path / "hotwords.txt").write_text(f"{bundle.tokens[5]}{bundle.tokens[6]}\n", encoding="utf-8")
    program = build(tmp_path / "build", "u2moe_transcribe", *WITHOUT_KERNELS, source=PROGRAM)
    library.printed(
        program, "--hotwords", tmp_path / "hotwords.txt", bundle.path, tmp_path / "a.wav", wrapper=compiled.VALGRIND
    )
