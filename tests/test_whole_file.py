"""Atomic writing of files, used for transcripts, corpora, models and reports."""

import errno
import os
import stat
import threading
import time
from pathlib import Path

import pytest

from u2moe.runtime import whole_file
from u2moe.runtime.whole_file import locked, probe, remove_stale_parts, replacing, write_bytes, write_first, write_text

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")


def names_in(folder):
    return sorted(file.name for file in folder.iterdir())


def test_files_are_replaced_as_a_whole_with_names_as_long_as_the_system_allows(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with replacing(file) as part:
        part.write_text("new")
        with replacing(file) as other:  # of another writer at the same time
            other.write_text("of another")
            assert names_in(tmp_path) == sorted([part.name, other.name, "a.txt"])
            assert file.read_text() == "old"
        assert (file.read_text(), part.read_text()) == ("of another", "new")
    assert (file.read_text(), names_in(tmp_path)) == ("new", ["a.txt"])
    with pytest.raises(UnicodeEncodeError), replacing(file) as part:
        part.write_text("half\udce9", encoding="utf-8")
    assert (file.read_text(), names_in(tmp_path)) == ("new", ["a.txt"])
    write_text(tmp_path / ("n" * 255), "x")
    with pytest.raises(OSError, match="nnn: cannot be written: File name too long") as raised:
        write_text(tmp_path / ("n" * 256), "x")
    assert raised.value.errno == errno.ENAMETOOLONG


def test_content_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(errno.EIO, "Input/output error")

    write_text(tmp_path / "a", "old")
    monkeypatch.setattr(whole_file.os, "fsync", fsync)
    for write in (write_bytes, write_first):
        with pytest.raises(OSError, match="a: cannot be written: Input/output error"):
            write(tmp_path / "a", b"x")
    assert (names_in(tmp_path), (tmp_path / "a").read_text()) == (["a"], "old")


@posix
def test_links_stay_and_pipes_are_written_to(tmp_path):
    """Also pipes that have only a number: /dev/stdout in a pipeline, or the argument that `>(gzip)` becomes."""
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    heard = []
    reader = threading.Thread(target=lambda: heard.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "said")
    reader.join()
    assert heard == ["said"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert names_in(tmp_path) == ["link", "pipe", "target"]
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stream:
        write_text(Path(f"/dev/fd/{writing}"), "said")
        os.close(writing)
        assert stream.read() == b"said"


@posix
@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_permissions_are_those_of_any_new_file(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a", "x")
        write_first(tmp_path / "b", b"x")
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"} == {0o666 & ~mask}


@pytest.mark.parametrize("has_links", [True, False])
def test_the_first_of_several_writes(tmp_path, monkeypatch, has_links):
    if not has_links:
        monkeypatch.setattr(whole_file.os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    assert write_first(tmp_path / "a", b"first")
    assert not write_first(tmp_path / "a", b"second")
    assert ((tmp_path / "a").read_bytes(), names_in(tmp_path)) == (b"first", ["a"])


def test_parts_of_killed_processes_are_removed_after_an_hour_and_a_probe_leaves_nothing(tmp_path):
    kept = [".0123456789abcdef.part.txt", ".hidden.part", ".fedcba9876543210.part"]
    for name in (*kept, ".0123456789abcdef.part"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - 60 if "fedc" in name else time.time() - 7200,) * 2)
    remove_stale_parts(tmp_path)
    assert abs(probe(tmp_path) - time.time()) < 60
    assert names_in(tmp_path) == sorted(kept)
    remove_stale_parts(tmp_path / "missing")
    with pytest.raises(OSError, match="missing: cannot be written"):
        probe(tmp_path / "missing")


@posix
def test_a_lock_keeps_others_out_and_leaves_nothing(tmp_path):
    for _ in range(2):
        with locked(tmp_path / "a.lock"):
            with pytest.raises(BlockingIOError), locked(tmp_path / "a.lock"):
                pytest.fail("two hold it")
            assert names_in(tmp_path) == ["a.lock"]
        assert names_in(tmp_path) == []
