"""Lists of every format, read as streams of utterances, and their audio."""

import dataclasses
import gzip
import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from u2moe.runtime.corpus import entry as entry_module
from u2moe.runtime.corpus.entry import AudioFile, Command, Entry, Sources, Unreadable, cut_into_blocks
from u2moe.runtime.corpus.lists import FORMATS, ListOptions, digest, find_format, read_recordings, read_utterances
from u2moe.runtime.errors import AudioError, CorpusError

RATE = 16000


def wav(samples):
    content = io.BytesIO()
    soundfile.write(content, samples, RATE, format="WAV", subtype="PCM_16")
    return content.getvalue()


def ramp(seconds=0.1):
    return (np.arange(int(seconds * RATE)) % 1000 / 32768).astype(np.float32)


def read_from(sources, utterance):
    return np.concatenate(list(sources.read_blocks(utterance, RATE)))


def samples_of(utterance):
    with Sources() as sources:
        return read_from(sources, utterance)


@pytest.fixture
def clip(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav(ramp()))
    return tmp_path / "a.wav"


def write(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def only(list_path, **options):
    return list(read_utterances(list_path, options=ListOptions(**options)))


def test_lists_of_wenet_and_nemo(clip, tmp_path):
    list_path = write(
        tmp_path / "data.list",
        {"key": "k1", "wav": "a.wav", "txt": "ONE", "speaker": "s"},
        {"key": "k2", "wav": "/b.wav", "txt": "TWO", "start": 0.5, "end": 2, "set": "dev"},
    )
    assert find_format(str(list_path)) == "wenet"
    second = {"text": "TWO", "start": 0.5, "end": 2.0, "duration": 1.5, "fields": {"set": "dev"}}
    assert only(list_path) == [
        Entry(key="k1", source=AudioFile(path=str(clip)), text="ONE", speaker="s"),
        Entry(key="k2", source=AudioFile(path="/b.wav"), **second),
    ]
    lines = [
        {"audio_filepath": "a.wav", "duration": 0.1, "text": "one", "lang": "en"},
        {"audio_filepath": "a.wav", "offset": 0.05, "duration": 0.025},
    ]
    first, second = only(write(tmp_path / "list.json", *lines))
    assert (first.key, first.end, first.duration, first.text) == ("a.wav", None, 0.1, "one")
    assert (second.key, second.start, round(second.end, 6), second.text) == ("a.wav#0.05", 0.05, 0.075, None)
    assert [first.fields, second.fields] == lines
    assert np.array_equal(samples_of(second), ramp()[800:1200])


def test_cuts_of_lhotse(clip, tmp_path):
    recording = {"id": "r", "sources": [{"type": "file", "channels": [0], "source": "a.wav"}], "duration": 0.1}
    cut = {"id": "c2", "start": 0, "duration": 0.1, "channel": 0, "recording": recording, "supervisions": []}
    texts = [{"text": "ONE", "speaker": "s"}, {"text": "TWO", "speaker": "s"}]
    named = {"supervisions": texts, "custom": {"set": "dev"}, "type": "MonoCut"}
    mixed = {"id": "c3", "tracks": [], "type": "MixedCut"}
    cuts = [cut | {"id": "c1", "start": 0.05, "duration": 0.02, **named}, cut, mixed]
    list_path = write(tmp_path / "cuts.jsonl", *cuts)
    (tmp_path / "cuts.jsonl.gz").write_bytes(gzip.compress(list_path.read_bytes()))
    first, second, third = only(list_path)
    expected = {"text": "ONE TWO", "speaker": "s", "fields": {"set": "dev"}}
    source = AudioFile(path=str(clip))
    assert first == Entry(key="c1", source=source, start=0.05, end=0.07, duration=0.02, **expected)
    assert (second.end, second.text, third.key) == (None, None, "cuts.jsonl:3")
    assert only(tmp_path / "cuts.jsonl.gz")[:2] == [first, second]
    with pytest.raises(AudioError, match="line 3: type must be MonoCut or MultiCut, got 'MixedCut'"):
        samples_of(third)


def kaldi(folder, **tables):
    for name, lines in tables.items():
        write(folder / name.replace("_", "."), *lines)
    return folder


def test_segments_of_kaldi_and_folders_without(clip, tmp_path):
    folder = kaldi(tmp_path, wav_scp=["r1 a.wav", "r2\tb c.wav"], text=["r1 ONE  TWO", "r2"], utt2spk=["r1 s1"])
    assert find_format(str(folder)) == "kaldi"
    expected = [
        Entry(key="r1", source=AudioFile(path=str(clip)), text="ONE  TWO", speaker="s1"),
        Entry(key="r2", source=AudioFile(path=str(tmp_path / "b c.wav")), text=""),
    ]
    assert only(folder) == only(folder / "wav.scp") == expected
    segments = ["u1 r2 0.5 1.5", "u2 r1 0.02 -1", "u3 r9 0 1", "u4 r1 0"]
    folder = kaldi(tmp_path, wav_scp=["r1 a.wav", "r2 b.wav"], segments=segments, text=["u2 TWO"])
    first, second, third, fourth = only(folder)
    assert (first.source.path, first.start, first.end, first.text) == (str(tmp_path / "b.wav"), 0.5, 1.5, None)
    assert (second.source.path, second.start, second.end, second.text) == (str(clip), 0.02, None, "TWO")
    assert "recording 'r9' is not in" in third.source.error
    assert "must be utterance, recording, start and end, got 'u4 r1 0'" in fourth.source.error


def test_tables_that_are_not_sorted_are_refused_where_that_matters(tmp_path):
    for name, wavs, texts, message in (
        ("list", ["b b.wav", "a a.wav"], ["a A", "b B"], "text: the list in the same folder is not .*'a' is out of"),
        ("text", ["a a.wav", "c b.wav"], ["b B", "a A", "c C"], "text: not sorted .*'a' is out of order"),
    ):
        (tmp_path / name).mkdir()
        assert len(only(kaldi(tmp_path / name, wav_scp=wavs))) == 2
        with pytest.raises(CorpusError, match=message):
            only(kaldi(tmp_path / name, text=texts))


KEYS = st.text("ab\u00e9", min_size=1, max_size=4)


@given(table=st.dictionaries(KEYS, st.text("xy ", max_size=3)), keys=st.sets(KEYS, min_size=1))
def test_tables_side_by_side_find_what_a_dict_finds(tmp_path_factory, table, keys):
    def lines(of):
        return [f"{key} {of[key]}" for key in sorted(of, key=str.encode)]

    folder = kaldi(tmp_path_factory.mktemp("kaldi"), wav_scp=lines(dict.fromkeys(keys, "a.wav")), text=lines(table))
    expected = {key: table[key].strip() if key in table else None for key in keys}
    assert {utterance.key: utterance.text for utterance in only(folder)} == expected


def test_commands_only_run_where_they_are_allowed_and_end_with_all_they_started(clip, tmp_path, monkeypatch):
    folder = kaldi(tmp_path, wav_scp=[f"k cat {clip} |", "l cat missing |"])
    with pytest.raises(CorpusError, match=r"command 'cat .* needs --allow-pipes"):
        only(folder)
    first, second = only(folder, allow_pipes=True)
    assert first.source == Command(command=f"cat {clip}")
    assert np.array_equal(samples_of(first), ramp())
    with pytest.raises(AudioError, match="cat missing: exited with status 1 after 0 bytes: cat: missing: No such file"):
        samples_of(second)
    monkeypatch.setattr(entry_module, "LONGEST_COMMAND_S", 0.2)
    with pytest.raises(AudioError, match=r"sleep 9; echo: timed out after 0 s"):
        samples_of(Entry(key="k", source=Command(command="sleep 9; echo")))


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
def test_devices_and_pipes_are_refused_and_names_need_not_be_utf8(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", str(tmp_path / "pipe")):
        with pytest.raises(AudioError, match="not a regular file: a device or a pipe may never end"):
            samples_of(Entry(key="k", source=AudioFile(path=path)))
    (tmp_path / os.fsdecode(b"\xff.wav")).write_bytes(wav(ramp()))
    (tmp_path / "list").write_bytes(b"\xff.wav\n")
    for found in (only(tmp_path / "list"), only(tmp_path)):
        assert np.array_equal(samples_of(found[0]), ramp())


def test_parquet_of_hugging_face(clip, tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the extra parquet")
    pq = pytest.importorskip("pyarrow.parquet")
    audio = [{"bytes": clip.read_bytes(), "path": "a.wav"}, {"bytes": None, "path": clip.name}, None]
    rows = {"audio": audio, "sentence": ["ONE", "TWO", "THREE"], "speaker_id": [7, 8, 9], "set": ["x", "y", "z"]}
    pq.write_table(pa.table(rows), clip.parent / "train.parquet")
    path = str(clip.parent / "train.parquet")
    assert (find_format(path), FORMATS["parquet"].count(path)) == ("parquet", 3)
    found = list(read_utterances(path))
    assert [(entry.key, entry.text, entry.speaker) for entry in found] == [
        ("0", "ONE", "7"), ("1", "TWO", "8"), ("2", "THREE", "9"),
    ]  # fmt: skip
    assert found[0].fields == {"set": "x"}
    with Sources() as sources:
        samples = [read_from(sources, entry) for entry in found[:2]]
        np.testing.assert_array_equal(samples[0], samples[1])
        with pytest.raises(AudioError, match="2: audio contains neither bytes nor a path"):
            sources.open(found[2])
    pq.write_table(pa.table({"text": ["ONE"]}), tmp_path / "none.parquet")
    with pytest.raises(CorpusError, match="found columns text, but not audio"):
        list(read_utterances(tmp_path / "none.parquet"))


def test_recordings_are_fetched_once_for_all_parts_which_are_exactly_their_samples(clip, tmp_path, monkeypatch):
    command = Command(command=f"echo >> {tmp_path}/log; cat {clip}")
    parts = [Entry(key="k", source=command, start=i / 100, end=(i + 1) / 100) for i in range(10)]
    with Sources() as sources:
        found = [read_from(sources, part) for part in parts]
    assert np.array_equal(np.concatenate(found), ramp())
    assert (tmp_path / "log").read_text() == "\n"
    whole = Entry(key="k", source=AudioFile(path=str(clip)))
    assert np.array_equal(samples_of(dataclasses.replace(whole, start=0.025, end=9.0)), ramp()[400:])
    for start, end in ((0.1, None), (0.2, 0.3), (0.05, 0.05)):
        with pytest.raises(AudioError, match=f"a.wav: has no audio from {start:g} s to"):
            samples_of(dataclasses.replace(whole, start=start, end=end))
    monkeypatch.setattr(entry_module, "_MOST_BYTES", 1000)
    for source in (Command(command="cat /dev/zero"), AudioFile(path=f"file://{clip}")):
        with pytest.raises(AudioError, match="cannot be copied: use a local file"):
            samples_of(Entry(key="k", source=source))


def test_memory_is_bounded(tmp_path):
    peaks = []
    for num in (500, 5_000):
        list_path = write(tmp_path / "data.list", *[{"key": f"k{i}", "wav": f"{i}.wav"} for i in range(num)])
        tracemalloc.start()
        assert sum(len(block.entries) for block in cut_into_blocks(read_utterances(list_path), 100)) == num
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def shard(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = tarfile.SYMTYPE, content
                tar.addfile(member)
    return path


@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz")])
def test_shards_are_read_in_place(tmp_path, suffix, mode):
    members = {
        "k1.wav": wav(ramp()), "k1.txt": b"ONE\n", "../../k2.txt": b"TWO", "../../k2.wav": wav(-ramp()),
        "k3.txt": b"no audio", "k4.wav": "/etc/passwd", "k5.flac": b"no audio either",
    }  # fmt: skip
    archive = shard(tmp_path / f"0{suffix}", members, mode)
    other = shard(tmp_path / f"1{suffix}", {"k6.wav": wav(ramp(0.2))}, mode)
    list_path = write(tmp_path / "shards.list", archive.name, str(other))
    assert find_format(str(list_path)) == find_format(str(archive)) == "shards"
    found = only(list_path)
    assert [item.key for item in found] == ["k1", "../../k2", "k3", "k5", "k6"]  # names, never used as paths
    assert [item.text for item in found] == ["ONE", "TWO", "no audio", None, None]
    assert found[:4] == only(archive)
    with Sources() as sources:
        for index, expected in ((1, -ramp()), (0, ramp()), (4, ramp(0.2))):
            assert np.array_equal(read_from(sources, found[index]), expected)
        other.rename(tmp_path / "elsewhere")
        assert len(read_from(sources, found[0])) == len(ramp())
        with pytest.raises(AudioError, match="No such file"):
            sources.open(found[4])
        assert np.array_equal(read_from(sources, found[1]), -ramp())
    for index in (2, 3):
        with pytest.raises(AudioError, match=found[index].key):
            samples_of(found[index])
    noises = {f"k{i}.wav": wav(np.random.default_rng(i).normal(0, 0.1, 9999)) for i in range(9)}
    broken = shard(tmp_path / f"2{suffix}", noises, mode)
    broken.write_bytes(broken.read_bytes()[:-60000])
    *found, last = only(broken)
    assert 2 < len(found) < 9
    assert last.key == broken.name
    assert "cannot be read completely" in last.source.error
    with pytest.raises(CorpusError, match=r"missing\.tar: no such file"):
        only(write(list_path, "missing.tar"))


def test_folders_and_lists_of_paths_with_transcripts_and_all_are_described(clip, tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("sub/b.flac", "sub/c.txt", "sub/d.m4a", "Z.MP3", "._Z.MP3"):
        (tmp_path / name).touch()
    assert [item.key for item in only(tmp_path)] == ["Z.MP3", "a.wav", "sub/b.flac", "sub/d.m4a"]
    list_path = write(tmp_path / "list.tsv", "\ufeffa.wav\tONE", "", "s3://bucket/b.wav", "sub/b.flac")
    assert only(list_path) == [
        Entry(key="a.wav", source=AudioFile(path=str(clip)), text="ONE"),
        Entry(key="s3://bucket/b.wav", source=AudioFile(path="s3://bucket/b.wav")),
        Entry(key="sub/b.flac", source=AudioFile(path=str(tmp_path / "sub/b.flac"))),
    ]
    assert only(list_path, root="/elsewhere")[0].source.path == "/elsewhere/a.wav"
    found = read_recordings(write(tmp_path / "list.tsv", "\ufeffa.wav\tA B", "", " b c.wav \t"))
    assert [(item.path, item.transcript) for item in found] == [(clip, "A B"), (tmp_path / "b c.wav", "")]
    guide = (Path(__file__).parent.parent / "docs" / "corpora.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in guide for name in FORMATS)


@pytest.mark.parametrize(("read", "content", "message"), [
    *((read, None, "cannot be read as a list of recordings: .*No such file") for read in (only, read_recordings)),
    *((read, b"\n", "lists no recordings") for read in (only, read_recordings)),
    (only, b"", "lists no recordings"),
    (only, b"fLaC\0\0\0", "not a list of recordings, but a binary file, perhaps a recording"),
    (only, b'{"wav": "a"', "must be a JSON object"),
    (only, b'{"path": "a"}', r"one of audio_filepath \(nemo\), wav \(wenet\), recording \(lhotse\), got path"),
    (only, b'{"key": 1, "wav": "a"}', "line 1: key must be a non-empty string, got 1"),
    (only, b'{"key":"k", "wav":"a", "start":-1}', "line 1: start must be a number of seconds, at least 0, got -1"),
    (only, b'{"recording": {"sources": "a.wav"}}', "line 1: recording.sources must be a list of objects, got 'a.wav'"),
    (only, b"\x1f\x8bno gzip", "cannot be read as a list"),
    (read_recordings, b"\xff\xfe", "cannot be read as a list of recordings: "),
    (read_recordings, b"a.wav\tA\nb.wav B\n", "line 2 must be path<TAB>transcript, got 'b.wav B'"),
])  # fmt: skip
def test_what_is_no_list_is_refused(tmp_path, read, content, message):
    path = tmp_path / "data.list"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CorpusError, match=rf"data\.list: .*{message}"):
        read(path)


LHOTSE_FIELDS = ["id", "start", "duration", "channel", "recording", "sources", "type", "source", "supervisions", "text"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(LHOTSE_FIELDS), inner, max_size=6),
    max_leaves=12,
)
FIRST = {
    "wenet": {"key": "k", "wav": "a.wav"},
    "nemo": {"audio_filepath": "a.wav"},
    "lhotse": {"id": "c", "recording": {"sources": [{"type": "file", "source": "a.wav"}]}},
}


@pytest.mark.slow
@pytest.mark.parametrize("file_format", FIRST)
@settings(max_examples=12)
@given(data=st.data())
def test_no_later_line_stops_a_list(tmp_path_factory, file_format, data):
    path = tmp_path_factory.mktemp("list") / "data"
    later = ["supervisions", "custom", "channel", *FIRST["lhotse"]]
    names = st.sampled_from(["key", "wav", "txt", "end", "offset", *later])
    changed = FIRST[file_format] | data.draw(st.dictionaries(names, json_values))
    lines = [FIRST[file_format], changed, data.draw(json_values), FIRST[file_format]]
    write(path, *map(json.dumps, lines), "\x00{")
    found = list(read_utterances(path, file_format=file_format))
    assert (len(found), found[3]) == (5, found[0])
    for utterance in found[1:]:
        assert isinstance(utterance, Entry)
        assert isinstance(utterance.source, AudioFile | Unreadable)
        assert isinstance(utterance.text, str | None)


def test_a_digest_follows_the_content_not_the_place(tmp_path):
    digests = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        kaldi(tmp_path / name, wav_scp=["a a.wav"], text=["a A"])
        digests.add(digest(str(tmp_path / name), "kaldi", ListOptions()))
    assert len(digests) == 1
    kaldi(tmp_path / "two", text=["a B"])
    assert digest(str(tmp_path / "two"), "kaldi", ListOptions()) not in digests
    archive = shard(tmp_path / "0.tar", {"k.wav": wav(ramp())})
    before = digest(str(archive), "shards", ListOptions())
    shard(archive, {"k.wav": wav(ramp(3))})
    assert digest(str(archive), "shards", ListOptions()) != before
