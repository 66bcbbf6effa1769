"""docs/embedding.md: its code runs, in order, on the bundled model, and what it says of errors and the rest holds."""

import ast
import builtins
import hashlib
import itertools
import re
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

import u2moe.runtime
from u2moe.runtime import (
    AudioError,
    DecodingOptions,
    EndpointRule,
    Microphone,
    Model,
    Recognizer,
    Transcriber,
    VoiceActivityDetector,
)
from u2moe.runtime import transcriber as transcriber_module
from u2moe.runtime.decoding.vad import Speech
from u2moe.runtime.model import native
from u2moe.runtime.recognizer import DEMO_FOLDER
from u2moe.runtime.text.word_errors import read_manifest, words

pytestmark = pytest.mark.slow

RATE = 16_000
GUIDE = Path(__file__).parents[1] / "docs" / "embedding.md"
TEXT = GUIDE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
ROWS = re.findall(r"^\| (.+?) \| `(\w+Error)` \|$", TEXT, re.MULTILINE)


@pytest.fixture(scope="module")
def clip():
    """A recording of a person, and what is said in it."""
    recording = read_manifest(DEMO_FOLDER / "clips" / "transcripts.txt")[0]
    samples, rate = soundfile.read(recording.path, dtype="float32")
    assert rate == RATE
    return samples, recording.transcript


@pytest.fixture(scope="module")
def demo():
    return Recognizer.from_pretrained()


class AllSpeech:
    """In the place of the detector, whose network may not be installed: for it everything is speech."""

    sample_rate = RATE

    def __init__(self, options=None):
        self.options = options

    def speech(self, blocks):
        yield Speech(start=0, samples=np.concatenate(list(blocks)), begins=True, ends=True)


@pytest.fixture
def names(clip, tmp_path, monkeypatch, sounddevice):
    """What the code of the guide finds in its surroundings."""
    samples, _ = clip
    soundfile.write(tmp_path / "talk.wav", np.stack([samples, samples], axis=1), RATE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(u2moe.runtime, "VoiceActivityDetector", AllSpeech)
    return {"blocks": np.array_split(samples, 40), "wait_for_the_user": lambda: sounddevice.play(samples)}


def test_the_code_runs_in_order_and_says_what_was_said(names, clip, capsys):
    _, transcript = clip
    printed = []
    for block in BLOCKS:
        exec(block, names)
        printed.append(capsys.readouterr().out)
    assert len(BLOCKS) == 12
    one_shot, by_segment, captions, microphone = printed[0], printed[1], printed[9], printed[10]
    text = names["recognizer"].transcribe("talk.wav").text
    assert text in one_shot
    assert [line.split(" ", 1)[1] for line in by_segment.splitlines()] == [
        segment.text for segment in names["recognizer"].segments("talk.wav")
    ]
    assert "None" not in one_shot  # every confidence and both scores are there
    heard = set(words(text)) & set(words(transcript))
    assert heard
    assert Path("talk.srt").read_text(encoding="utf-8").startswith("1\n00:00:0")
    assert names["vad"].options.min_silence == 0.8
    assert names["result"].is_final
    assert heard & set(words(names["result"].text))
    segments = names["segments"]
    assert [segment.segment for segment in segments] == list(range(len(segments)))
    said = [segment.text for segment in segments]
    assert said
    assert names["texts"] == [said] * 8
    assert [segment.text for segment in names["finals"]]
    assert captions.splitlines()[-1].startswith("final ")
    assert any(line.startswith("partial ") for line in captions.splitlines())
    assert (names["microphone"].num_overflows, names["microphone"].lost_s) == (0, 0.0)
    assert "is_final=True" in microphone


def test_its_names_are_public():
    imported = {
        alias.name
        for block in BLOCKS
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom) and node.module == "u2moe.runtime"
        for alias in node.names
    }
    assert {"Recognizer", "Transcriber", "Microphone"} <= imported <= set(u2moe.runtime.__all__)
    # What stands between backticks and looks like a class of ours is one.
    classes = set(re.findall(r"`([A-Z]\w+(?:Error|Options|Config|Rule))`", TEXT)) - {"ValueError", "TypeError"}
    assert classes <= set(u2moe.runtime.__all__)


