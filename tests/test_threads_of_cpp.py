"""Separate feeding and decoding in C and C++: batches, transcribers, cancelling, races, leaks, ABI stability."""

import json
import re
import runpy
import shutil
import subprocess

import numpy as np
import onnx
import onnx.parser
import pytest
import soundfile
from compiled import CHECKS, NEEDED, THREADS, VALGRIND, Library, sanitized
from manifests import flipped
from silero import VAD, WINDOWS, write_vad

from u2moe.runtime.audio.files import find_audio
from u2moe.runtime.bundle_location import DEMO_FOLDER

pytestmark = NEEDED
CANCELLED = "U2MOE_CANCELLED: this stream was cancelled: reset it, or create another"
FINISHED = "U2MOE_STREAM_ERROR: the input is finished: reset the stream, or create another"


@pytest.fixture(scope="module", params=sanitized(THREADS), ids=["plain", "sanitized"])
def library(request, tmp_path_factory):
    return Library(tmp_path_factory, request.param)


@pytest.fixture(scope="module")
def plain(library):
    if library.sanitizers:
        pytest.skip("needs no sanitizer")
    return library


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Return the demo's clips as raw samples."""
    file = tmp_path_factory.mktemp("clips") / "clips.raw"
    read = [soundfile.read(clip, dtype="int16")[0] for clip in find_audio([DEMO_FOLDER / "clips"])]
    np.concatenate(read).tofile(file)
    return file


def test_streams_in_batches_threads_and_callbacks_have_the_results_that_they_have_alone(library, clips):
    """Exactly equal for several chunk sizes and lengths. One stream is cancelled; the others continue."""
    lines = library.printed("threads", "batch", DEMO_FOLDER, clips).splitlines()
    assert lines == ["U2MOE_OK", CANCELLED, CANCELLED, CANCELLED, *["the same"] * 8]
    assert library.printed("threads", "apart", DEMO_FOLDER, clips) == "the same\n"
    lines = library.printed("threads", "cancel", DEMO_FOLDER, clips).splitlines()
    waiting = "0.40 s of audio is waiting to be recognised: 0.10 s more would exceed the limit of 0.5 s"
    changed = "U2MOE_AUDIO_ERROR: sample rate changed from 16000 to 8000 Hz in a stream"
    assert lines == [CANCELLED, CANCELLED, "1 0", "the same", f"U2MOE_QUEUE_FULL: {waiting}", "0.4", changed, FINISHED]
    with clips.open("rb") as samples:
        done = library.run("captions", DEMO_FOLDER, 16000, 2.5, stdin=samples)
    *partial, last = done.stderr.decode().splitlines()
    assert (last, done.stdout) == ("U2MOE_CANCELLED, 0 buffers lost", b"")
    assert len(partial) > 1
    assert len(partial[-1]) > len(partial[0])


