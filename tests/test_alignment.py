"""Alignment of tokens with frames, and of texts with recordings: word times, misfits, and errors."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from corpora import ToyChoice, rows_in
from hypothesis import given
from hypothesis import strategies as st
from searches import random_log_probs
from tones import RATE, say, toy_recognizer

from u2moe.runtime import AlignmentError, CorpusError, DecodingOptions, cli
from u2moe.runtime.corpus.runner import CorpusOptions, run_corpus
from u2moe.runtime.decoding import alignment as alignment_module
from u2moe.runtime.decoding.alignment import Aligner, align
from u2moe.runtime.decoding.ctc import ctc_greedy_search
from u2moe.runtime.language.sentences import written_sentences
from u2moe.runtime.text.formats import format_transcript
from u2moe.runtime.text.vocabulary import Spelling, TextConfig, Vocabulary

OF_TORCHAUDIO = json.loads((Path(__file__).parent / "golden" / "alignments.json").read_text(encoding="utf-8"))
FRAME_S = 0.04


def collapse(path):
    return [token for token, _ in itertools.groupby(path) if token != 0]


def path_of(aligned, num_frames):
    path = [0] * num_frames
    for token in aligned:
        path[token.start : token.end] = [token.token] * (token.end - token.start)
    return path


@given(st.integers(0, 10_000), st.integers(0, 6), st.lists(st.integers(1, 2), max_size=4), st.booleans())
def test_it_is_the_best_of_all_alignments(seed, num_frames, tokens, is_impossible):
    log_probs = random_log_probs(seed, num_frames, 3, scale=3.0)
    if is_impossible:
        log_probs[:, 2] = -np.inf
    paths = itertools.product(range(2 if is_impossible else 3), repeat=num_frames)
    scores = [log_probs[range(num_frames), path].sum() for path in paths if collapse(path) == tokens]
    aligned = align(log_probs, tokens)
    if not scores:
        assert aligned is None
        return
    path = path_of(aligned, num_frames)
    assert (collapse(path), log_probs[range(num_frames), path].sum()) == (tokens, pytest.approx(max(scores)))


@pytest.mark.parametrize("case", OF_TORCHAUDIO, ids=lambda case: str(len(case["path"])))
def test_it_is_that_of_torchaudio_which_wenet_uses(case):
    log_probs = random_log_probs(case["seed"], len(case["path"]), case["vocab_size"], scale=3.0)
    assert path_of(align(log_probs, case["tokens"]), len(log_probs)) == case["path"]


@given(st.integers(0, 10_000), st.integers(1, 60), st.lists(st.integers(1, 3), max_size=20), st.data())
def test_parts_and_blocks_make_no_difference(seed, num_frames, tokens, data):
    log_probs = random_log_probs(seed, num_frames, 4, scale=3.0)
    expected = align(log_probs, tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alignment_module, "_BLOCK_LEN", data.draw(st.integers(1, 9)))
        patch.setattr(alignment_module, "_MOST_IN_MEMORY", data.draw(st.sampled_from([0, 1 << 20])))
        aligner, begin = Aligner(tokens, 4), 0
        while begin < num_frames:
            size = data.draw(st.integers(1, 25))
            aligner.advance(log_probs[begin : begin + size])
            begin += size
        assert aligner.finish() == expected
    if expected is None:
        assert aligner.num_needed > num_frames


@given(st.integers(0, 10_000), st.integers(1, 60))
def test_the_greedy_result_aligns_where_it_was_found(seed, num_frames):
    log_probs = random_log_probs(seed, num_frames, 5, scale=3.0)
    greedy = ctc_greedy_search(log_probs)
    aligned = align(log_probs, greedy.tokens)
    assert [(token.token, token.start) for token in aligned] == list(zip(greedy.tokens, greedy.times, strict=True))
    for token, end in zip(aligned, [*greedy.times[1:], num_frames][: len(aligned)], strict=True):
        assert token.start <= token.peak < token.end <= end
        assert token.confidence == pytest.approx(np.exp(log_probs[token.start : token.end, token.token].max()))


def test_blank_may_be_any_token_and_tokens_that_cannot_be_are_refused():
    log_probs = random_log_probs(7, 20, 5, scale=3.0)
    moved = np.empty_like(log_probs)
    moved[:, [1, 2, 3, 4, 0]] = log_probs  # the column of each old id
    expected = align(log_probs, [1, 2, 2])
    assert [(t.start, t.end) for t in align(moved, [2, 3, 3], blank=1)] == [(t.start, t.end) for t in expected]
    for token in (0, 5, -1):
        with pytest.raises(ValueError, match="tokens must be ids below 5 other than blank 0"):
            align(log_probs, [token])


def words_of(alignment):
    return [word for segment in alignment.segments for word in segment.words]


@pytest.mark.parametrize("chunk_size", [None, 8])
@pytest.mark.parametrize("pause_s", [0.2, 0.8])
def test_words_begin_where_they_are_said_however_the_recording_is_cut(chunk_size, pause_s):
    spoken = list(itertools.islice(itertools.cycle("ABACDCBD"), 60))
    samples, starts = say(spoken, [pause_s] * len(spoken))
    text = "".join(word.lower() + ",.\n"[place % 3] + " " for place, word in enumerate(spoken))
    done, options = [], DecodingOptions(chunk_size=chunk_size)
    alignment = toy_recognizer().align(samples, text, options=options, on_progress=done.append)
    found = words_of(alignment)
    assert [word.word.strip(",.").upper() for word in found] == spoken
    assert np.abs(np.array([word.start for word in found]) - starts).max() < 2 * FRAME_S
    assert all(before.end <= after.start for before, after in itertools.pairwise(found))
    assert [segment.text for segment in alignment.segments][:3] == ["a, b.", "a", "c, d."]
    assert (alignment.misfits, alignment.unwritten, alignment.complete) == ([], [], True)
    assert alignment.duration == done[-1] == len(samples) / RATE


def test_what_does_not_fit_is_named_also_in_silence():
    samples, _ = say("ABCABC", [0.3] * 6)
    alignment = toy_recognizer().align(samples, wrong := "A B D A D B C")
    assert [place for place, word in enumerate(words_of(alignment)) if word in alignment.misfits] == [2, 4]
    assert all(word.confidence > 0.9 for word in words_of(alignment) if word not in alignment.misfits)
    samples, starts = say("ABCDABCD", [0.3] * 8)
    missing = toy_recognizer().align(samples, "A B A B C D")
    assert [word.confidence > 0.9 for word in words_of(missing)] == [True] * 6
    ((start, end),) = missing.unwritten
    assert (start, end) == (pytest.approx(starts[2], abs=0.15), pytest.approx(starts[3] + 0.3, abs=0.15))
    lines = [*alignment.warnings, *missing.warnings]
    assert [line.split(" ")[0] for line in lines] == ["'D'", "'D'", f"{start:.2f}"]
    assert toy_recognizer().align(samples, wrong, min_score=0).misfits == []


@pytest.mark.parametrize(("text", "expected"), [
    (" \n…\n", "text: has no words"),
    ("A\nb 42nd.\nE", "text: line 2, '42nd.': the vocabulary has no '4'; line 3, 'E': the vocabulary has no 'E'"),
    ("<name>", "line 1, '<name>': the vocabulary has no '<'"),
    ("A " * 200, r"the text needs at least 16.0 s of audio, found 2.0 s"),
    ("", "text must be"),
    (b"A", "text must be"),
])  # fmt: skip
def test_texts_that_cannot_be_aligned(text, expected):
    toy, (samples, _) = toy_recognizer(), say("AB", [0.2, 0.7])
    with pytest.raises((AlignmentError, ValueError), match=expected):
        toy.align(samples, text)
    with pytest.raises(ValueError, match="min_score"):
        toy.align(samples, "A", min_score=2)
    with pytest.raises(AlignmentError, match=r"no speech was found in 2\.0 s of audio"):
        toy.align(np.zeros(2 * RATE, np.float32), "A")


@pytest.mark.parametrize(("line", "expected"), [
    ("\"Twenty-one,\" she said. 'No!' It's 42 — really.", [
        ('"Twenty-one," she said.', ['"Twenty-one,"', "she", "said."]), ("'No!'", ["'No!'"]),
        ("It's 42 — really.", ["It's", "42 —", "really."])]),
    ("今天!好。we go", [("今天!好。", ["今", "天!", "好。"]), ("we go", ["we", "go"])]),
])  # fmt: skip
def test_words_as_they_are_written(line, expected):
    assert [(text, [word.text for word in words]) for text, words in written_sentences(line)] == expected


BPE = ["<blank>", "<unk>", "▁T", "IN", "▁TH", "▁THIN", "ER", "▁I", "NER", "▁", "T", "H", "I", "N", "E", "R", "一"]


@pytest.mark.parametrize(("symbols", "kind", "words", "expected"), [
    (BPE, "bpe", ["thin", "iner", "一", "It"], ["▁THIN", "▁", "IN", "ER", "一", "▁I", "T"]),
    ([*BPE[:2], *sorted([*BPE[2:], "THI"])], "bpe", ["thin", "iner"], ["▁THIN", "▁I", "NER"]),
    (["<blank>", "▁", "A", "B", "一"], "char", ["ab", "a", "一", "b"], ["A", "B", "▁", "A", "一", "B"]),
], ids=["in the order of merges", "in another order: as few as possible", "characters"])  # fmt: skip
def test_words_are_spelled_as_the_model_writes_them(symbols, kind, words, expected):
    vocabulary = Vocabulary(symbols, TextConfig(tokenizer=kind))
    pairs = zip(["", *words], words, strict=False)
    tokens = [token for before, word in pairs for token in Spelling(vocabulary).tokens(word, before, "x")]
    assert [symbols[token] for token in tokens] == expected
    assert [word.text for word in vocabulary.words(tokens)] == [word.upper() for word in words]


def test_a_list_of_transcripts(tmp_path):
    """`u2moe corpus --align`: rows have the transcript with times, and warnings about misfits."""
    samples, starts = say("AB", [0.2, 0.7])
    soundfile.write(tmp_path / "a.wav", samples, RATE)
    texts = {"fits": {"txt": "a, b."}, "not": {"txt": "A D B"}, "bad": {"txt": "E"}, "none": {}}
    lines = [json.dumps({"key": key, "wav": "a.wav", **text}) for key, text in texts.items()]
    (tmp_path / "list").write_text("\n".join(lines))
    options = CorpusOptions(align=True, num_workers=1)
    progress = run_corpus(tmp_path / "list", tmp_path / "out", ToyChoice(), options)
    assert (progress.num_done, progress.num_failed, progress.num_warned) == (4, 2, 1)
    fits, other, bad, none = rows_in(tmp_path / "out")
    assert [word["word"] for word in fits["segments"][0]["words"]] == ["a,", "b."]
    assert [word["start"] for word in fits["segments"][0]["words"]] == pytest.approx(starts, abs=2 * FRAME_S)
    assert (fits["text"], fits["duration"]) == ("a, b.", len(samples) / RATE)
    assert [warning.partition(" ")[0] for warning in other["warnings"]] == ["'D'"]
    assert [bad["error"], none["error"]] == [
        "text: line 1, 'E': the vocabulary has no 'E': write what is spoken, with numbers as words",
        "the list contains no transcript for this utterance",
    ]
    with pytest.raises(CorpusError, match="began with align true, but it is now false"):
        run_corpus(tmp_path / "list", tmp_path / "out", ToyChoice(), dataclasses.replace(options, align=False))


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run `u2moe align` with the toy model and a.wav ("A B"); return exit code, output and errors."""
    (tmp_path / "deep").mkdir()
    for name in ("a.wav", "deep/b.wav"):
        soundfile.write(tmp_path / name, say("AB", [0.2, 0.7])[0], RATE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("u2moe.runtime.cli.transcribe.model_choice", lambda _: ToyChoice())

    def run(*arguments):
        return cli.main(["align", *map(str, arguments)]), *capsys.readouterr()

    return run


def test_the_command_writes_formats(command, tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffA,\nb.", encoding="utf-8")
    code, out, err = command("a.wav")
    assert (code, err) == (0, "")
    assert [line.split()[4] for line in out.splitlines()] == ["A,", "b."]
    alignment = toy_recognizer().align(tmp_path / "a.wav", "A,\nb.")
    for name in ("TextGrid", "json"):
        assert command("a.wav", "-o", f"out.{name}")[0] == 0
        written = (tmp_path / f"out.{name}").read_text(encoding="utf-8")
        assert written == format_transcript(alignment, name, name="a.wav")
    assert {"misfits", "unwritten"} < set(json.loads(written))


def test_the_command_names_what_is_wrong(command, tmp_path):
    assert command("a.wav")[0::2] == (
        1, ("u2moe: error: a.wav: its text a.txt cannot be read: No such file or directory\n"
            "u2moe: error: 1 of 1 files failed\n"),
    )  # fmt: skip
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_text("A D B", encoding="utf-8")
    (tmp_path / "texts" / "b.txt").write_bytes(b"\xff")
    code, out, err = command("a.wav", "deep/b.wav", "--text", "texts")
    assert (code, [line.split()[4] for line in out.splitlines()]) == (1, ["A", "D", "B"])
    assert "warning: a.wav: 'D' at " in err
    assert "deep/b.wav: its text texts/b.txt cannot be read: 'utf-8' codec" in err
    assert "1 of 2 files failed" in err
    code, _, err = command("a.wav", "deep/b.wav", "--text", "texts/a.txt")
    assert (code, err) == (1, "u2moe: error: texts/a.txt: is one text for several recordings: name a folder of texts\n")
    (tmp_path / "a.txt").write_text("4", encoding="utf-8")
    assert "a.wav with a.txt: text: line 1, '4': the vocabulary has no '4'" in command("a.wav")[2]
    assert "min_score must be" in command("a.wav", "--min-score", "3")[2]
