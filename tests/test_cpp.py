"""The C++ library, its C interface and its programs: results equal to Python's, and error messages."""

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import compiled
import conformance
import manifests
import numpy as np
import onnx
import onnxruntime
import pytest
import soundfile
from compiled import CHECKS, EXAMPLES, HAS_OPENSSL, NEEDED, ONNXRUNTIME, ROOT, SIGNATURES, SOURCE
from conformance import assert_same_segments, recognized
from manifests import edited, flipped, of_later_version, without, written_key
from silero import write_vad
from static_damage import DAMAGED_SHAPES, SHORTER, damaged, shorter
from wenet_directories import write_configuration

import u2moe
from u2moe.export import convert_static
from u2moe.quantize import quantize_bundle, recipe
from u2moe.runtime import Bundle, DecodingOptions, EndpointConfig, Grammar, GrammarError, Recognizer, SessionSettings
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.cli import main
from u2moe.runtime.decoding.phrases import PhraseGraph
from u2moe.runtime.options import SEARCHES

BAD_GRAMMARS = (
    ["[unk]"], ["a Ж"], ["a )"], ["(a | b"], ["a || b"], ["[a]"], ["a [unk]"], ["<x"], ["a > b"], ["<x>"],
    ["<x> = a", "<y>"], ["[" * 9000], ["(<b0>)", *(f"<b{n}> = (a | <b{n + 1}>)" for n in range(60)), "<b60> = a"],
    ["<x> = a <x>", "<x>"], ["<x> = a", "<x> = b"], ["<x> ="], ["[" + "a" * 30000],
)  # fmt: skip
PROGRAM = ROOT / "examples" / "cpp"
VALGRIND = shutil.which("valgrind")
WITHOUT_KERNELS = [ONNXRUNTIME, "-DU2MOE_KERNELS=OFF"]
"""For builds with other compilers and tools; tests/kernels tests the kernels with them."""
pytestmark = NEEDED


def build(folder, target, *settings, source):
    compiled.cmake("-B", folder, *settings, source)
    compiled.cmake("--build", folder, "--target", target)
    return [folder / target]


@pytest.fixture(
    scope="module",
    params=["", pytest.param("address,undefined", marks=pytest.mark.endurance)],
    ids=["plain", "sanitized"],
)
def sanitizers(request):
    """Sanitizers end a program with an error after an invalid access, undefined behaviour or a leak."""
    return request.param


@pytest.fixture(scope="module")
def installed(sanitizers, tmp_path_factory):
    """Return the folder of the installed library and that of the test programs linked to it."""
    flags = f"-fsanitize={sanitizers} -fno-sanitize-recover=all -g1" if sanitizers else ""
    kernels = "ON" if sanitizers else str(compiled.built_kernels())
    settings = [f"-DU2MOE_KERNELS={kernels}", SIGNATURES]
    library = compiled.shared_library(tmp_path_factory, *settings, flags=f"-O1 {flags}".strip())
    common = ["-DCMAKE_BUILD_TYPE=None", "-DCMAKE_UNITY_BUILD=ON", ONNXRUNTIME, f"-DCMAKE_CXX_FLAGS={flags}"]
    found = [f"-DCMAKE_PREFIX_PATH={library / 'prefix'}", f"-DBUILD={library / 'library'}"]
    linked = f"-DKERNELS={'' if kernels in ('ON', 'OFF') else kernels}"
    programs = tmp_path_factory.mktemp("installed") / "programs"
    build(programs, "all", *common, *found, linked, SIGNATURES, source=CHECKS)
    return library / "prefix", programs


@pytest.fixture(scope="module")
def library(sanitizers, installed):
    """Return the shared library, for programs in other languages."""
    if sanitizers:
        pytest.skip("they are built without sanitizers")
    return installed[0] / "lib" / "libu2moe.so"


@pytest.fixture(scope="module")
def program(installed):
    return [installed[1] / "example" / "u2moe_transcribe"]


# Use after return is not checked, as in kernels/test_sanitizers.py: its stack is less aligned than vectors need.
OPTIONS = {"ASAN_OPTIONS": "detect_stack_use_after_return=0"}


def run(program, *arguments, data=None):
    command = [*program, *map(str, arguments)]
    return subprocess.run(command, input=data, capture_output=True, check=False, env={**os.environ, **OPTIONS})


