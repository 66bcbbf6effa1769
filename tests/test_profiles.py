import json
import shutil
from importlib.util import find_spec

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import soundfile
from manifests import adjusted

from u2moe.export.profiles import conversion
from u2moe.export.profiles.conversion import convert_bundle, session_of
from u2moe.export.profiles.graphs import detokenizer_graph, samples_per_frame, window_samples
from u2moe.export.random_checkpoint import random_config, write_random_checkpoint
from u2moe.runtime import Bundle, DecodingOptions, ctc_prefix_beam_search
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.cli import main
from u2moe.runtime.errors import BundleError, UnsupportedError
from u2moe.runtime.recognizer import Recognizer
from u2moe.runtime.text.vocabulary import Vocabulary

CLIPS = [DEMO_FOLDER / "clips" / f"{name}.flac" for name in ("command", "question")]
GREEDY = DecodingOptions(search="ctc_greedy")
needs_extensions = pytest.mark.skipif(
    find_spec("onnxruntime_extensions") is None, reason="needs onnxruntime-extensions: pip install 'u2moe[clip]'"
)


@pytest.fixture(scope="module")
def demo():
    return Recognizer.load()


def converted(profile, folder, **settings):
    path = convert_bundle(DEMO_FOLDER, folder, profile, ort=True).path
    return [session_of(path / f"{profile}.{suffix}", **settings) for suffix in ("onnx", "ort")]


def streamed(run, manifest, samples, chunk_size=16, left=4):
    """Return log-probabilities of a stream, as a program in any language would compute them."""
    step = samples_per_frame(manifest)
    caches = {cache.name: np.zeros((cache.num_blocks, 1, *cache.shape), np.float32) for cache in manifest.model.caches}
    state = {"offset": np.zeros(1, np.int64), **caches}
    shortest, parts = window_samples(manifest, manifest.model.window), []
    for begin in range(0, len(samples) - shortest + 1, chunk_size * step):
        window = samples[begin : begin + (chunk_size - 1) * step + shortest]
        found = run({"samples": window[None], "required_cache_size": np.array(chunk_size * left), **state})
        state = {"offset": found["next_offset"], **{name: found[f"r_{name}"] for name in caches}}
        parts.append(found["log_probs"][0])
    return np.concatenate(parts)


@pytest.mark.slow
def test_clips_as_streams_and_as_recordings(demo, tmp_path):
    streams, recordings = (converted(profile, tmp_path / profile) for profile in ("streaming", "offline"))
    bundle, manifest = demo.bundle, demo.bundle.manifest
    search = {"search": "ctc_prefix_beam", "beam_size": 10, "language_model": "none"}
    options = DecodingOptions(chunk_size=16, num_left_chunks=4, **search)
    samples, _ = soundfile.read(CLIPS[0], dtype="float32")
    expected = demo.transcribe(CLIPS[0], options=options).text
    for run in streams:
        best = ctc_prefix_beam_search(streamed(run, manifest, samples), 10)[0]
        assert bundle.vocabulary.text(best.tokens) == expected
    samples, _ = soundfile.read(CLIPS[1], dtype="float32")
    expected = demo.transcribe(CLIPS[1], options=GREEDY)
    for run in recordings:
        found = run({"samples": samples[None]})
        assert bundle.vocabulary.text(found["tokens"]) == expected.text
        moved = np.abs(found["times"] - expected.segments[0].times)
        # a token begins one frame earlier or later if it and the blank are equally likely: roundings of int8 decide
        assert moved.max() < samples_per_frame(manifest) / manifest.features.sample_rate + 1e-3
        assert np.count_nonzero(moved > 1e-3) <= 1


