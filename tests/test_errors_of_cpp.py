"""Errors of the C++ library, its C interface and its programs: misuse, damaged files and want of memory."""

import json
import os
import re
import shutil
from pathlib import Path

import manifests
import numpy as np
import onnxruntime
import pytest
import soundfile
from compiled import ADDRESSES, HAS_OPENSSL, NEEDED, TRANSCRIBE, Library, sanitized
from manifests import edited, flipped, of_later_version, without, written_key
from static_damage import DAMAGED_SHAPES, SHORTER, damaged, shorter

from u2moe.export import convert_static
from u2moe.runtime import Grammar, GrammarError
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.cli import main
from u2moe.runtime.decoding.phrases import PhraseGraph
from u2moe.runtime.options import SEARCHES

pytestmark = NEEDED


@pytest.fixture(scope="module", params=sanitized(ADDRESSES), ids=["plain", "sanitized"])
def library(request, tmp_path_factory):
    return Library(tmp_path_factory, request.param)


@pytest.mark.parametrize(("seed", "num"), [(1, 1000), pytest.param(3, 10_000, marks=pytest.mark.endurance)])
def test_calls_in_any_order_with_any_arguments_give_error_codes(library, bundle, clips, seed, num):
    """Null, freed and swapped handles, wrong struct sizes and NaN never end the process."""
    line = library.check("random-calls", bundle.path, clips / "a.wav", seed, num)
    assert line.startswith(f"{num} calls, U2MOE_OK U2MOE_INVALID_ARGUMENT U2MOE_INVALID_HANDLE")
    assert line.count("\n") == 1  # no internal error, and no error without a message
    for kind in ("AUDIO", "STREAM", "LANGUAGE_MODEL") if num == 10_000 else ():
        assert f"U2MOE_{kind}_ERROR" in line


def test_want_of_memory_is_an_error_also_when_a_bundle_does_not_fit(library, bundle):
    if library.sanitizers:
        pytest.skip("sanitizers take terabytes of addresses")
    expected = ["U2MOE_OUT_OF_MEMORY", "U2MOE_OUT_OF_MEMORY", "U2MOE_OK"]
    assert library.check("out-of-memory", bundle.path).split() == expected
    # Each step of loading can run out of memory. The largest limit suffices; the smallest allows nothing
    first, *others, last = library.check("little-memory", DEMO_FOLDER, 0, 1, 10, 40, 80, 4000).splitlines()
    assert (first, last) == ("U2MOE_OUT_OF_MEMORY", "U2MOE_OK")
    assert set(others) <= {first, last}


VALID_JSON = [
    r'{"a": ["\ud83d\ude00 \u00e9\n", -1.5e-3, true, null, {}]}',
    r'[0, -0, -0.5, 10, 1.25E+2, 0e-7, 123456789012345678901234567890, "\u001f\u007f"]',
    '"\x7f\u2028é😀"',
]
INVALID_JSON = {
    "unpaired surrogate at byte 7": [r'"\ud83d"'],
    "unpaired surrogate": [r'"\ude00"', r'"\ud83d\u0041"'],
    "invalid escape": [r'"\u00g0"', r'"\x"', '"\\'],
    "unterminated string": ['"a'],
    "duplicate key 'a'": ['{"a": 1, "a": 2}'],
    "expected ]": ["[1, 2", "[-01]"],
    "expected a string": ['{"a": 1,}'],
    "unexpected text": ["1 2", "01", "0x10", "truely", "1\0", "1\f"],
    "expected a value": ["", "+1", "1e999", "nan", "1.", "-.5", ".5", "1.e5", "1e", "-", "[1,]", "\ufeff1"],
    "nested too deeply": ["[" * 200],
    "unescaped control character at byte 2": ['"a\nb"'],
    "unescaped control character": ['"\t"', '"\0"'],
    "invalid UTF-8 at byte 1": [b'"\xff"'],
    "invalid UTF-8": [b'"\xc3"', b'"\xed\xa0\x80"', b'"\xc0\x80"'],
}


def test_json_is_read_or_refused(library, tmp_path):
    cases = [(each, "it: read") for each in VALID_JSON]
    cases += [(each, f"it: is not valid JSON: {why}") for why, all_of in INVALID_JSON.items() for each in all_of]
    files = [tmp_path / f"{number}.json" for number in range(len(cases))]
    for file, (content, _) in zip(files, cases, strict=True):
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for line, (content, told) in zip(library.check("json", *files).split("\n")[:-1], cases, strict=True):
        assert line.startswith(told), content


