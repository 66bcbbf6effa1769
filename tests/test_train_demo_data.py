"""The data of the demo model's recipe: clips of games, other speakers out of them, codecs, words to be spoken."""
# ruff: noqa: E402 - the recipe is a folder of scripts, which has to be put on the path first

import importlib
import io
import random
import string
import sys
import types
import warnings
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("scipy")
pytest.importorskip("sentencepiece")
from scipy.signal import lfilter

RECIPE = Path(__file__).parents[1] / "examples" / "train_demo"
sys.path.insert(0, str(RECIPE))
import corpus
import edges
import fragments
import games
import manners
import prepare
import rnc
import synthesize
import texts
import urquan
import voices
from phones import Stretch
from spelling import normalize

COLUMNS = "clip\toffset\tsize\tseconds\tspeaker_group\tsplit\tcer\ttext\n"


class PackedBits:
    """Writes what `rnc.Bits` reads: 16-bit words, low bits first, and bytes after the last word begun."""

    def __init__(self):
        self.data, self.word, self.num_bits = bytearray(), 0, 16

    def put(self, value, count):
        for index in range(count):
            if self.num_bits == 16:
                self.word, self.num_bits = len(self.data), 0
                self.data += bytes(2)
            self.data[self.word + self.num_bits // 8] |= (value >> index & 1) << self.num_bits % 8
            self.num_bits += 1

    def put_codes(self, *symbols):
        """A code of two bits for each of one or two symbols; one of a single bit is for a symbol that is not used."""
        lengths = [0] * 15 + [1]
        for symbol in symbols:
            lengths[symbol] = 2
        self.put(len(lengths), 5)
        for length in lengths:
            self.put(length, 4)

    def put_number(self, number, *symbols):
        """A number after the code of its size in bits: 1 and 0 for the smaller symbol, 1 and 1 for the larger."""
        self.put(1, 1)
        self.put(sorted(symbols).index(number.bit_length()), 1)
        self.put(number, max(number.bit_length() - 1, 0))


def packed(literal, distance, length):
    """`literal`, then `length` bytes of what came `distance` before, in the format of RNC's method 1."""
    bits = PackedBits()
    bits.put(0, 2)
    literals = (0, len(literal).bit_length())
    bits.put_codes(*literals)
    bits.put_codes((distance - 1).bit_length())
    bits.put_codes((length - 2).bit_length())
    bits.put(2, 16)
    bits.put_number(len(literal), *literals)
    bits.data += literal
    bits.put_number(distance - 1, (distance - 1).bit_length())
    bits.put_number(length - 2, (length - 2).bit_length())
    bits.put_number(0, *literals)
    size = len(literal) + length
    header = rnc.SIGNATURE + size.to_bytes(4, "big") + len(bits.data).to_bytes(4, "big") + bytes(5) + b"\x01"
    return header + bytes(bits.data)


@given(st.binary(min_size=4, max_size=40), st.data())
def test_packed_clips_are_unpacked(literal, data):
    distance = data.draw(st.integers(1, len(literal)))
    length = data.draw(st.integers(2, 60))
    expected = bytearray(literal)
    for _ in range(length):
        expected.append(expected[-distance])
    assert rnc.unpack(packed(literal, distance, length)) == expected


def test_damaged_clips_are_refused():
    whole = packed(b"abcdef", 3, 9)
    with pytest.raises(ValueError, match="15 bytes instead of 16"):
        rnc.unpack(whole[:4] + (16).to_bytes(4, "big") + whole[8:])
    with pytest.raises(ValueError, match="must begin with"):
        rnc.unpack(b"ZIP" + whole[3:])


@pytest.fixture
def debian(tmp_path, monkeypatch):
    """Two games: one with an archive of clips, of which one is packed, and one with a file for each clip."""
    monkeypatch.setattr(games, "TABLES", tmp_path)
    clips = [bytes(22) + bytes(range(100)), bytes(22) + packed(bytes(range(40)), 7, 60)]
    folder = tmp_path / "debian/usr/share/scummvm"
    (folder / "beneath-a-steel-sky").mkdir(parents=True)
    (folder / "beneath-a-steel-sky/sky.dsk").write_bytes(b"head" + b"".join(clips))
    places = [f"{4 + number * len(clips[0])}\t{len(clip)}" for number, clip in enumerate(clips)]
    rows = [
        f"1\t{places[0]}\t0.01\tA\ttrain\t0.1\tHello, you!\n",
        f"2\t{places[1]}\t0.01\tB\ttrain\t0.2\tAnd 2 more.\n",
        f"3\t{places[1]}\t0.01\tB\ttrain\t0.7\tNot what is said.\n",
        f"4\t{places[1]}\t0.01\tC\tdev\t0\tFor another day.\n",
        f"5\t{places[1]}\t0.01\tA\ttrain\t0\t...\n",
    ]
    (tmp_path / "sky.tsv").write_text(COLUMNS + "".join(rows))
    (folder / "drascula/en").mkdir(parents=True)
    (folder / "drascula/en/D1.ALS").write_bytes(bytes([128, 0, 255]))
    (tmp_path / "drascula.tsv").write_text(COLUMNS + "D1\t0\t3\t0\tD\ttrain\t0\tBlood\n")
    return tmp_path / "debian"


def test_the_clips_of_a_split_are_read_where_the_recording_says_the_script(debian):
    first, second = games.read_lines("sky", "train", debian)
    assert (first.text, first.voice) == ("HELLO YOU", "sky-A")
    assert (second.text, second.voice) == ("AND TWO MORE", "sky-B")
    assert np.array_equal(first.samples, (np.arange(100) - 128) / 128)
    assert len(second.samples) == 100
    assert [line.clip for line in games.read_lines("sky", "train", debian, start=1)] == ["2"]
    assert [line.clip for line in games.read_lines("sky", "dev", debian)] == ["4"]
    (blood,) = games.read_lines("drascula", "train", debian)
    assert blood.samples.tolist() == [0, -1, 127 / 128]


def test_packs_of_games_are_filled_once(debian, tmp_path):
    for _ in range(2):
        games.read_game("sky", "train", debian, tmp_path / "speech")
    pack = corpus.Pack(tmp_path / "speech/sky-train", corpus.SPEECH)
    assert [utterance.text for utterance in pack.utterances] == ["HELLO YOU", "AND TWO MORE"]


@pytest.mark.parametrize("game", games.GAMES)
def test_tables_keep_speakers_apart(game):
    speakers = {}
    for split in ("train", "dev", "test"):
        for row in games.table_rows(game, split):
            assert float(row["cer"]) >= 0
            assert int(row["size"]) > 0
            assert normalize(row["text"])
            assert speakers.setdefault(row["speaker_group"], split) == split


def bursts(*seconds):
    """Noise that lasts so long, with pauses of a quarter of a second in between, as a file of 11 kHz."""
    rate, rng = 11025, np.random.default_rng(0)
    parts = [part for length in seconds for part in (rng.uniform(-0.5, 0.5, int(length * rate)), np.zeros(rate // 4))]
    file = io.BytesIO()
    soundfile.write(file, np.concatenate(parts[:-1]), rate, format="OGG")
    return file.getvalue()


@pytest.fixture
def urquan_debian(tmp_path, monkeypatch):
    """The Ur-Quan Masters with two voices, of which one brings its own script, and a table of three lines."""
    content = tmp_path / "debian" / urquan.CONTENT
    for path in (urquan.TEXTS, urquan.VOICES):
        (content / path).parent.mkdir(parents=True)
    with ZipFile(content / urquan.TEXTS, "w") as file:
        file.writestr("base/comm/vux/vux.txt", "#(HI)\tvux-0.ogg \nAh! Human visitors!\n\nWelcome (sigh) to 2 of us.\n")
        file.writestr("base/comm/orz/orz.txt", "#(HI) orz-0.ogg\nNot this.\n")
    with ZipFile(content / urquan.VOICES, "w") as file:
        file.writestr("3dovoice/vux/vux.ts", "#(HI) 1300\n")
        file.writestr("3dovoice/vux/vux-0.ogg", bursts(1.0, 2.0))
        file.writestr("3dovoice/orz/orz.ts", "#(HI)\n#(BYE)\n")
        script = (
            "#(HI) orz-0.ogg\nHello *campers*.\n#(ask) \nWhat?\n#(BYE) orz-1.ogg\nOne.\nTwo.\n#(GONE) orz-2.ogg\nNo.\n"
        )
        file.writestr("3dovoice/orz/orz.txt", script)
        file.writestr("3dovoice/orz/orz-0.ogg", bursts(0.5))
        file.writestr("3dovoice/orz/orz-1.ogg", bursts(0.5, 0.5))
    table = tmp_path / "urquan.tsv"
    table.write_text("clip\tline\tcer\norz-0.ogg\t0\t0.1\nvux-0.ogg\t0\t0.9\nvux-0.ogg\t1\t0.2\n")
    monkeypatch.setattr(urquan, "TABLE", table)
    return tmp_path / "debian"


def test_monologues_are_cut_into_lines_at_pauses(urquan_debian):
    lines = {(line.clip, line.number): line for line in urquan.all_lines(urquan_debian)}
    # the second clip of orz does not say when its second line begins, the third one is not there
    assert {place: line.text for place, line in lines.items()} == {
        ("orz-0.ogg", 0): "HELLO",
        ("vux-0.ogg", 0): "AH HUMAN VISITORS",
        ("vux-0.ogg", 1): "WELCOME TO TWO OF US",
    }
    first, second = (lines["vux-0.ogg", number].samples for number in (0, 1))
    assert lines["vux-0.ogg", 1].voice == "urquan-vux"
    # stated: 1.3 s, in the middle of what is said; the pause is from 1.0 to 1.25 s
    assert 1.0 < len(first) / corpus.SAMPLE_RATE < 1.25
    assert len(first) + len(second) == pytest.approx(3.25 * corpus.SAMPLE_RATE, abs=200)


def test_lines_that_a_recogniser_heard_fill_a_pack_once(urquan_debian, tmp_path, monkeypatch, capsys):
    arguments = ["urquan.py", "--debian", str(urquan_debian), "--work-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    for _ in range(2):
        urquan.main()
    pack = corpus.Pack(tmp_path / "speech" / urquan.NAME, corpus.SPEECH)
    assert [utterance.text for utterance in pack.utterances] == ["HELLO", "WELCOME TO TWO OF US"]
    assert "2 lines" in capsys.readouterr().out


def test_the_table_says_how_much_of_each_line_is_not_heard(urquan_debian, monkeypatch):
    heard = iter(["Hello", "Ah, human!", ""])

    class Deaf:
        def transcribe(self, samples, sample_rate):
            assert (samples.ndim, sample_rate) == (1, corpus.SAMPLE_RATE)
            return types.SimpleNamespace(text=next(heard))

    monkeypatch.setattr(urquan.Recognizer, "from_pretrained", lambda *_, **__: Deaf())
    rows = [row.split() for row in list(urquan.hear(Path("bundle"), urquan_debian))[1:]]
    assert rows == [["orz-0.ogg", "0", "0.00"], ["vux-0.ogg", "0", "0.53"], ["vux-0.ogg", "1", "1.00"]]


@given(st.floats(0, 3), st.integers(0, 40000))
def test_a_pause_is_looked_for_inside_the_clip(start, length):
    place = urquan.quietest(np.ones(length, np.float32), start)
    assert 0 <= place <= length


def test_the_table_of_monologues_has_plausible_rows():
    assert len(urquan.agreed()) > 7000


LAST_WORDS = ["IT", "IS", "TOO", "LATE", "FRIEND"]
LINE = [
    Stretch(None, 0, 30),
    Stretch("YOU", 30, 50),
    Stretch("WIN", 50, 75),
    Stretch(None, 75, 79),  # too short to part phrases
    Stretch("NOW", 79, 100),
    Stretch(None, 100, 200),
    *(Stretch(word, 200 + 20 * place, 220 + 20 * place) for place, word in enumerate(LAST_WORDS)),
]
LINE_SAMPLES = np.arange(1, 300 * fragments.FRAME + 1, dtype=np.float32)


def test_short_phrases_are_cut_at_pauses_and_a_word_out_of_the_long_ones():
    (phrase, text), (word, word_text) = fragments.fragments(LINE_SAMPLES, LINE, random.Random(1))
    assert text == "YOU WIN NOW"
    # half of the pause before is 15 frames, of the pause behind no more than 20 are kept
    assert np.array_equal(phrase, LINE_SAMPLES[15 * fragments.FRAME : 120 * fragments.FRAME])
    place = 200 + 20 * LAST_WORDS.index(word_text)
    spoken = word[fragments.AROUND : -fragments.AROUND]
    assert not word[: fragments.AROUND].any()
    assert not word[-fragments.AROUND :].any()
    assert len(spoken) == 20 * fragments.FRAME
    inner = slice(fragments.FADE, -fragments.FADE)
    assert np.array_equal(spoken[inner], LINE_SAMPLES[place * fragments.FRAME :][: len(spoken)][inner])
    assert spoken[0] == spoken[-1] == 0


def test_a_line_without_pauses_gives_a_word_and_a_line_of_one_word_nothing():
    whole = [Stretch("YOU", 0, 19), Stretch("WIN", 19, 60)]
    assert [text for _, text in fragments.fragments(LINE_SAMPLES, whole, random.Random(1))] == ["WIN"]
    assert not list(fragments.fragments(LINE_SAMPLES, [Stretch("YOU", 3, 50)], random.Random(1)))
    assert not list(fragments.fragments(LINE_SAMPLES, [], random.Random(1)))


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 60)), max_size=20))
def test_fragments_lie_in_their_line_and_say_what_it_says(parts):
    ends = np.cumsum([length for _, length in parts]).tolist()
    line = [
        Stretch(f"W{number}" if spoken else None, end - length, end)
        for number, ((spoken, length), end) in enumerate(zip(parts, ends, strict=True))
    ]
    samples = np.ones(fragments.FRAME * (ends[-1] if ends else 0), np.float32)
    whole = " ".join(stretch.word for stretch in line if stretch.word)
    for piece, text in fragments.fragments(samples, line, random.Random(1)):
        assert f" {text} " in f" {whole} "
        assert text != whole or " " not in text
        assert 0 < len(piece) <= len(samples) + 2 * fragments.AROUND


def test_what_is_cut_out_begins_and_ends_with_its_sounds():
    """Words and phrases for `edges.py`: of at most five words, without the pauses around them."""
    lines = [(LINE_SAMPLES, LINE)]
    found = [(samples[0], len(samples) // fragments.FRAME, text) for samples, text in edges.short_phrases(lines)]
    assert found == [
        (30 * fragments.FRAME + 1, 70, "YOU WIN NOW"),
        (200 * fragments.FRAME + 1, 100, "IT IS TOO LATE FRIEND"),
    ]
    alone = edges.single_words(lines)
    assert len(alone) == len({text for _, text in alone}) == edges.WORDS_OF_LINE
    for samples, text in alone:
        stretch = next(stretch for stretch in LINE if stretch.word == text)
        assert np.array_equal(samples, LINE_SAMPLES[stretch.first * fragments.FRAME : stretch.end * fragments.FRAME])


def test_packs_of_fragments_are_filled_once(tmp_path, monkeypatch):
    class Aligner:
        def words(self, _samples, transcript):
            return LINE if "FRIEND" in transcript else None

    monkeypatch.setattr(fragments, "Aligner", Aligner)
    with corpus.Pack(tmp_path / "sky-train", corpus.SPEECH) as source:
        source.append(np.ones(300 * fragments.FRAME), "sky-A", "YOU WIN NOW IT IS TOO LATE FRIEND")
        source.append(np.ones(300 * fragments.FRAME), "sky-B", "NOT IN THE DICTIONARY")
    for _ in range(2):
        told = fragments.cut(source, tmp_path / fragments.name_of("sky-train"))
        assert told == "sky-fragments: 2 fragments, 0.00 h; 1 of 2 lines could not be aligned"
    pack = corpus.Pack(tmp_path / "sky-fragments", corpus.SPEECH)
    assert [(entry.voice, entry.text.count(" ")) for entry in pack.utterances] == [("sky-A", 2), ("sky-A", 0)]
    assert prepare.plan("sky-fragments") == (2, 0.12)


def test_an_empty_pack_has_no_rows(tmp_path):
    with corpus.Pack(tmp_path / "empty", corpus.MELS) as pack:
        assert pack.map().shape == (0, corpus.NUM_MELS)


def vowel(pitch):
    """A second of pulses, and a little noise, through three resonances."""
    rate = corpus.SAMPLE_RATE
    wave = np.diff(np.floor(np.arange(rate) * pitch / rate), prepend=0.0)
    wave += 1e-3 * np.random.default_rng(0).standard_normal(len(wave))
    for frequency, bandwidth in ((700, 80), (1200, 100), (2600, 150)):
        radius = np.exp(-np.pi * bandwidth / rate)
        wave = lfilter([1 - radius], [1, -2 * radius * np.cos(2 * np.pi * frequency / rate), radius**2], wave)
    return np.asarray(0.5 * wave / np.abs(wave).max(), np.float32)


def loudest(wave, low, high):
    """The frequency between two where a smoothed spectrum is highest."""
    frequencies = np.fft.rfftfreq(len(wave), 1 / corpus.SAMPLE_RATE)
    spectrum = np.convolve(np.abs(np.fft.rfft(wave)), np.hanning(300), "same")
    inside = (low < frequencies) & (frequencies < high)
    return frequencies[inside][spectrum[inside].argmax()]


@pytest.mark.parametrize("codec", prepare.CODECS)
def test_codecs_keep_speech_where_it_was(codec, monkeypatch):
    monkeypatch.setattr(prepare, "CODECS", (codec,))
    clean = vowel(120) * np.hanning(corpus.SAMPLE_RATE).astype(np.float32)
    heard = prepare.coded(clean, np.random.default_rng(2))
    assert len(heard) == len(clean)
    assert np.isfinite(heard).all()
    envelopes = [np.convolve(np.abs(wave), np.ones(800), "same") for wave in (clean, heard)]
    # lossy codecs change the wave, at 10 kbit/s by much, but not when it is loud
    assert np.corrcoef(*envelopes)[0, 1] > 0.95


@pytest.fixture(scope="module")
def revoice():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pyworld imports what setuptools has given up
        pytest.importorskip("pyworld")
        return importlib.import_module("revoice")


def test_another_speaker_has_another_pitch_and_tract(revoice):
    clip = vowel(120)
    analysis = revoice.Analysis.of(clip)
    higher = analysis.spoken(manners.Manner(tract=1.0, pitch=1.25, movement=1.0))
    shorter = analysis.spoken(manners.Manner(tract=1.15, pitch=1.0, movement=1.0))
    for wave, expected in ((higher, 150), (shorter, 120)):
        pitch, _ = revoice.pyworld.dio(wave.astype(np.float64), corpus.SAMPLE_RATE)
        assert (pitch > 0).mean() > 0.9
        assert np.median(pitch[pitch > 0]) == pytest.approx(expected, rel=0.02)
        assert np.abs(wave).max() == pytest.approx(0.5)
    # harmonics lie 120 Hz apart, so that a smoothed peak near 800 Hz is known to a tenth or so
    assert loudest(shorter, 400, 1000) / loudest(clip, 400, 1000) == pytest.approx(1.15, rel=0.1)


def test_manners_stay_within_what_sounds_human():
    drawn = [manners.Manner.draw(np.random.default_rng(number)) for number in range(200)]
    for values, width in (([m.tract for m in drawn], 0.15), ([m.pitch for m in drawn], 0.3)):
        assert np.exp(-width) <= min(values) < 0.95
        assert 1.05 < max(values) <= np.exp(width)


def test_a_pack_is_revoiced_once(revoice, tmp_path):
    with corpus.Pack(tmp_path / "a", corpus.SPEECH) as pack:
        for text in ("ONE", "TWO"):
            pack.append(corpus.to_pcm(vowel(120)), "someone", text)
    expected = [(text, f"someone-{number}") for number, text in enumerate(["ONE", "ONE", "ONE", "TWO", "TWO", "TWO"])]
    for _ in range(2):
        revoice.revoice(pack, 3, tmp_path / "b")
        other = corpus.Pack(tmp_path / "b", corpus.SPEECH)
        assert [(utterance.text, utterance.voice) for utterance in other.utterances] == expected


def test_hibari_speaks_as_others(monkeypatch):
    """Its network is asked once for what it would say; the harmonics move with the tract, the pitch on its own."""
    heard = []
    spectrum = np.tile(-((np.arange(601) - 200.0) ** 2)[:, None], (1, 9)).astype(np.float32)
    pitch = np.array([0, 0, 100, 110, 120, 110, 100, 20, 0], np.float32)

    class Engine:
        sess = types.SimpleNamespace(run=lambda *_: [part[None] for part in (*5 * [spectrum], pitch)])

        def phonemize(self, text):
            return [text]

        def ids(self, phonemes):
            return [*range(len(phonemes))]

    def synth(*parts):
        heard.append(parts)
        return np.zeros(24, np.float32)

    module = types.SimpleNamespace(SAMPLE_RATE=24000, Hibari=Engine, dsp=types.SimpleNamespace(synth=synth))
    monkeypatch.setitem(sys.modules, "hibari", module)
    speak = voices.speaker("hibari-others")
    spoken = [speak("hello", random.Random(number)) for number in range(3)]
    assert len({speech.voice for speech in spoken}) == 3
    for speech, (harmonics, _, noise, free, phases, melody, _) in zip(spoken, heard, strict=True):
        assert speech.rate == 24000
        manner = manners.Manner.draw(np.random.default_rng(int(speech.voice.removeprefix("hibari-"))))
        for part in (harmonics, noise, free):
            assert part[:, 4].argmax() == pytest.approx(200 * manner.tract, abs=1)
        assert np.exp(np.log(melody[2:7]).mean()) == pytest.approx(np.exp(np.log(pitch[2:7]).mean()) * manner.pitch)
        assert not melody[[0, 1, 7, 8]].any()
        assert phases.shape == spectrum.shape


def test_rhvoice_speaks_in_several_voices_and_manners(monkeypatch):
    commands = []

    def run(command, *, input, **_):  # noqa: A002 - the name is that of subprocess.run
        commands.append(command)
        assert input == b"hello"
        soundfile.write(command[-1], np.zeros(240), 24000)

    monkeypatch.setattr(voices.subprocess, "run", run)
    speak = voices.speaker("rhvoice")
    spoken = [speak("hello", random.Random(number)) for number in range(20)]
    assert {speech.voice for speech in spoken} == {f"rhvoice-{voice}" for voice in voices.RHVOICES}
    assert {(len(speech.samples), speech.rate) for speech in spoken} == {(240, 24000)}
    assert len({tuple(command[1:-1]) for command in commands}) > 15


def test_words_are_brief_and_cover_letters_and_numbers():
    class Source(texts.Sources):
        def games(self):
            return ["the lamp is on the table"] * texts.MIN_COUNT

        def wordnet(self):
            return ["rare"]

    words = texts.Words(Source(debian=Path()))
    assert words.frequent == ["lamp", "table", "the"]
    rng = random.Random(1)
    spoken = [normalize(words.draw(rng)) for _ in range(4000)]
    assert sum(len(text.split()) for text in spoken) / len(spoken) < 2
    assert {*string.ascii_uppercase, "SEVEN", "THIRTEENTH", "NOVEMBER", "O'CLOCK", "LAMP"} <= {*spoken}
    assert {"SIXTIETH", "THOUSANDTH", "SEMICOLON", "OPEN BRACKET"} <= {*spoken}


def test_what_a_pack_says_hangs_on_its_name(monkeypatch, tmp_path):
    folder = tmp_path / "usr/share/wordnet"
    folder.mkdir(parents=True)
    lines = ('| a path along which something may pass; "the way"', "| genus Rosa", "| 3 of them", "| being alone")
    for part in ("noun", "verb", "adj", "adv"):
        (folder / f"data.{part}").write_text("\n".join(lines) + "\n| in an odd manner\n")
    said, spoken_by = [], []

    def speaker(voice):
        spoken_by.append(voice)
        tone = np.sin(np.arange(2 * corpus.SAMPLE_RATE)).astype(np.float32)
        return lambda text, _rng: said.append(text) or voices.Speech(tone, corpus.SAMPLE_RATE)

    monkeypatch.setattr(synthesize, "speaker", speaker)
    monkeypatch.setitem(synthesize.HOURS, "someone-definitions", 20 / 3600)
    synthesize.speak_hours("someone-definitions", texts.Sources(debian=tmp_path), tmp_path, float("inf"))
    assert spoken_by == ["someone"]
    assert {*said} == {"a path along which something may pass", "in an odd manner"}
    with corpus.Pack(tmp_path / "someone-definitions", corpus.SPEECH) as pack:
        assert {item.text for item in pack.utterances} == {normalize(text) for text in said}


def test_lines_in_capitals_are_spoken_not_spelled():
    assert texts.without_capitals("I'M SURE I SAW IT.") == "I'm sure I saw it."
    assert texts.without_capitals("Hand ME that wrench, Joe.") == "Hand me that wrench, Joe."


def test_single_letters_are_plausible_speech():
    second = corpus.SAMPLE_RATE
    assert synthesize.plausible(np.zeros(second), "A")
    assert not synthesize.plausible(np.zeros(4 * second), "A")
    assert not synthesize.plausible(np.zeros(second), "A SENTENCE THAT NOBODY COULD SAY IN A SECOND")