def test_transcribers_call_back_in_their_threads(library, clips, tmp_path):
    network = write_vad(tmp_path / "vad.onnx")
    lines = library.printed("threads", "transcribe", DEMO_FOLDER, clips, network).splitlines()
    over = "U2MOE_STREAM_ERROR: the input is finished: reset the stream, or create another"
    assert lines[:5] == ["1 1", CANCELLED, over, "the same", "U2MOE_INTERNAL_ERROR: a fault of the program"]
    assert lines[5:-1] == ["speech 1", "silence 1"] * (len(lines[5:-1]) // 2) != []
    assert lines[-1] == "0"  # a partial result arrived


def test_tokens_digests_and_messages(library, clips, tmp_path):
    """The callback receives messages that onnxruntime would write to stderr."""
    shutil.copytree(DEMO_FOLDER, tmp_path / "damaged")
    flipped("ctc.onnx")(tmp_path / "damaged")
    failing = onnx.parser.parse_model(VAD.format(**WINDOWS).replace("column = {-1, 1}", "column = {7, 1}"))
    onnx.save(failing, tmp_path / "vad.onnx")
    done = library.run("threads", "look", DEMO_FOLDER, clips, tmp_path / "damaged", tmp_path / "vad.onnx")
    token, refused, good, damaged, vad, endpoint, *messages = done.stdout.decode().splitlines()
    symbols = (DEMO_FOLDER / "tokens.txt").read_text(encoding="utf-8").splitlines()
    assert token == next(line for line in symbols if line.endswith(" 1")).rpartition(" ")[0]
    assert refused == f"U2MOE_INVALID_ARGUMENT: token must be from 0 to {len(symbols) - 1}, got -1"
    assert (good, endpoint) == ("U2MOE_OK", "0")
    assert re.match(rf"U2MOE_INTEGRITY_ERROR: {tmp_path}/damaged/ctc\.onnx: sha256 is", damaged)
    assert re.match(r"U2MOE_BUNDLE_ERROR: .*vad.onnx: is not silero VAD 5 or 6", vad)
    assert messages[0].startswith('1 u2moe loaded: {"version"')
    assert any(each.startswith("3 onnxruntime ") and "Reshape" in each for each in messages)
    assert done.stderr == b""


@pytest.mark.endurance
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind: apt-get install valgrind")
def test_valgrind_finds_nothing_in_it(plain, clips):
    with clips.open("rb") as samples:
        plain.printed("captions", DEMO_FOLDER, 16000, 2, wrapper=VALGRIND, stdin=samples)


# ---- ABI stability ----

FIRST = CHECKS / "first"
"""Folder with the header of the first version and a program for it."""


def output(library, folder, include, source, *arguments):
    """Compile a C program with a header, and return its lines with this library."""
    lib = library.prefix / "lib"
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", f"-I{include}", f"-L{lib}", f"-Wl,-rpath,{lib}"]
    subprocess.run(["cc", *flags, source, "-lu2moe", "-lpthread", "-o", folder / "program"], check=True)
    return library.printed(folder / "program", *arguments).splitlines()


def test_a_program_for_the_first_header_runs_with_this_library(plain, clips, tmp_path):
    lines = output(plain, tmp_path, FIRST, FIRST / "program.c", DEMO_FOLDER, clips)
    assert lines[0].startswith("U2MOE_OK ")
    assert lines[1] == "1 1 1"  # the library wrote nothing beyond the structs that the program knows


def test_a_program_for_a_later_header_is_told_so(plain, tmp_path):
    header = (plain.prefix / "include" / "u2moe.h").read_text(encoding="utf-8")
    for name in ("u2moe_stream_options", "u2moe_result_view"):
        header = header.replace(f"}} {name};", f"double of_a_later_version; }} {name};")
    (tmp_path / "u2moe.h").write_text(header, encoding="utf-8")
    (line,) = output(plain, tmp_path, tmp_path, FIRST / "later.c")
    version = re.search(r'U2MOE_VERSION "(.*)"', header)[1]
    assert re.fullmatch(
        r"U2MOE_INVALID_ARGUMENT: u2moe_stream_options: size is \d+, expected \d+: call its init function, and compile "
        rf"with the u2moe\.h of this library \({version}\)",
        line,
    )


def test_structs_and_symbols_only_grow(plain, tmp_path):
    """Released members and codes never move. A new version only adds lines to the list."""
    layouts = runpy.run_path(str(CHECKS / "layouts.py"))["layouts"]
    found, first = layouts(plain.prefix / "include", tmp_path), layouts(FIRST, tmp_path)
    listed = json.loads((CHECKS / "layouts.json").read_text(encoding="utf-8"))
    assert found == listed, f"python {CHECKS / 'layouts.py'} writes the list; it may only grow"
    assert set(first) <= set(found)
    for name, fields in first.items():
        assert fields.items() <= found[name].items() or name == "sizes", name
    assert all(first["sizes"][name] <= found["sizes"][name] for name in first["sizes"])
    unsized = [name for name in first["sizes"] if first[name].get("size") != 0]
    assert [found["sizes"][name] for name in unsized] == [first["sizes"][name] for name in unsized]