@pytest.fixture(scope="module")
def check(installed):
    """Return a function that runs tests/cpp/checks.cpp with arguments and returns its output."""

    def call(*arguments):
        done = run([installed[1] / "checks"], *arguments)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.decode()

    return call


def segments(program, *arguments, data=None):
    """Return the segments that the program prints as JSON."""
    done = run(program, "--json", *arguments, data=data)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def talk(sound, tmp_path_factory):
    """Return audio so long that the third rule cuts it within speech."""
    file = tmp_path_factory.mktemp("talk") / "talk.wav"
    soundfile.write(file, np.tile(sound, 6), 16_000, subtype="PCM_16")
    return file


def assert_found_by_python(program, bundle, talk, model=None, folder=None, left_chunks=4, **options):
    """Check that the program finds several segments in `talk`, the same as Python. Return them."""
    samples, _ = soundfile.read(talk, dtype="int16")
    expected = recognized(bundle, model or bundle.load(), samples, num_left_chunks=left_chunks, **options)
    assert len(expected) > 1
    found = segments(program, "--left-chunks", left_chunks, folder or bundle.path, talk)
    assert_same_segments(found, expected)
    return found


def test_it_prints_what_python_gives_with_partial_results_and_times_and_measures_itself(program, bundle, model, talk):
    samples, _ = soundfile.read(talk, dtype="int16")
    expected = assert_found_by_python(program, bundle, talk, model)
    raw = ["--raw", "--rate", 16_000, "--left-chunks", 4, bundle.path]
    raw = segments(program, *raw, data=samples.tobytes())
    piped = segments(program, "--left-chunks", 4, bundle.path, "-", data=talk.read_bytes())
    twice = segments(program, "--left-chunks", 4, bundle.path, talk, talk)
    assert twice == expected * 2  # files do not affect each other
    assert raw == piped == [{**item, "file": "-"} for item in expected]
    for num_samples in (0, 399):
        done = run(program, "--raw", bundle.path, data=bytes(2 * num_samples))
        assert (done.returncode, done.stdout) == (0, b""), done.stderr[-2000:]
    done = run(program, bundle.path, talk)
    options = DecodingOptions(chunk_size=16, endpoint=EndpointConfig())
    found = Recognizer(bundle, model, options).transcribe(talk).segments
    assert done.stdout.decode().splitlines() == [f"{each.start:.2f} {each.end:.2f} {each.text}" for each in found]
    partial = [line for line in done.stderr.decode().splitlines() if line and "chema" not in line]
    assert len(partial) > len(found)
    assert any(partial[0][:3] in each.text for each in found)
    *_, timing = segments(program, "--timing", bundle.path, talk)
    assert set(timing) == {"file", "load_ms", "ms"}


def test_other_networks(program, other_bundle, talk):
    assert_found_by_python(program, other_bundle, talk, chunk_size=None)


@pytest.mark.parametrize("kind", conformance.COMPUTED)
def test_cases_have_the_results_of_python(check, kind):
    conformance.assert_same(kind, json.loads(check("conformance", kind, conformance.FOLDER / f"{kind}.json")))


@pytest.mark.parametrize("kind", ["recordings", "defaults"])
def test_recordings_are_recognised_as_in_python(check, tmp_path, kind):
    """Every option on the demo model, with its native kernels or, without them, on onnxruntime."""
    samples = conformance.clips()
    soundfile.write(tmp_path / "clips.wav", samples, 16_000, subtype="PCM_16")
    model = DEMO_FOLDER / "language.lm"
    file, bundle = conformance.FOLDER / f"{kind}.json", conformance.demo_with_defaults(kind, tmp_path)
    for name in ("windows", "sequences"):
        write_vad(tmp_path / f"{name}.onnx", sequence=name == "sequences")
    lines = check("recordings", bundle, file, tmp_path / "clips.wav", model, tmp_path).splitlines()
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
def test_files_of_any_rate_and_kind(program, bundle, model, sound, tmp_path, monkeypatch, kind):
    """Results equal those of Python without soxr."""
    rate, subtype, channels = kind
    samples = np.tile(sound[:, np.newaxis], (1, channels)) * np.linspace(0.5, 1, channels, dtype=np.float32)
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype=subtype)
    monkeypatch.setitem(sys.modules, "soxr", None)
    content, _ = soundfile.read(tmp_path / "a.wav", dtype="float32", always_2d=True)
    expected = recognized(bundle, model, content.mean(axis=1, dtype=np.float32), rate)
    assert expected[0].text
    assert_same_segments(segments(program, "--left-chunks", 4, bundle.path, tmp_path / "a.wav"), expected)