def test_misuse_is_an_error_with_a_code(library, bundle, clips):
    assert library.check("misuse", bundle.path, clips / "a.wav").splitlines() == [
        "U2MOE_BUNDLE_ERROR: /none/bundle.json: missing, or cannot be read",
        "U2MOE_AUDIO_ERROR: sample rate must be between 1000 and 384000 Hz, got 1",
        "U2MOE_AUDIO_ERROR: sample rate must be between 1000 and 384000 Hz, got 2147483647",
        "U2MOE_AUDIO_ERROR: sample rate must be between 1000 and 384000 Hz, got 0",
        *["sample rate must be between 1000 and 384000 Hz, got 0"] * 2,
        "U2MOE_AUDIO_ERROR: samples contain NaN or infinity",
        "U2MOE_AUDIO_ERROR: samples are far outside [-1, 1]: divide integers by their full scale",
        "U2MOE_AUDIO_ERROR: sample rate changed from 16000 to 8000 Hz in a stream",
        "U2MOE_STREAM_ERROR: the input is finished: reset the stream, or create another",
        "U2MOE_STREAM_ERROR: the input is finished: reset the stream, or create another",
        "the same text after reset",
        "U2MOE_INVALID_ARGUMENT: beam_size must be from 1 to 1000, got -1",
        "U2MOE_INVALID_ARGUMENT: beam_size must be from 1 to 1000, got 1001",
        "U2MOE_INVALID_ARGUMENT: padding_s must be from 0 to 10, got 10.5",
        "U2MOE_INVALID_ARGUMENT: ctc_weight must be from 0 to 1000000000, got nan",
        "U2MOE_INVALID_ARGUMENT: pause must be from 0.4 to 1000000000, got 0.1",
        "U2MOE_INVALID_ARGUMENT: turn must be from 0 to 1, got 1.5",
        f"U2MOE_INVALID_ARGUMENT: search must be one of {', '.join(SEARCHES)}, got 'viterbi'",
        "U2MOE_INVALID_ARGUMENT: length_penalty must be from -10 to 10, got 11",
        "U2MOE_INVALID_ARGUMENT: min_trailing_silence must be from 0 to 1000000000, got nan",
        "U2MOE_INVALID_ARGUMENT: min_utterance_length must be from 0 to 1000000000, got inf",
        "options of an earlier version are accepted",
        "U2MOE_INVALID_ARGUMENT: hotwords are empty: omit them to use none",
        f"U2MOE_INVALID_ARGUMENT: hotword '{'A' * 200}'...: must have at most 200 characters, got 2097152",
        r"U2MOE_BUNDLE_ERROR: /none\xff\xc3/bundle.json: missing, or cannot be read",
        f"U2MOE_INVALID_ARGUMENT: num_threads must be from 1 to {max(32, 4 * os.cpu_count())} on this machine, got 0",
        "U2MOE_INVALID_ARGUMENT: kernels must be auto, native or onnxruntime, got 'fast'",
    ]


def test_providers_run_or_are_refused_by_name(library, bundle):
    """C++ and C report the same errors. No provider is replaced by another, and no option is ignored."""
    available = onnxruntime.get_available_providers()
    has = f"this onnxruntime ({onnxruntime.__version__}), which has {', '.join(available)}"
    lines = library.check("providers", bundle.path).splitlines()
    *refused, cpu, azure = zip(lines[::2], lines[1::2], strict=True)
    assert refused == [
        (message, message)
        for message in (
            *[f"U2MOE_PROVIDER_ERROR: RocketExecutionProvider is not in {has}"] * 2,
            "U2MOE_INVALID_ARGUMENT: CPUExecutionProvider takes no options, got 'use_arena'",
            "U2MOE_INVALID_ARGUMENT: name of a provider is null",
            "U2MOE_INVALID_ARGUMENT: keys of a provider is null",
        )
    ]
    running = [("CPUExecutionProvider", cpu)]
    if "AzureExecutionProvider" in available:  # named AZURE elsewhere in onnxruntime
        running.append(("AzureExecutionProvider", azure))
    for provider, (described, opened) in running:
        assert json.loads(described.removeprefix("U2MOE_OK: "))["providers"] == [provider]
        assert opened == "U2MOE_OK: open"


