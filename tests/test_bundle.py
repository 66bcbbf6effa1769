import dataclasses
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from manifests import LATER, LATER_FIELD, LOST, edit_manifest, edited, of_later_version, without
from tones import MANIFEST, SYMBOLS

from u2moe.runtime.bundle import files
from u2moe.runtime.bundle.manifest import DecodingConfig
from u2moe.runtime.bundle.manifest_file import format_manifest, parse_manifest
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_writer import BundleWriter
from u2moe.runtime.declarations import option
from u2moe.runtime.errors import BundleError, BundleWarning, IntegrityError

CONTENT = {
    "tokens.txt": "".join(f"{symbol} {number}\n" for number, symbol in enumerate(SYMBOLS)),
    "encoder.onnx": b"encoder", "ctc.onnx": b"ctc",
}  # fmt: skip


def write(target, *, overwrite=False, manifest=MANIFEST, content=CONTENT):
    with BundleWriter(target, overwrite=overwrite) as staging:
        for name, data in content.items():
            staging.add(name, data)
        return staging.finish(manifest)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "bundle").path


def test_bundles_can_be_opened_when_written_and_before(folder, tmp_path):
    bundle = Bundle.open(folder)
    assert bundle.path == folder
    assert bundle.tokens == SYMBOLS
    assert dataclasses.replace(bundle.manifest, files={}) == MANIFEST
    assert sorted(bundle.manifest.files) == sorted(CONTENT)
    assert sorted(file.name for file in folder.iterdir()) == sorted([*CONTENT, "bundle.json"])
    with BundleWriter(tmp_path / "out") as staging:
        for name, data in CONTENT.items():
            staging.add(name, data)
        assert staging.seal(MANIFEST).tokens == SYMBOLS
        assert not (tmp_path / "out").exists()
        finished = staging.finish(MANIFEST)
    assert Bundle.open(tmp_path / "out").manifest == finished.manifest


def test_failure_and_what_is_incomplete_leave_nothing(tmp_path):
    with pytest.raises(RuntimeError), BundleWriter(tmp_path / "out") as staging:  # noqa: PT012 - the block is the test
        staging.add("tokens.txt", "x 0\n")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BundleError, match=r"'ctc\.onnx' is not listed"):
        write(tmp_path / "out", content={name: CONTENT[name] for name in ("tokens.txt", "encoder.onnx")})
    assert list(tmp_path.iterdir()) == []


def test_only_bundles_are_overwritten_and_kept_if_that_fails(tmp_path, folder):
    with pytest.raises(BundleError, match="not empty"):
        write(folder)
    changed = write(folder, overwrite=True, content={**CONTENT, "ctc.onnx": b"other"})
    assert (changed.path / "ctc.onnx").read_bytes() == b"other"
    assert [file.name for file in tmp_path.iterdir()] == ["bundle"]
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    (tmp_path / "link").symlink_to(folder)
    write(tmp_path / "link", overwrite=True)
    assert not (tmp_path / "link").is_symlink()
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(BundleError, match="only a folder of the same kind can be overwritten"):
        write(tmp_path, overwrite=True)
    assert (tmp_path / "precious.txt").read_text() == "mine"
    with pytest.raises(BundleError):
        write(folder, overwrite=True, content={"tokens.txt": "broken"})
    assert Bundle.open(folder).manifest.producer == "test"


def test_damaged_files_and_no_bundle(folder, tmp_path):
    (folder / "encoder.onnx").write_bytes(b"Encoder")
    with pytest.raises(IntegrityError, match=r"encoder\.onnx: sha256 is .* expected"):
        Bundle.open(folder)
    assert Bundle.open(folder, verify=False).tokens == SYMBOLS
    (folder / "encoder.onnx").write_bytes(b"longer than before")
    with pytest.raises(IntegrityError, match="size is 18 bytes, expected 7"):
        Bundle.open(folder, verify=False)
    (folder / "encoder.onnx").unlink()
    missing = {folder: r"encoder\.onnx: missing", tmp_path: r"bundle\.json: missing", tmp_path / "x": "no such folder"}
    for path, message in missing.items():
        with pytest.raises(BundleError, match=message):
            Bundle.open(path)