def test_letters_and_digests_are_those_of_python(check, tmp_path):
    """Newer versions of Unicode may add letters to the table, but not change any."""
    for line in check("letters").splitlines():
        code, upper, lower = (chr(int(item, 16)) for item in line.split())
        assert upper in (code, code.upper())
        assert lower in (code, code.lower())
    header = (SOURCE / "source" / "letter_case.hpp").read_text(encoding="utf-8")
    done = subprocess.run([sys.executable, CHECKS / "make_letter_case.py"], capture_output=True, text=True, check=True)
    version = header.split("Unicode ")[1].split(")")[0]
    assert done.stdout == header or f"Unicode {version})" not in done.stdout
    # At lengths around block boundaries, with and without SHA-256 instructions of the processor
    content = np.random.default_rng(32).bytes(200)
    (tmp_path / "content").write_bytes(content)
    expected = [hashlib.sha256(content[:num]).hexdigest() for num in range(201)]
    assert check("digests", tmp_path / "content").splitlines() == [f"{each} {each}" for each in expected]


def test_threads_share_a_recognizer_and_long_audio_takes_no_more_memory(check, bundle, model, talk):
    expected = recognized(bundle, model, soundfile.read(talk, dtype="float32")[0])
    assert check("threads", bundle.path, talk).splitlines() == ["".join(f"{each.text}|" for each in expected)] * 4
    # Otherwise each window would move all later samples, in time that grows with the square of their number
    found, bytes_in_one_piece, all_bytes = re.fullmatch(
        r"(.*), (\d+) of (\d+)\n", check("at-once", bundle.path, talk)
    ).groups()
    assert found == "the same"
    assert int(bytes_in_one_piece) < 1_000_000 < int(all_bytes) // 3  # the model runs at a third of the rate


@pytest.mark.endurance
@pytest.mark.skipif(shutil.which("clang++") is None, reason="needs clang: apt-get install clang")
def test_clang_compiles_it_without_a_warning_and_computes_the_same(program, bundle, talk, tmp_path):
    by_clang = build(tmp_path, "u2moe_transcribe", "-DCMAKE_CXX_COMPILER=clang++", *WITHOUT_KERNELS, source=PROGRAM)
    found, expected = (segments(each, bundle.path, talk) for each in (by_clang, program))
    assert found == expected != []


def test_the_shared_library_shows_the_c_interface_and_nothing_else(installed):
    library = installed[0] / "lib" / "libu2moe.so"
    listed = (SOURCE / "u2moe.symbols").read_text(encoding="utf-8").split()
    header = (SOURCE / "include" / "u2moe.h").read_text(encoding="utf-8")
    assert listed == sorted(re.findall(r"^U2MOE_API [\w *]*?\b(u2moe_\w+)\(", header, re.MULTILINE))
    done = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
    assert {line.split()[-1] for line in done.stdout.splitlines() if line.split()[1] not in "Aw"} == set(listed)
    assert library.resolve().name == f"libu2moe.so.{u2moe.__version__}"
    assert library.with_name(f"libu2moe.so.{u2moe.__version__.rpartition('.')[0]}").is_file()