BAD_GRAMMARS = (
    ["[unk]"], ["a Ж"], ["a )"], ["(a | b"], ["a || b"], ["[a]"], ["a [unk]"], ["<x"], ["a > b"], ["<x>"],
    ["<x> = a", "<y>"], ["[" * 9000], ["(<b0>)", *(f"<b{n}> = (a | <b{n + 1}>)" for n in range(60)), "<b60> = a"],
    ["<x> = a <x>", "<x>"], ["<x> = a", "<x> = b"], ["<x> ="], ["[" + "a" * 30000],
)  # fmt: skip


def test_what_is_wrong_is_said(library, bundle, clips, tmp_path):
    talk, other, hotwords, grammar = (tmp_path / name for name in ("a.wav", "other.wav", "hotwords", "grammar"))
    soundfile.write(other, np.zeros(800), 8000, subtype="ALAW", format="WAV")
    grammar.write_text("# wrong\n\n[unk]", encoding="utf-8")
    for arguments, message in (
        ((bundle.path, other), "other.wav: has 1 channels of 8 bits in format 6 at 8000 Hz"),
        ((tmp_path / "none", talk), "bundle.json: missing, or cannot be read"),
        (("--fast", bundle.path), "unknown option --fast"),
        (("--rate", 8000, bundle.path, talk), "--rate is for --raw"),
        ((bundle.path, "--hotwords"), "--hotwords needs a value"),
        ((bundle.path, "-"), "is not a WAV file"),
        (("--grammar", grammar, bundle.path, talk), refusal(bundle, ["[unk]"])),
    ):
        assert message in library.problem(*arguments, input=b"RIFF")
    for content, message in (
        ("Ж", "hotword 'Ж': the vocabulary has no 'Ж'"),
        ("A :x", "hotwords line 1: weight must be a number, got 'x'"),
        ("七 :101", "hotword '七': weight must be above 0 and at most 100"),
        ("#", "hotwords are empty"),
    ):
        hotwords.write_text(content, encoding="utf-8")
        assert message in library.problem("--hotwords", hotwords, bundle.path, talk)
    for number, lines in enumerate(BAD_GRAMMARS):
        (tmp_path / str(number)).write_text("\n".join(lines), encoding="utf-8")
    files = map(tmp_path.joinpath, map(str, range(len(BAD_GRAMMARS))))
    found = library.check("bad-grammars", bundle.path / "tokens.txt", *files).splitlines()
    assert found == [refusal(bundle, lines) for lines in BAD_GRAMMARS]


def refusal(bundle, lines):
    """Return Python's error about a grammar."""
    with pytest.raises(GrammarError) as refused:
        PhraseGraph(Grammar(lines=lines), bundle.vocabulary)
    return str(refused.value)


def test_a_harmless_field_of_a_later_version_and_a_file_that_was_cut_off(library, bundle, clips, tmp_path):
    talk, cut = tmp_path / "a.wav", tmp_path / "cut.wav"
    cut.write_bytes(talk.read_bytes()[:-8000])
    done = library.run(TRANSCRIBE, bundle.path, cut)
    assert done.stdout
    assert (done.returncode, b"cut.wav: was cut off: its header states more samples" in done.stderr) == (1, True)
    with Path("/dev/full").open("wb") as full:
        assert "stdout cannot be written" in library.problem(bundle.path, talk, stdout=full)
    folder = shutil.copytree(bundle.path, tmp_path / "bundle")
    of_later_version("decoding", harmless=True)(folder)
    (warning,) = json.loads(library.printed(TRANSCRIBE, "--describe", folder))["warnings"]
    field = f"bundle.json: decoding: {manifests.LATER_FIELD} is a field that this version of u2moe does not know"
    assert field in warning
    assert warning.endswith(f"; the bundle was written by {manifests.LATER}. Without the field: {manifests.LOST}")
    assert library.segments(folder, talk) == library.segments(bundle.path, talk)