def test_a_large_file_has_digests_of_its_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 3)
    folder = write(tmp_path / "bundle").path
    found = {name: len(digest.blocks) for name, digest in Bundle.open(folder).manifest.files.items()}
    assert found == {"ctc.onnx": 0, "encoder.onnx": 3, "tokens.txt": 17}
    (folder / "encoder.onnx").write_bytes(b"encOder")
    with pytest.raises(IntegrityError, match=r"encoder\.onnx: sha256 of block 1 is .* expected"):
        Bundle.open(folder)
    edit_manifest(folder, lambda content: content["files"]["encoder.onnx"]["blocks"].pop())
    with pytest.raises(BundleError, match=r"encoder\.onnx: blocks must be 3 digests for 7 bytes, got 2"):
        Bundle.open(folder)
    edit_manifest(folder, lambda content: content["files"]["encoder.onnx"].update(size=10**30))
    with pytest.raises(BundleError, match=r"encoder\.onnx: blocks must be .* for 10{30} bytes, got 2"):
        Bundle.open(folder)


@pytest.mark.parametrize("name", ["../a", "/etc/a", "a/b", "..", "", "a\\b", "C:x", "a\x00b", "a.", "a ", "nul.onnx"])
def test_names_that_leave_the_folder(folder, name):
    edit_manifest(folder, lambda content: content["files"].update({name: {"sha256": "0" * 64, "size": 1}}))
    with pytest.raises(BundleError, match="plain file name"):
        Bundle.open(folder)
    with pytest.raises(BundleError, match="plain file name"), BundleWriter(folder.parent / "new") as staging:
        staging.add(name, b"")


def test_links_that_leave_the_folder(tmp_path, folder):
    (folder / "ctc.onnx").rename(tmp_path / "ctc.onnx")
    (folder / "ctc.onnx").symlink_to(tmp_path / "ctc.onnx")
    with pytest.raises(BundleError, match="is a link to"):
        Bundle.open(folder)
    (folder / "ctc.onnx").unlink()
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "ctc.onnx")
        with pytest.raises(BundleError, match="not a regular file"):
            Bundle.open(folder)


def test_manifests_with_and_without_defaults_have_the_same_fingerprint():
    text = (Path(__file__).parent / "golden" / "bundle_of_version_4.json").read_text(encoding="utf-8")
    manifest = parse_manifest(text, Path("bundle.json"))
    assert (manifest.decoding.beam_size, manifest.decoding.padding_s, manifest.model.max_position) == (40, 0.18, 5000)
    written = format_manifest(manifest)
    content = json.loads(written)
    assert (content["version"], content["features"]) == (4, {})
    assert content["decoding"].keys() == {"beam_size", "padding_s", "language_model"}
    assert parse_manifest(written, Path("bundle.json")) == manifest
    assert hashlib.sha256(written.encode()).hexdigest()[:16] == "807a3726e103d233"


@pytest.mark.parametrize(("change", "message"), [
    (edited("", format="other"), "format must be 'u2moe-bundle', got 'other'"),
    *((edited("", version=found), f"the u2moe that wrote the bundle, or export it again), got {found}")
      for found in (5, 2, True, None)),
    (without("model", "blank"), "model.blank is missing"),
    (edited("model", blank="0"), "model.blank must be an integer, got '0'"),
    (edited("model", blank=True), "model.blank must be an integer, got True"),
    (edited("model", blank=99), "blank must be a token id below 6, got 99"),
    (edited("model", right_context=-1), "right_context must be at least 0, got -1"),
    (edited("model", feature_size=40), "feature_size of the model must be the size of the features (80), got 40"),
    (edited("features", frame_shift_ms=0), "frame_shift_ms must be a number between 1 and 1000, got 0"),
    (edited("decoding", reverse_weight=2), "decoding: reverse_weight must be a number between 0 and 1, got 2"),
    (edited("decoding", ctc_weight=10**400), "decoding.ctc_weight must be a number, got 1000"),
    (edited("decoding", ctc_weight=10**5000), "bundle.json: is not valid JSON: Exceeds the limit"),
    (edited("model", decoder="lstm"), "model.decoder must be one of bitransformer, transformer, none, got 'lstm'"),
    (edited("", model=None), "model must be an object, got None"),
    (edited("", files=[]), "files must be an object, got []"),
    (edited("", quantization={"groups": {"experts": "int4"}}), "int4_version of the quantization must be 2"),
    (edited("files", **{"ctc.onnx": {"sha256": "0"}}), "files.ctc.onnx.size is missing"),
    (without("files", "tokens.txt"), "'tokens.txt' is not listed"),
    (edited("model", vocab_size=7), "found 6 symbols, expected vocab_size 7"),
    *((lambda folder, text=text: (folder / "bundle.json").write_bytes(text), "bundle.json: ")
      for text in (b"", b"{", b"[" * 100_000, b"null", b"[]", b'{"format": NaN}', b'{"a": 1, "a": 2}', b"\xff")),
])  # fmt: skip
def test_manifests_that_are_refused(folder, change, message):
    change(folder)
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaterConfig(DecodingConfig):
    """A configuration of a later version."""

    pace: float = option("number", 1.0, least=0, lost=LOST)
    order: str = option("choice", "forwards", choices=("forwards", "backwards"))