def built_program(language, library, folder, environment):
    """Return the command of an example in another language. Skips the test if the toolchain is missing."""
    packages = folder / "packages"  # built outside the repository
    if language in ("Rust", "Go"):
        shutil.copytree(EXAMPLES, packages)
    java = ["java", "--enable-native-access=ALL-UNNAMED", EXAMPLES / "Transcribe.java", library]
    compile_c = f"cc -std=c99 -pedantic -Wall -Wextra -Werror {EXAMPLES / 'transcribe.c'} -o {folder / 'a'}"
    # a transcriber of the crate may be dropped by its own callback
    rust = "cargo build --offline --example transcribe && cargo test --offline --test dropped"
    tools, build, command = {
        "C": (["pkg-config"], ["sh", "-c", f"{compile_c} $(pkg-config --cflags --libs u2moe)"], [folder / "a"]),
        "Python": ([], ["true"], [sys.executable, EXAMPLES / "transcribe.py", library]),
        "C#": (
            ["mcs", "mono"], ["mcs", "-warnaserror", f"-out:{folder}/a.exe", *(EXAMPLES / "dotnet").glob("*.cs")],
            ["mono", folder / "a.exe"],
        ),
        "Rust": (
            ["cargo"], ["sh", "-c", f"cd {packages / 'rust'} && {rust}"],
            [packages / "rust" / "target" / "debug" / "examples" / "transcribe"],
        ),
        "Go": (
            ["go", "pkg-config"], ["go", "build", "-C", packages / "go", "-o", folder / "a", "./transcribe"],
            [folder / "a"],
        ),
        "Java": (["javac"], ["javac", "--release", "22", "-d", folder, EXAMPLES / "Transcribe.java"], java),
    }[language]  # fmt: skip
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    done = subprocess.run(build, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if language == "Java" and "release" in done.stderr:
        pytest.skip("needs Java 22 or newer, whose foreign functions are final")
    assert done.returncode == 0, done.stdout + done.stderr
    assert language != "Rust" or "1 passed" in done.stdout
    return command


@pytest.mark.parametrize(
    "language",
    ["C", "Python", "C#", "Rust", *(pytest.param(name, marks=pytest.mark.endurance) for name in ("Go", "Java"))],
)
def test_other_languages_call_it(library, bundle, model, talk, tmp_path, monkeypatch, language):
    samples, rate = soundfile.read(talk, dtype="int16")
    samples.tofile(tmp_path / "talk.raw")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library.parent))
    found = {"PKG_CONFIG_PATH": str(library.parent / "pkgconfig"), "GOCACHE": str(tmp_path / "go")}
    given = {"BUNDLE": str(bundle.path), "SAMPLES": str(tmp_path / "talk.raw")}
    flags = {"CGO_LDFLAGS_ALLOW": ".*", "RUSTFLAGS": "-Dwarnings"}
    command = built_program(language, library, tmp_path, {**os.environ, **found, **given, **flags})
    done = run(command, bundle.path, rate, data=samples.tobytes())
    assert done.returncode == 0, done.stderr
    expected = recognized(bundle, model, samples, num_left_chunks=-1)
    found = [line for line in done.stdout.decode().splitlines() if not line.startswith("  ")]  # C also prints words
    assert found == [f"{each.start:.2f} {each.end:.2f} {each.text}" for each in expected]
    assert b"/none/bundle.json: missing" in run(command, "/none", rate, data=bytes(2)).stderr


def test_the_sketch_for_kotlin_compiles():
    include = Path(shutil.which("javac") or "/none").resolve().parents[1] / "include"
    if not (include / "jni.h").is_file():
        pytest.skip("needs a JDK with its headers")
    folders = [SOURCE / "include", include, include / "linux"]
    command = ["cc", "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", EXAMPLES / "jni.c"]
    subprocess.run([*command, *(f"-I{folder}" for folder in folders)], check=True)


@pytest.mark.parametrize(("seed", "num"), [(1, 1000), pytest.param(3, 10_000, marks=pytest.mark.endurance)])
def test_calls_in_any_order_with_any_arguments_give_error_codes(check, bundle, talk, seed, num):
    """Null, freed and swapped handles, wrong struct sizes and NaN never end the process."""
    line = check("random-calls", bundle.path, talk, seed, num)
    assert line.startswith(f"{num} calls, U2MOE_OK U2MOE_INVALID_ARGUMENT U2MOE_INVALID_HANDLE")
    assert line.count("\n") == 1  # no internal error, and no error without a message
    for kind in ("AUDIO", "STREAM", "LANGUAGE_MODEL") if num == 10_000 else ():
        assert f"U2MOE_{kind}_ERROR" in line


def test_grammars_are_kept_and_a_stream_is_for_one_thread_at_a_time(check, bundle, talk):
    """The fifth replaces the one used the longest ago. Each finds the phrase of its letter."""
    assert check("grammars", "abcdaeba") == "0:1 1:1 2:1 3:1 0:1 4:1 5:1 0:1 "
    assert check("two-threads", bundle.path, talk) == "this stream is being decoded by another thread\n"