def test_what_it_says_of_partial_and_final_results(demo, clip):
    """Splits change nothing; partial results may change, segments come once; reset makes a stream ready again."""
    samples, _ = clip
    found = []
    stream = demo.create_stream(DecodingOptions(chunk_size=16, num_left_chunks=4))
    for num in (1, 7, 300):
        for block in np.array_split(samples, num):
            stream.accept_waveform(RATE, block)
            demo.decode_streams([stream])
            assert not stream.get_result().is_final
        stream.input_finished()
        demo.decode_streams([stream])
        found.append(stream.get_result())
        stream.reset()
    assert found[0].text
    assert found[0].is_final
    assert found[1] == found[2] == found[0]


def test_hotwords_that_are_not_said_change_nothing(demo, clip):
    samples, _ = clip
    plain = demo.transcribe(samples)
    assert demo.transcribe(samples, hotwords=["xylophone quartet"]) == plain
    with pytest.raises(ValueError, match="hotwords need a prefix beam search"):
        demo.transcribe(samples, options=DecodingOptions(search="ctc_greedy"), hotwords=["xylophone"])


def test_results_are_equal_to_the_last_bit_in_any_thread(demo, clip):
    samples, _ = clip
    expected, found = demo.transcribe(samples), []
    threads = [threading.Thread(target=lambda: found.append(demo.transcribe(samples))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 3


def test_after_an_audio_error_the_stream_goes_on_as_if_it_had_not_been_called(demo, clip):
    samples, _ = clip
    expected = None
    for errs in (False, True):
        stream = demo.create_stream()
        for number, block in enumerate(np.array_split(samples, 5)):
            if errs and number:
                for rate, bad in ((RATE, block * np.nan), (RATE, block[None]), (8000, block), (RATE, np.arange(9))):
                    with pytest.raises(AudioError):
                        stream.accept_waveform(rate, bad)
            stream.accept_waveform(RATE, block)
        stream.input_finished()
        demo.decode_streams([stream])
        expected = expected or stream.get_result()
    assert stream.get_result() == expected


def test_numbers_in_the_text_are_those_of_the_code():
    assert f"up to {transcriber_module._MAX_KEPT} final ones wait" in TEXT
    assert f"go through the encoder together, {u2moe.runtime.decoding.pipeline.MAX_BATCH} at a time" in TEXT
    assert f"weight {u2moe.runtime.decoding.context.DEFAULT_WEIGHT} or its own" in TEXT
    assert "`num_threads=1`, the default" in TEXT
    assert u2moe.runtime.model.settings.SessionSettings().session_options().intra_op_num_threads == 1


# The table of errors: a function that does what each row says.


class Case:
    """What a row needs."""

    def __init__(self, demo, bundle, model, folder, clip, monkeypatch, sounddevice):
        self.demo, self.bundle, self.model = demo, bundle, model
        self.folder, self.clip = folder, clip
        self.monkeypatch, self.sounddevice = monkeypatch, sounddevice

    def copy_of_demo(self):
        files = shutil.ignore_patterns("clips", "*.py", "__pycache__")
        return Path(shutil.copytree(DEMO_FOLDER, self.folder / "copy", ignore=files))

    def fed(self, samples, rate=RATE):
        stream = self.demo.create_stream()
        stream.accept_waveform(RATE, self.clip[:100])
        stream.accept_waveform(rate, samples)

    def breaks(self):
        """A recogniser whose provider fails as onnxruntime fails: with an error of its own."""
        recognizer = Recognizer(self.bundle, self.model)
        session = recognizer.model.encoder.session
        whole = session._session

        class Broken:
            def get_providers(self):
                return whole.get_providers()

            def run(self, output_names, feeds, *_):
                return whole.run(output_names, {**feeds, "chunk": feeds["chunk"][:, :, :3]})

        self.monkeypatch.setattr(session, "_session", Broken())
        stream = recognizer.create_stream()
        stream.accept_waveform(RATE, self.clip)
        return recognizer, stream


def damaged_file(case):
    (case.folder / "damaged.wav").write_text("this is no audio")
    case.demo.transcribe(case.folder / "damaged.wav")


def full_queue(case):
    held, go_on = threading.Event(), threading.Event()

    def on_error(_):
        held.set()
        go_on.wait(60)

    with Transcriber(case.demo, on_error=on_error, max_queue_s=0.5) as transcriber:
        transcriber.report(AudioError("wait here"))
        held.wait(60)
        try:
            transcriber.feed(case.clip[: RATE // 2])
            transcriber.feed(case.clip[:100])
        finally:
            go_on.set()


def no_device(case):
    case.sounddevice.devices.clear()
    with Transcriber(case.demo) as transcriber:
        Microphone(transcriber)


def without_media(case):
    case.monkeypatch.setitem(sys.modules, "av", None)
    (case.folder / "talk.m4a").write_bytes(b"\0\0\0\x18ftypM4A ")
    case.demo.transcribe(case.folder / "talk.m4a")


def no_sounddevice(case):
    case.monkeypatch.setitem(sys.modules, "sounddevice", None)
    with Transcriber(case.demo) as transcriber:
        Microphone(transcriber)


def no_vad(case):
    case.monkeypatch.setitem(sys.modules, "silero_vad", None)
    VoiceActivityDetector()


def fed_after_end(case):
    stream = case.demo.create_stream()
    stream.input_finished()
    stream.accept_waveform(RATE, case.clip)


def finished_twice(case):
    transcriber = Transcriber(case.demo)
    transcriber.close()
    transcriber.input_finished()


def decoded_twice(case):
    stream = case.demo.create_stream()
    with stream.source.claim():
        case.demo.decode_streams([stream])


def rescored_without_decoder(case):
    model = Model(case.bundle.manifest, case.model.encoder.session, case.model._ctc, None)
    Recognizer(case.bundle, model, DecodingOptions(search="attention_rescoring"))


def incomplete_bundle(case):
    folder = case.copy_of_demo()
    (folder / "ctc.onnx").unlink()
    Recognizer.from_pretrained(folder)


def changed_file(case):
    file = case.copy_of_demo() / "tokens.txt"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"E", b"F", 1))
    assert hashlib.sha256(file.read_bytes()).digest() != hashlib.sha256(content).digest()
    Recognizer.from_pretrained(file.parent)


def provider_fails(case):
    recognizer, stream = case.breaks()
    recognizer.decode_streams([stream])


def computes_nan(case):
    run = case.model._ctc.run
    case.monkeypatch.setattr(case.model._ctc, "run", lambda feeds: {"log_probs": run(feeds)["log_probs"] * np.nan})
    Recognizer(case.bundle, case.model).transcribe(case.clip)


def has_no_native_kernels(case):
    case.monkeypatch.setitem(sys.modules, "u2moe_kernels", None)
    native.installed_kernels.cache_clear()
    try:
        Recognizer.from_pretrained(kernels="native")
    finally:
        native.installed_kernels.cache_clear()


def provider_has_failed(case):
    recognizer, stream = case.breaks()
    with pytest.raises(u2moe.runtime.ProviderError):
        recognizer.decode_streams([stream])
    stream.accept_waveform(RATE, case.clip)


PROVOKED = {
    "a file that is missing, not audio, or damaged from the start": [
        lambda case: case.demo.transcribe(case.folder / "missing.wav"), damaged_file,
    ],
    "samples with NaN or infinity": [
        lambda case: case.fed(np.full(9, np.nan)), lambda case: case.demo.transcribe(np.full(9, np.inf)),
    ],
    "samples of several channels, of other integers than int16, or far outside [-1, 1]": [
        lambda case: case.fed(np.zeros((9, 2))), lambda case: case.fed(np.zeros(9, np.int32)),
        lambda case: case.fed(np.full(9, 3000.0)),
    ],
    "a media file, without the extra `[media]`; no such track": [without_media],
    "a sample rate that is impossible, or changes within a stream": [
        lambda case: case.demo.transcribe(np.zeros(9), sample_rate=0), lambda case: case.fed(np.zeros(9), 8000),
    ],
    "more audio than the queue of a transcriber holds": [full_queue],
    "sounddevice is not installed, or there is no such device": [no_sounddevice, no_device],
    "silero-vad is not installed, or the file is another network": [
        no_vad, lambda case: VoiceActivityDetector(DEMO_FOLDER / "ctc.onnx"),
    ],
    "a stream or transcriber fed or finished after its end": [fed_after_end, finished_twice],
    "a stream decoded by two threads at once": [decoded_twice],
    "rescoring with a bundle that has no decoder": [rescored_without_decoder],
    "a folder that is not a bundle, or is incomplete": [
        lambda case: Recognizer.from_pretrained(case.folder), incomplete_bundle,
    ],
    "a file of a bundle that was changed": [changed_file],
    "a provider that is not installed": [
        lambda case: Recognizer.from_pretrained(providers=["RocketExecutionProvider"]),
    ],
    '`kernels="native"` where u2moe-kernels is not installed or cannot run': [has_no_native_kernels],
    "a provider that fails while it runs": [provider_fails],
    "a graph that returns NaN, because its weights are damaged": [computes_nan],
    "a stream whose provider has failed, until it is reset": [provider_has_failed],
    "options of another type, or out of range": [
        lambda case: DecodingOptions(beam_size=0), lambda case: EndpointRule(min_utterance_length=-1),
    ],
    "hotwords that the vocabulary cannot write": [
        lambda case: case.demo.create_stream(hotwords=["\u2603"]), lambda case: case.demo.create_stream(hotwords=[" "]),
    ],
}  # fmt: skip


def test_every_row_of_the_table_is_provoked():
    assert [what for what, _ in ROWS] == list(PROVOKED)


@pytest.mark.parametrize(("what", "error"), ROWS)
def test_errors_are_those_of_the_table(what, error, demo, bundle, tmp_path, clip, monkeypatch, sounddevice):
    expected = getattr(u2moe.runtime, error, None) or getattr(builtins, error)
    for provoke in PROVOKED[what]:
        with monkeypatch.context() as patched:
            case = Case(demo, bundle, bundle.load(), tmp_path, clip[0], patched, sounddevice)
            with pytest.raises(expected) as caught:
                provoke(case)
        assert type(caught.value) is expected, what
        assert str(caught.value)


def test_after_reset_a_stream_whose_provider_failed_works(demo, bundle, clip, monkeypatch, tmp_path, sounddevice):
    with monkeypatch.context() as patched:
        recognizer, stream = Case(demo, bundle, bundle.load(), tmp_path, clip[0], patched, sounddevice).breaks()
        with pytest.raises(u2moe.runtime.ProviderError):
            recognizer.decode_streams([stream])
    stream.reset()
    stream.accept_waveform(RATE, clip[0])
    stream.input_finished()
    recognizer.decode_streams([stream])
    assert stream.get_result().is_final


def test_events_of_a_transcriber_are_those_of_its_text(demo, clip):
    """Segments come once and in order, partial results where the text has changed; errors of callbacks are told."""
    samples, _ = clip
    partial, finals, errors = [], [], []

    def on_final(result):
        finals.append(result)
        raise KeyError("the app's own")

    with Transcriber(demo, on_partial=partial.append, on_final=on_final, on_error=errors.append) as transcriber:
        for block in np.array_split(np.tile(np.concatenate([samples, np.zeros(3 * RATE, np.float32)]), 2), 60):
            while transcriber.queued_s > 5:
                threading.Event().wait(0.01)
            transcriber.feed(block)
    assert [result.segment for result in finals] == list(range(len(finals)))
    assert len(finals) >= 2
    texts = [(result.segment, result.text) for result in partial]
    assert all(one != other for one, other in itertools.pairwise(texts))
    assert [type(error) for error in errors] == [KeyError] * len(finals)