@pytest.mark.slow
def test_recordings_have_the_padding_of_the_bundle(bundle, model, sound, tmp_path):
    """Padding is added only where they begin or end within a sound; times are those of the original recording."""
    adjusted(bundle, bundle.path, tmp_path / "bundle")
    padded = Bundle.open(tmp_path / "bundle")
    assert padded.manifest.decoding.padding_s > 0
    run = session_of(convert_bundle(padded.path, tmp_path / "out", "offline").path / "offline.onnx")
    recognizer = Recognizer(padded, model, DecodingOptions(search="ctc_greedy", chunk_size=None))
    quiet = np.zeros(8000, np.float32)
    frames = set()
    for samples in (sound, np.append(quiet, sound), np.append(sound, quiet), sound[:500], sound[:1]):
        found = run({"samples": samples[None]})
        expected = recognizer.transcribe(samples, 16_000).segments
        assert found["tokens"].tolist() == [token for each in expected for token in each.tokens]
        assert np.allclose(found["times"], [time for each in expected for time in each.times], atol=1e-3)
        frames.add(found["log_probs"].shape[1])
    assert len(frames) > 3


@pytest.mark.slow
@needs_extensions
def test_clips_as_files(demo, tmp_path):
    runs = converted("clip", tmp_path / "out", extensions=True)

    def texts(content):
        return [run({"audio": np.frombuffer(content, np.uint8)[None]})["text"].tolist() for run in runs]

    for clip in CLIPS:
        samples, rate = soundfile.read(clip, dtype="float32")
        stereo = np.stack([samples, samples], axis=1)
        for name in ("a.wav", "b.flac"):
            soundfile.write(tmp_path / name, stereo, rate)
            expected = demo.transcribe(tmp_path / name, options=GREEDY).text
            assert texts((tmp_path / name).read_bytes()) == [[expected]] * 2
    # AudioDecoder keeps the silence that MP3 encoders add in front, which libsndfile removes: words may differ.
    soundfile.write(tmp_path / "c.mp3", stereo, rate)
    content = (tmp_path / "c.mp3").read_bytes()
    assert texts(content) == texts(b"ID3\x03\x00\x00\x00\x00\x00\x0a" + bytes(10) + content)
    assert [""] not in texts(content)


@needs_extensions
def test_the_detokenizer_gives_the_text_of_the_vocabulary(bundle):
    spaces = [chr(code) for code in range(0x3001) if chr(code).isspace() and chr(code) != "\n"]
    symbols = ["<blank>", "<unk>", "▁", "▁A", "B", "$1", "\\1", "^ ", " $", "中", "é", "a\u0301", "😀", "▁▁", *spaces]
    odd, vocabulary = Bundle(bundle.path, bundle.manifest, symbols), Vocabulary(symbols, bundle.manifest.text)
    run = session_of(ir.to_proto(detokenizer_graph(odd)).SerializeToString(), extensions=True)
    random = np.random.default_rng(0)
    for length in (*range(6), *[9] * 40):
        tokens = random.integers(0, len(symbols), length)
        assert run({"tokens": tokens})["text"].tolist() == [vocabulary.text(tokens)]