def test_want_of_memory_is_an_error_also_when_a_bundle_does_not_fit(sanitizers, check, bundle):
    if sanitizers:
        pytest.skip("sanitizers take terabytes of addresses")
    expected = ["U2MOE_OUT_OF_MEMORY", "U2MOE_OUT_OF_MEMORY", "U2MOE_OK"]
    assert check("out-of-memory", bundle.path).split() == expected
    # Each step of loading can run out of memory. The largest limit suffices; the smallest allows nothing
    first, *others, last = check("little-memory", DEMO_FOLDER, 0, 1, 10, 40, 80, 4000).splitlines()
    assert (first, last) == ("U2MOE_OUT_OF_MEMORY", "U2MOE_OK")
    assert set(others) <= {first, last}


def test_numbers_have_a_point_in_any_locale(check, bundle, model, talk, tmp_path, monkeypatch):
    """Also in GUI programs, which set the user's locale."""
    command = ["localedef", "-i", "de_DE", "-f", "UTF-8", tmp_path / "de_DE.UTF-8"]
    if shutil.which("localedef") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the sources of locales: apt-get install locales")
    monkeypatch.setenv("LOCPATH", str(tmp_path))
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    (tmp_path / "hotwords.txt").write_text("a :2.5\n", encoding="utf-8")
    assert check("hotwords", tmp_path / "hotwords.txt") == "a 2,5\n"
    expected = recognized(bundle, model, soundfile.read(talk, dtype="float32")[0])
    assert check("threads", bundle.path, talk).startswith("".join(f"{each.text}|" for each in expected))


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


def test_json_is_read_or_refused(check, tmp_path):
    cases = [(each, "it: read") for each in VALID_JSON]
    cases += [(each, f"it: is not valid JSON: {why}") for why, all_of in INVALID_JSON.items() for each in all_of]
    files = [tmp_path / f"{number}.json" for number in range(len(cases))]
    for file, (content, _) in zip(files, cases, strict=True):
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for line, (content, told) in zip(check("json", *files).split("\n")[:-1], cases, strict=True):
        assert line.startswith(told), content


def test_misuse_is_an_error_with_a_code(check, bundle, talk):
    assert check("misuse", bundle.path, talk).splitlines() == [
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
        "U2MOE_INVALID_ARGUMENT: endpoint rules need silence or a length above 0 seconds",
        "options of an earlier version are accepted",
        "U2MOE_INVALID_ARGUMENT: hotwords are empty: omit them to use none",
        f"U2MOE_INVALID_ARGUMENT: hotword '{'A' * 200}'...: must have at most 200 characters, got 2097152",
        r"U2MOE_BUNDLE_ERROR: /none\xff\xc3/bundle.json: missing, or cannot be read",
        f"U2MOE_INVALID_ARGUMENT: num_threads must be from 1 to {max(32, 4 * os.cpu_count())} on this machine, got 0",
        "U2MOE_INVALID_ARGUMENT: kernels must be auto, native or onnxruntime, got 'fast'",
    ]


def test_providers_run_or_are_refused_by_name(check, bundle):
    """C++ and C report the same errors. No provider is replaced by another, and no option is ignored."""
    available = onnxruntime.get_available_providers()
    has = f"this onnxruntime ({onnxruntime.__version__}), which has {', '.join(available)}"
    lines = check("providers", bundle.path).splitlines()
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


def problem(program, *arguments, data=None):
    """Return the last line of an error message."""
    done = run(program, *arguments, data=data)
    assert done.returncode in (1, 2), done.stderr[-2000:]
    return [line for line in done.stderr.decode().splitlines() if line.startswith("u2moe_transcribe: ")][-1]