DAMAGES = [
    (flipped("ctc.onnx"), r"ctc\.onnx: sha256 is"),
    (lambda folder: (folder / "encoder.onnx").write_bytes(b"short"), r"encoder\.onnx: size is 5 bytes, expected"),
    (lambda folder: (folder / "ctc.onnx").unlink(), r"ctc\.onnx: missing"),
    (lambda folder: (folder / "bundle.json").write_text('{"format": '), r"bundle\.json: is not valid JSON: "),
    (without("model", "vocab_size"), r"bundle\.json: model: field 'vocab_size' is missing"),
    (without("files", "decoder.onnx"), r"bundle\.json: files: field 'decoder\.onnx' is missing"),
    (edited("model", blank=999), r"bundle\.json: model: blank: found 999, expected an integer from 0 to"),
    (edited("features", sample_rate="16k"), r"bundle\.json: features: sample_rate: found '16k', expected a number"),
    (edited("features", window="hann"), r"features: window: found 'hann', expected 'povey', 'hamming'"),
    (edited("features", low_hz=9000), r"bundle\.json: features: low_hz: found 9000, expected 0 or more, and less"),
    (edited("", calibration={"scale": 0}), r"bundle\.json: calibration: scale: found 0, expected a number"),
    (edited("decoding", ctc_weight="a"), r"bundle\.json: decoding: ctc_weight: found 'a', expected a number"),
    (edited("features", frame_length_ms=2, frame_shift_ms=1), r"features: num_mel_bins: found \d+, expected fewer"),
    (edited("", version=1), r"bundle\.json: version: found 1, expected 4"),
    *(
        (edited("files", **{name: {"size": 1, "sha256": ""}}), rf"found '{re.escape(name)}', expected a plain")
        for name in ("../tokens.txt", "/etc/passwd", "a\\b", "CON.txt", "com1", "a.")
    ),
    (of_later_version("model", harmless=False), rf"json: model: {manifests.LATER_FIELD} .* by {manifests.LATER}: "),
    (edited("features", frame_shift_ms=5), r"ctc\.onnx: u2moe\.frame_shift_ms is 10, which does not match"),
    (edited("model", blank=5), r"\.onnx: u2moe\.blank is \d+, which does not match bundle\.json"),
]


def test_damaged_files_and_outputs_of_unexpected_shapes_are_refused_by_name(library, bundle, exported, clips, tmp_path):
    folders, messages = [shutil.copytree(bundle.path, tmp_path / str(number)) for number in range(len(DAMAGES))], []
    for folder, (damage, message) in zip(folders, DAMAGES, strict=True):
        damage(folder)
        messages.append(message)
    static = convert_static(exported("dense_tiny"), tmp_path / "static", num_left_chunks=2).path
    for file, change, (_, message) in DAMAGED_SHAPES:
        folders.append(damaged(static, tmp_path / str(len(folders)), file, change))
        messages.append(f"{folders[-1]}/{message}")
    for graph, output, axis in SHORTER:
        folders.append(damaged(bundle.path, tmp_path / str(len(folders)), f"{graph}.onnx", shorter(output, axis)))
        messages.append(rf"{folders[-1]}/{graph}.onnx: output {output} is float32 \[.*\], expected float32 \[")
    for line, message in zip(library.check("each", clips / "a.wav", *folders).splitlines(), messages, strict=True):
        assert re.search(message, line), message


def test_a_demanded_signature(library, bundle, tmp_path):
    """Verified by OpenSSL, if the library includes it, and by a function of the program."""
    for name in ("ours", "other"):
        written_key(tmp_path, name)
    folders = [shutil.copytree(bundle.path, tmp_path / str(number)) for number in range(3)]
    for folder in folders[:2]:
        assert main(["sign", str(folder), f"--key={tmp_path / 'ours'}"]) == 0
    manifests.edit_manifest(folders[1], lambda manifest: manifest.update(producer="me"))
    key, refused = tmp_path / "ours.pub", "U2MOE_SIGNATURE_ERROR: "
    whole = ["U2MOE_OK: open"] * 2 if HAS_OPENSSL else [f"{refused}this library was built without", "U2MOE_OK: open"]
    nobody = "U2MOE_INVALID_ARGUMENT: public_keys must contain at least one key"
    other, wrong = (f"{refused}{folder}/bundle.sig: does not match this bundle.json" for folder in folders[1::-1])
    expected = [
        (folders[0], key, [*whole, wrong, nobody]),
        (folders[0], tmp_path / "other.pub", [f"{refused}{folders[0]}/bundle.sig: is signed by "] * 3),
        (folders[2], key, [f"{refused}{folders[2]}/bundle.sig: missing"] * 4),
        (folders[1], key, [other] * HAS_OPENSSL),
    ]
    for folder, demanded, starts in expected:
        for line, start in zip(library.check("signed", folder, demanded).splitlines(), starts, strict=False):
            assert line.startswith(start)