def test_what_later_versions_add_says_whether_it_is_harmless():
    def written(**chosen):
        later = dataclasses.replace(MANIFEST, decoding=LaterConfig(**chosen))
        return json.loads(format_manifest(later))["decoding"]

    assert written() == {}
    assert written(pace=0.5, beam_size=4) == {"beam_size": 4, "pace": 0.5, "harmless": {"pace": LOST}}
    assert written(order="backwards") == {"order": "backwards"}


@pytest.mark.parametrize("section", ["", "model", "features", "text", "decoding"])
def test_unknown_fields_are_passed_over_or_refused_wherever_they_are(folder, section):
    field, expected = f"{section}.{LATER_FIELD}".lstrip("."), Bundle.open(folder).manifest
    of_later_version(section, harmless=True)(folder)
    with pytest.warns(BundleWarning, match=f"bundle.json: {field} is .* by {LATER}. Without the field: {LOST}"):
        assert Bundle.open(folder).manifest == dataclasses.replace(expected, producer=LATER)
    of_later_version(section, harmless=False)(folder)
    with pytest.raises(BundleError, match=f"bundle.json: {field} is .* by {LATER}: use that version, or a newer one"):
        Bundle.open(folder)


WRITE = """
import sys
from u2moe.runtime import Bundle, BundleWriter

target, source = sys.argv[1:]
bundle = Bundle.open(source)
for _ in range(10):
    with BundleWriter(target, overwrite=True) as staging:
        for name in bundle.manifest.files:
            staging.add(name, bundle.path / name)
        staging.seal(bundle.manifest)
        print("sealed", flush=True)
        sys.stdin.readline()
        staging.finish(bundle.manifest)
"""


@pytest.fixture
def out(tmp_path):
    """Return a path that does not exist, in a folder of its own."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "out"


@pytest.mark.slow
@pytest.mark.skipif(
    os.name != "posix", reason="Windows has no signals that kill, and renames no folder with open files"
)
def test_a_reader_finds_a_whole_bundle_or_none_and_a_killed_writer_leaves_none(folder, out):
    fingerprint, partial = write(out).fingerprint, out.with_name(".out.partial")
    command = [sys.executable, "-c", WRITE, str(out), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdin.write(9 * b"\n")
        process.stdin.flush()
        sealing = threading.Thread(target=lambda: [process.stdout.readline() for _ in range(10)])
        sealing.start()
        while sealing.is_alive():
            try:
                assert Bundle.open(out).fingerprint == fingerprint
            except BundleError as error:
                assert str(error).endswith(("expected the folder of a bundle", ": missing", "load again"))  # noqa: PT017
        with pytest.raises(BundleError, match=r"bundle\.json: missing"):
            Bundle.open(partial)
        with pytest.raises(BundleError, match="out: is being written by another process"):
            write(out, overwrite=True)
        process.send_signal(signal.SIGKILL)
    assert partial.exists()
    write(out, overwrite=True)
    assert list(out.parent.iterdir()) == [out]


def test_a_bundle_that_was_taken_away_is_put_back(out):
    """The state is that after a writer was killed between its two renames."""
    bundle = write(out.with_name(".out.replaced"))
    out.with_name(".other.partial").mkdir()
    with BundleWriter(out, overwrite=True):
        assert Bundle.open(out).fingerprint == bundle.fingerprint
    assert sorted(path.name for path in out.parent.iterdir()) == [".other.partial", "out"]


def test_a_bundle_that_cannot_be_replaced_stays(out, monkeypatch):
    write(out)
    (out / "mine").touch()
    rename = Path.rename

    def full(self, target):
        if self.suffix == ".partial":
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(BundleError, match="out: cannot be written: No space left"):
        write(out, overwrite=True)
    monkeypatch.setattr(Path, "is_mount", lambda self: self == out)
    with pytest.raises(BundleError, match="out: is a mount point"), BundleWriter(out, overwrite=True):
        pytest.fail("the work has begun")
    assert list(out.parent.iterdir()) == [out]
    assert (out / "mine").exists()
    with pytest.raises(BundleError, match="new: cannot be written: "):
        write(out / "mine" / "new")