def test_what_is_wrong_is_said(program, bundle, talk, tmp_path):
    other, hotwords, grammar = (tmp_path / name for name in ("other.wav", "hotwords.txt", "grammar.txt"))
    soundfile.write(other, np.zeros(800), 8000, subtype="ALAW")
    for arguments, message in (
        ((bundle.path, other), "other.wav: has 1 channels of 8 bits in format 6 at 8000 Hz"),
        ((tmp_path / "none", talk), "bundle.json: missing, or cannot be read"),
        (("--fast", bundle.path), "unknown option --fast"),
        (("--rate", 8000, bundle.path, talk), "--rate is for --raw"),
        ((bundle.path, "--hotwords"), "--hotwords needs a value"),
        ((bundle.path, "-"), "is not a WAV file"),
    ):
        assert message in problem(program, *arguments, data=b"RIFF")
    for content, message in (
        ("Ж", "hotword 'Ж': the vocabulary has no 'Ж'"),
        ("A :x", "hotwords line 1: weight must be a number, got 'x'"),
        ("七 :101", "hotword '七': weight must be above 0 and at most 100"),
        ("#", "hotwords are empty"),
    ):
        hotwords.write_text(content, encoding="utf-8")
        assert message in problem(program, "--hotwords", hotwords, bundle.path, talk)
    for lines in BAD_GRAMMARS:
        with pytest.raises(GrammarError) as expected:
            PhraseGraph(Grammar(lines=lines), bundle.vocabulary)
        grammar.write_text("\n".join(["# wrong", "", *lines]), encoding="utf-8")
        assert str(expected.value) in problem(program, "--grammar", grammar, bundle.path, talk), lines


def test_a_harmless_field_of_a_later_version_and_a_file_that_was_cut_off(program, bundle, talk, tmp_path):
    (tmp_path / "cut.wav").write_bytes(talk.read_bytes()[:-8000])
    done = run(program, bundle.path, tmp_path / "cut.wav")
    assert done.stdout
    assert (done.returncode, b"cut.wav: was cut off: its header states more samples" in done.stderr) == (1, True)
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([*program, str(bundle.path), str(talk)], stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, b"stdout cannot be written" in done.stderr) == (1, True)
    shutil.copytree(bundle.path, tmp_path / "bundle")
    of_later_version("decoding", harmless=True)(tmp_path / "bundle")
    (warning,) = json.loads(run(program, "--describe", tmp_path / "bundle").stdout)["warnings"]
    field = f"bundle.json: decoding: {manifests.LATER_FIELD} is a field that this version of u2moe does not know"
    assert field in warning
    assert warning.endswith(f"; the bundle was written by {manifests.LATER}. Without the field: {manifests.LOST}")
    found, expected = (segments(program, each, talk) for each in (tmp_path / "bundle", bundle.path))
    assert found == expected


@pytest.mark.parametrize(
    ("damage", "message"),
    [
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
    ],
)
def test_damaged_bundles_are_refused_by_name(program, bundle, talk, tmp_path, damage, message):
    shutil.copytree(bundle.path, tmp_path / "bundle")
    damage(tmp_path / "bundle")
    assert re.search(message, problem(program, tmp_path / "bundle", talk))


def test_a_bundle_in_memory_is_that_of_its_folder(check, bundle, static, talk, tmp_path):
    """The bundle in memory uses session options of the caller, in a bundle of fixed shape only for static.onnx."""
    form = json.loads((static("moe_tiny") / "static.json").read_text())
    decoder = {"hyps", "hyps_lens", "encoder_out", "encoder_lens"}
    for folder, inputs in ((bundle.path, decoder), (static("moe_tiny"), {each["name"] for each in form["inputs"]})):
        first, second = check("memory", folder, talk, tmp_path / "last.onnx").splitlines()
        assert first == second
        assert first.count("|") > 1
        assert {each.name for each in onnx.load(tmp_path / "last.onnx").graph.input} == inputs


