import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from u2moe.runtime import Bundle, BundleError, BundleWriter

pytestmark = pytest.mark.slow

WRITE = """
import sys
from pathlib import Path
from u2moe.runtime import Bundle, BundleWriter

target, source, how = sys.argv[1:]
bundle = Bundle.open(source)
for _ in range(20 if how == "often" else 1):
    with BundleWriter(target, overwrite=True) as staging:
        for name in bundle.manifest.files:
            staging.add(name, Path(bundle.path / name))
        staging.seal(bundle.manifest)
        if how == "wait":
            print("sealed", flush=True)
            sys.stdin.read()
        staging.finish(bundle.manifest)
"""


def write(target, bundle, **settings):
    with BundleWriter(target, **settings) as staging:
        for name in bundle.manifest.files:
            staging.add(name, bundle.path / name)
        return staging.finish(bundle.manifest)


def writer(target, bundle, how):
    command = [sys.executable, "-c", WRITE, str(target), str(bundle.path), how]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.mark.skipif(os.name != "posix", reason="Windows has no signals that kill")
def test_what_a_killed_writer_leaves_is_no_bundle_and_goes_with_the_next(bundle, tmp_path):
    with writer(tmp_path / "out", bundle, "wait") as process:
        assert process.stdout.readline() == b"sealed\n"
        with pytest.raises(BundleError, match=r"bundle\.json: missing"):
            Bundle.open(tmp_path / ".out.partial")
        with pytest.raises(BundleError, match="out: is being written by another process"):
            write(tmp_path / "out", bundle)
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / ".out.partial").exists()
    write(tmp_path / "out", bundle)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_bundle_that_was_taken_away_is_put_back(bundle, tmp_path):
    """The state is that after a writer was killed between its two renames."""
    write(tmp_path / ".out.replaced", bundle)
    (tmp_path / ".other.partial").mkdir()
    with BundleWriter(tmp_path / "out", overwrite=True):
        assert Bundle.open(tmp_path / "out").fingerprint == bundle.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.partial", "out"]


def test_a_bundle_that_cannot_be_replaced_stays(bundle, tmp_path, monkeypatch):
    write(tmp_path / "out", bundle)
    (tmp_path / "out" / "mine").touch()
    rename = Path.rename

    def full(self, target):
        if self.suffix == ".partial":
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(BundleError, match="out: cannot be written: No space left"):
        write(tmp_path / "out", bundle, overwrite=True)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert (tmp_path / "out" / "mine").exists()


@pytest.mark.skipif(os.name != "posix", reason="Windows renames no folder with open files")
def test_a_reader_finds_a_whole_bundle_or_none(bundle, tmp_path):
    """The bundle is replaced repeatedly. Another process that tries to replace it at the same time gets an error."""
    write(tmp_path / "out", bundle)
    with writer(tmp_path / "out", bundle, "often") as process:
        while process.poll() is None:
            try:
                assert Bundle.open(tmp_path / "out").fingerprint == bundle.fingerprint
            except BundleError as error:
                assert str(error).endswith(("expected the folder of a bundle", ": missing", "load again"))  # noqa: PT017
    assert process.returncode == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_link_to_a_bundle_is_replaced(bundle, tmp_path):
    write(tmp_path / "real", bundle)
    (tmp_path / "out").symlink_to(tmp_path / "real")
    write(tmp_path / "out", bundle, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "real"]
    assert not (tmp_path / "out").is_symlink()


def test_a_mount_point_is_refused_before_the_work(bundle, tmp_path, monkeypatch):
    write(tmp_path / "out", bundle)
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path / "out")
    with pytest.raises(BundleError, match="out: is a mount point"), BundleWriter(tmp_path / "out", overwrite=True):
        pytest.fail("the work has begun")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_target_that_cannot_be_written_is_a_typed_error(bundle, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="out: cannot be written: "):
        write(tmp_path / "file" / "out", bundle)