@pytest.mark.slow
@needs_extensions
@pytest.mark.parametrize(("profile", "operator", "scope", "other", "message"), [
    ("streaming", "Log", "", "Sqrt", "log_probs: largest difference"),
    ("offline", "ArgMax", "greedy", "ArgMin", "tokens: "),
    ("clip", "ArgMax", "greedy", "ArgMin", "tokens: "),
    ("clip", "GreaterOrEqual", "decoder", "Less", "REFUSED: the clip must be shorter"),
])  # fmt: skip
def test_a_wrong_graph_of_each_profile_is_not_written(
    small_bundle, tmp_path, monkeypatch, profile, operator, scope, other, message
):
    original = conversion.profile_graph

    def changed(opened, name):
        model = original(opened, name)
        next(node for node in model.graph if node.op_type == operator and scope in str(node.name)).op_type = other
        return model

    monkeypatch.setattr(conversion, "profile_graph", changed)
    with pytest.raises(Exception, match=message):  # of ours or of onnxruntime
        convert_bundle(small_bundle.path, tmp_path / "out", profile)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_graphs_of_networks_of_any_kind(small_bundle, export_quickly, tmp_path):
    def exported(name, **arguments):
        write_random_checkpoint(tmp_path / f"{name}-checkpoint", random_config(**arguments), seed=1)
        return export_quickly(tmp_path / f"{name}-checkpoint", tmp_path / name)

    assert convert_bundle(small_bundle.path, tmp_path / "1", "streaming", ort=True).report.worst.difference < 1e-4
    assert convert_bundle(small_bundle.path, tmp_path / "2", "offline").report.worst.difference < 1e-4
    plain = exported("plain", encoder="transformer")
    assert convert_bundle(plain, tmp_path / "3", "streaming").files == ("decoder.onnx", "streaming.onnx", "tokens.txt")
    ahead = exported("ahead", encoder_conf={"causal": False, "cnn_module_kernel": 7})
    convert_bundle(ahead, tmp_path / "4", "offline")
    chunks = exported("chunks", encoder_conf={"static_chunk_size": 4, "use_dynamic_chunk": False})
    for source, profile, message in (
        (ahead, "streaming", "trained for full context: use --profile offline"),
        (chunks, "offline", "static_chunk_size is 4, so this encoder was trained only with chunks"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            convert_bundle(source, tmp_path / "5", profile)
        assert not (tmp_path / "5").exists()


@pytest.mark.slow
def test_a_bundle_in_ort_format_needs_no_native_kernels(ort_bundle, quantized, tmp_path):
    files = json.loads((ort_bundle / "bundle.json").read_text(encoding="utf-8"))["files"]
    names = {"encoder.ort", "ctc.ort", "decoder.ort", "features.ort", "tokens.txt", "required_operators.config"}
    assert set(files) == names
    assert {file.name for file in ort_bundle.iterdir()} == names | {"bundle.json"}
    assert (ort_bundle / "required_operators.config").read_text(encoding="utf-8").startswith("ai.onnx;")
    assert onnxruntime.InferenceSession(ort_bundle / "ctc.ort").get_inputs()[0].name == "encoder_out"
    with pytest.raises(BundleError, match=r"'encoder\.onnx' is not listed"):
        Bundle.open(ort_bundle)
    for file in sorted(convert_bundle(quantized("int8").path, tmp_path / "ort", "ort").path.glob("*.ort")):
        onnxruntime.InferenceSession(file)  # like programs that do not know the functions


def test_targets_names_and_commands(bundle, tmp_path, capsys):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("")
    shutil.copytree(bundle.path, tmp_path / "other")
    for error, message, out, profile in (
        (ValueError, "profile must be one of streaming, offline, clip, ort, got 'other'", tmp_path / "out", "other"),
        (UnsupportedError, "cannot convert a bundle in place", bundle.path, "offline"),
        (BundleError, r"contains no tokens\.txt", tmp_path / "precious", "offline"),
        (BundleError, "is a bundle, and only a bundle may replace it", tmp_path / "other", "offline"),
    ):
        with pytest.raises(error, match=message):
            convert_bundle(bundle.path, out, profile, overwrite=True)
    command = ["convert", str(bundle.path), str(tmp_path / "1"), "--profile"]
    for options, message in (
        (["streaming", "--chunk-size", "8"], "--chunk-size and --num-left-chunks require --profile sherpa-onnx"),
        (["sherpa-onnx", "--ort"], "--ort does not apply to --profile sherpa-onnx"),
        (["static", "--ort"], "--ort does not apply to --profile static"),
        (["offline", "--qdq", "a.wav"], "--calibration and --qdq require --profile static"),
    ):
        assert main([*command, *options]) == 1
        assert message in capsys.readouterr().err
    assert main([*command, "offline"]) == 0
    assert f"wrote {tmp_path / '1'}: offline.onnx, tokens.txt" in capsys.readouterr().out