def test_native_kernels_run_packed_bundles_and_all_that_they_do_not_refuse(program, bundle, quantized, talk, tmp_path):
    """As in Python, with equal results: onnxruntime runs only the refused function."""
    pytest.importorskip("u2moe_kernels", reason="u2moe-kernels is not installed", exc_type=ImportError)
    packed, _ = quantize_bundle(bundle.path, tmp_path / "packed", recipe("int8", packed=True))
    later = manifests.with_activation(quantized("int8"), "cube", tmp_path / "later")
    for each, kernels, message in (
        (packed, "onnxruntime", "weights are packed for native kernels, but onnxruntime runs the graph: as requested"),
        (later, "native", "encoder.onnx: native kernels cannot run it (onnxruntime's own kernels can): "),
    ):
        model = each.load(SessionSettings())
        assert_found_by_python(program, each, talk, model)
        described = json.loads(run(program, "--describe", each.path).stdout)
        refused = [f"{name}: {reason}" for name, reason in model.kernels.refused.items()]
        assert (described["native_kernels"], described["reason"], described["refused"]) == (True, "", refused)
        assert all(each.startswith("Int8MixtureOfExperts of encoder: attribute activation must") for each in refused)
        assert len(refused) == (each is later)
        assert message in problem(program, "--kernels", kernels, each.path, talk)


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
    "name", ["moe_tiny", "dense_tiny", "efficient_conformer_stream_three_rates", "stack_n_frames_whisper_positions"]
)
def test_graphs_of_fixed_shape(program, static, talk, name):
    """With all frame rates, positions and caches, utterances that end within a chunk, and a short last chunk."""
    bundle = Bundle.open(static(name))
    size = bundle.manifest.model.static.chunk_size
    assert_found_by_python(program, bundle, talk, left_chunks=2, chunk_size=size)
    refused = problem(program, "--left-chunks", 3, bundle.path, talk)
    assert f"this bundle supports only chunk_size {size} and num_left_chunks 2, got" in refused


def test_a_runner_of_the_program(check, program, static, bundle, talk, tmp_path):
    """It replaces static.onnx, which may be missing. Errors name the output."""
    source = static("moe_tiny")
    folder = shutil.copytree(source, tmp_path / "static", ignore=shutil.ignore_patterns("static.onnx"))
    expected = segments(program, "--left-chunks", 2, source, talk)
    text, *errors = check("runner", folder, source / "static.onnx", talk, bundle.path).splitlines()
    assert text == "".join(f"{each['text']}|" for each in expected) != ""
    shape = json.loads((source / "static.json").read_text())["outputs"][-1]["shape"]
    assert errors == [
        f"U2MOE_PROVIDER_ERROR: static: output r_cnn_cache: found NaN or infinity, expected float32 {shape}",
        "U2MOE_PROVIDER_ERROR: static: the runner returned 7, expected 0",
        f"U2MOE_INVALID_ARGUMENT: runner needs a bundle of fixed shape, which {bundle.path}/bundle.json is not",
    ]


@pytest.mark.parametrize(("file", "change", "told"), DAMAGED_SHAPES)
def test_damaged_graphs_of_fixed_shape_are_refused_by_name(program, static, talk, tmp_path, file, change, told):
    folder = damaged(static("moe_tiny"), tmp_path / "damaged", file, change)
    assert re.search(rf"damaged/{told[1]}", problem(program, folder, talk))


@pytest.mark.parametrize(("graph", "output", "axis"), SHORTER)
def test_outputs_of_unexpected_shapes_are_refused_by_name(program, bundle, talk, tmp_path, graph, output, axis):
    folder = damaged(bundle.path, tmp_path / "damaged", f"{graph}.onnx", shorter(output, axis))
    told = problem(program, folder, talk)
    assert re.search(rf"damaged/{graph}.onnx: output {output} is float32 \[.*\], expected float32 \[", told)


def test_files_in_ort_format(program, bundle, model, ort_bundle, talk):
    assert not list(ort_bundle.glob("*.onnx"))
    assert_found_by_python(program, bundle, talk, model, folder=ort_bundle)


@pytest.mark.endurance
@pytest.mark.skipif(VALGRIND is None, reason="needs valgrind: apt-get install valgrind")
def test_valgrind_finds_nothing(bundle, sound, tmp_path):
    """In the program as users build it. Valgrind also finds uninitialised values, which sanitizers miss."""
    soundfile.write(tmp_path / "a.wav", sound[:12_000], 8000, subtype="PCM_16")
    (tmp_path / "hotwords.txt").write_text(f"{bundle.tokens[5]}{bundle.tokens[6]}\n", encoding="utf-8")
    options = ["-q", "--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=definite,possible"]
    program = build(tmp_path / "build", "u2moe_transcribe", *WITHOUT_KERNELS, source=PROGRAM)
    arguments = ["--hotwords", tmp_path / "hotwords.txt", bundle.path, tmp_path / "a.wav"]
    done = run([VALGRIND, *options, *program], *arguments)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_demanded_signature(check, bundle, tmp_path):
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
        for line, start in zip(check("signed", folder, demanded).splitlines(), starts, strict=False):
            assert line.startswith(start)
