"""Graphs for sherpa-onnx: equal to torch and to our streaming, refused by name, and loaded by the real wheel. The wheel
runs in a separate process, because it ends the process if it rejects a file."""

import contextlib
import dataclasses
import itertools
from pathlib import Path

import kaldi_native_fbank
import numpy as np
import onnxruntime
import pytest
from manifests import with_decoding

from u2moe.benchmarks.studies.shared.programs import engine, write_wav
from u2moe.export import SherpaOptions, export_sherpa, sherpa
from u2moe.export.checkpoint import Checkpoint
from u2moe.export.comparison import LIMIT, parity_features
from u2moe.export.exporter import bundle_manifest
from u2moe.export.random_checkpoint import random_config, write_random_checkpoint
from u2moe.export.sherpa import OFFLINE, ONLINE, OnlineClient, offline_graph, online_graph, supported_graphs
from u2moe.runtime import Bundle, BundleError, ParityError, UnsupportedError, ctc_greedy_search
from u2moe.runtime.cli import main
from u2moe.runtime.graph.file import save_graph
from u2moe.runtime.model.encoder import Windows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def written(exported, tmp_path_factory):
    return export_sherpa(exported("moe_tiny"), tmp_path_factory.mktemp("sherpa") / "moe")


def session(folder, graph=ONLINE):
    return onnxruntime.InferenceSession(folder / graph.file)


def sherpa_features(samples):
    """Return the features of sherpa-onnx's WeNet clients, without the noise that the offline one adds."""
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0.0
    options.frame_opts.snip_edges = False
    options.mel_opts.num_bins = 80
    options.mel_opts.high_freq = -400.0
    options.energy_floor = 0.0
    fbank = kaldi_native_fbank.OnlineFbank(options)
    fbank.accept_waveform(16000, samples * np.float32(32768))
    fbank.input_finished()
    return np.stack([fbank.get_frame(index) for index in range(fbank.num_frames_ready)])


def rounded(samples):
    """Round as a 16-bit WAV file does."""
    return (np.clip(np.round(samples * 32768), -32768, 32767) / 32768).astype(np.float32)


@pytest.mark.parametrize("source", ["moe_tiny", "transformer"])
def test_the_wheel_finds_our_text(source, written, exported, export_quickly, sound, tmp_path):
    """Also with marks of words, and a network without convolution and with absolute positions."""
    folder, found, options = exported("moe_tiny"), written, written.options
    if source == "transformer":
        config = random_config(encoder="transformer", changes={"tokenizer": "bpe"})
        write_random_checkpoint(tmp_path / "checkpoint", config, seed=1)
        folder = export_quickly(tmp_path / "checkpoint", tmp_path / "bundle")
        options = SherpaOptions(chunk_size=8, num_left_chunks=2)
        found = export_sherpa(folder, tmp_path / "exported", options)
    bundle, client = Bundle.open(folder), OnlineClient(session(found.path), options)
    assert source != "transformer" or client.cnn.shape == (2, 1, 32, 0)
    model, sound = bundle.load(), rounded(sound)

    def compare(heard, frame_s, encoded):
        ours = ctc_greedy_search(model.ctc(encoded), model.config.blank)
        assert len(ours.tokens) > 1
        assert (" " in "".join(heard["tokens"])) == (source == "transformer")
        assert heard["tokens"] == [bundle.tokens[token].replace("\u2581", " ") for token in ours.tokens]
        assert [round(time / frame_s) for time in heard["timestamps"]] == list(ours.times)
        assert heard["text"].split() == bundle.vocabulary.text(ours.tokens).split()

    def heard(name, graph, samples, **settings):
        own = {"model": str(found.path / graph.file), "tokens": str(found.path / "tokens.txt"), **settings}
        ((line,), _) = engine(name, own).run([write_wav(tmp_path / "a.wav", samples, 16000)])
        return line

    padded = np.append(sound, np.zeros(19_200, np.float32))  # sherpa-onnx drops an incomplete chunk
    chunks = {"chunk_size": options.chunk_size, "num_left_chunks": options.num_left_chunks}
    # whole chunks, each after one more frame than it needs
    features = sherpa_features(padded)
    num_chunks = len(range(0, len(features) - client.length, client.stride))
    frames = features[: (num_chunks - 1) * client.stride + client.length]
    compare(heard("sherpa-online", ONLINE, padded, num_threads=1, **chunks), 0.04, model.encode(frames, **chunks))
    frame_s, whole = 0.01 * model.config.subsampling_rate, model.encode(sherpa_features(sound))
    compare(heard("sherpa-offline", OFFLINE, sound), frame_s, whole)


def test_a_long_stream_goes_on_as_ours_does(export_quickly, golden_checkpoint, tmp_path):
    """Positions wrap around several times, where published exports end."""
    short = Bundle.open(export_quickly(golden_checkpoint("moe_tiny"), tmp_path / "bundle", max_position=60))
    model = short.load()
    options = SherpaOptions(chunk_size=8, num_left_chunks=3)
    graph = online_graph(short, options)
    save_graph(graph, tmp_path / f"{graph.graph.name}.onnx")
    client = OnlineClient(session(tmp_path), options)
    features = np.concatenate([parity_features(short.manifest, 14)] * 2)
    encoder, windows = model.encoder, Windows(model.config, 8)
    windows.accept(features)
    expected, offsets, caches = [], [], encoder.start()
    while (window := windows.take()) is not None:
        output, caches = encoder.step(window[None], caches, required_cache_size=24)
        offsets.append(int(caches.offset[0]))
        expected.append(model.ctc(output[0]))
    assert sum(after < before for before, after in itertools.pairwise(offsets)) > 5
    np.testing.assert_allclose(np.concatenate(client.run(features)), np.concatenate(expected), rtol=0, atol=LIMIT)


def test_any_chunks_may_be_asked_of_the_graph_and_what_the_wheel_dislikes_is_told(written, bundle, model, tmp_path):
    """The client receives its chunk size separately; a graph of a fixed size would end its process."""
    features = parity_features(bundle.manifest, 8)
    for chunk_size, left in ((4, 1), (16, 4), (25, 2)):
        client = OnlineClient(session(written.path), SherpaOptions(chunk_size=chunk_size, num_left_chunks=left))
        found = np.concatenate(client.run(features))
        expected = model.ctc(model.encode(features, chunk_size, left))[: len(found)]
        np.testing.assert_allclose(found, expected, rtol=0, atol=LIMIT)
    (tmp_path / "tokens.txt").write_text("<nothing> 0\n")
    options = {"model": str(written.path / ONLINE.file), "tokens": str(tmp_path / "tokens.txt")}
    with pytest.raises(RuntimeError, match="failed: "):
        engine("sherpa-online", options).run([])


def test_metadata_and_usage_are_what_the_client_reads(written):
    read = session(written.path).get_modelmeta().custom_metadata_map
    wanted = {
        "model_type": "wenet_ctc", "version": "1", "head": "4", "num_blocks": "3", "output_size": "64",
        "cnn_module_kernel": "8", "right_context": "6", "subsampling_factor": "4", "vocab_size": "60",
        "chunk_size": "16", "left_chunks": "4",
    }  # fmt: skip
    assert wanted.items() <= read.items()
    read = session(written.path, OFFLINE).get_modelmeta().custom_metadata_map
    wanted = {"model_type": "wenet_ctc", "vocab_size": "60", "subsampling_factor": "4"}
    assert wanted.items() <= read.items()
    assert "stream.accept_waveform(16000, numpy.zeros(16000 * 66 // 100, numpy.float32))" in written.usage()
    assert "multiply" not in written.usage()
    slower = dataclasses.replace(written.manifest.model, subsampling_rate=6)
    manifest = dataclasses.replace(written.manifest, model=slower)
    assert "multiply its timestamps by 1.5" in dataclasses.replace(written, manifest=manifest).usage()
    assert "does not use" not in written.usage()
    manifest = with_decoding(written.manifest, beam_size=4, hotwords=("A",))
    assert "search does not use: beam_size, hotwords" in dataclasses.replace(written, manifest=manifest).usage()


def test_a_quantized_bundle_gives_its_own_texts_and_offline_graphs_keep_no_caches(bundle, quantized, sound, tmp_path):
    values = {value.name for node in offline_graph(bundle).graph for value in node.outputs}
    assert "log_probs" in values
    assert not {"r_att_cache", "r_cnn_cache"} & values
    found = export_sherpa(quantized("int8").path, tmp_path / "out")
    assert [item.difference for item in found.report.comparisons] == [0.0, 0.0, 0.0]
    assert (found.path / ONLINE.file).stat().st_size < (bundle.path / "encoder.onnx").stat().st_size
    options = {"model": str(found.path / ONLINE.file), "tokens": str(found.path / "tokens.txt"), "num_threads": 1}
    (heard,) = engine("sherpa-online", options).run([write_wav(tmp_path / "sound.wav", rounded(sound), 16000)])[0]
    assert heard["tokens"]  # the wheel's own onnxruntime rounds some activations differently


def test_a_changed_graph_is_not_written(small_bundle, tmp_path, monkeypatch):
    def forgetful(part, options):
        graph = online_graph(part, options)
        squeeze = next(node for node in graph.graph if node.name == "sherpa/Squeeze")
        squeeze.replace_input_with(0, graph.graph.initializers["const_int64[1]_0"])
        return graph

    monkeypatch.setattr(sherpa, "online_graph", forgetful)
    with pytest.raises(ParityError, match="online, from the start: log_probs: largest difference"):
        export_sherpa(small_bundle.path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


STATIC = {"encoder_conf": {"static_chunk_size": 4, "use_dynamic_chunk": False}}
WIDE = {"conv_inner_factor": 4}
CAUSAL = {"encoder_conf": {"causal": False, "cnn_module_kernel": 7}}
FRAMES = {
    "fbank_conf": {"num_mel_bins": 80, "frame_length": 20, "frame_shift": 10},
    "resample_conf": {"resample_rate": 16000},
}
MFCC = {"feats_type": "mfcc", "mfcc_conf": {"num_mel_bins": 40}}


@pytest.mark.parametrize(("settings", "graphs", "reason"), [
    (CAUSAL, [OFFLINE], "causal, use_dynamic_chunk"),
    ({"encoder_conf": {"n_kv_head": 2, "head_dim": 8}}, [OFFLINE], "n_kv_head, head_dim: 2 key heads of 8"),
    ({"encoder_conf": WIDE}, [OFFLINE], "conv_inner_factor: 64 channels"),
    (STATIC, [], "static_chunk_size is 4, but chunk_size is 16"),
    ({"encoder_conf": {**STATIC["encoder_conf"], **WIDE}}, [],
     "conv_inner_factor: 64 channels .*; static_chunk_size is 4: the offline client does not use chunks"),
    ({"num_mel_bins": 40, "changes": {"dataset_conf": MFCC}}, [], "num_ceps is 40, but sherpa-onnx supports only 0"),
    ({"changes": {"dataset_conf": FRAMES}}, [], "frame_length_ms is 20.0, but sherpa-onnx supports only 25.0"),
])  # fmt: skip
def test_what_a_client_cannot_run_has_no_graph_and_what_none_can_is_refused(settings, graphs, reason, bundle, tmp_path):
    write_random_checkpoint(tmp_path, random_config(**settings), seed=1)
    manifest, lines = bundle_manifest(Checkpoint.open(tmp_path)), []
    refused = contextlib.nullcontext() if graphs else pytest.raises(UnsupportedError, match=reason)
    with refused:
        assert supported_graphs(tmp_path, manifest, bundle.tokens, SherpaOptions(), lines.append) == tuple(graphs)
        assert lines[0].startswith(f"no model-streaming.onnx: {reason}")


@pytest.mark.parametrize(("settings", "lacks", "names"), [
    (CAUSAL, "no model-streaming.onnx: causal", ["OfflineRecognizer", "model.onnx"]),
    (STATIC, "no model.onnx: static_chunk_size is 4: the offline client does not use chunks",
     ["OnlineRecognizer", "model-streaming.onnx"]),
])  # fmt: skip
def test_what_only_one_client_can_run_has_its_graph_only(settings, lacks, names, export_quickly, tmp_path):
    write_random_checkpoint(tmp_path / "checkpoint", random_config(**settings), seed=1)
    bundle, lines = export_quickly(tmp_path / "checkpoint", tmp_path / "bundle"), []
    found = export_sherpa(bundle, tmp_path / "out", SherpaOptions(chunk_size=4), progress=lines.append)
    assert lines[0].startswith(lacks)
    assert sorted(file.name for file in found.path.iterdir()) == [names[1], "tokens.txt"]
    assert [name for name in ("OfflineRecognizer", "OnlineRecognizer") if name in found.usage()] == names[:1]


def test_symbols_and_chunks_that_the_client_would_take_for_others(bundle):
    for change, options, message in (
        (lambda tokens: ["_", *tokens[1:]], {}, r"must be token 0 \('_'\), but tokens.txt has none of them"),
        (lambda tokens: [*tokens[:-1], "<eps>"], {}, "<eps> is token 59"),
        (lambda tokens: [*tokens[:-1], "a b"], {}, "'a b' contains white space"),
        (list, {"num_left_chunks": 314}, "chunk plus left context is 5040 frames; the maximum is"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            supported_graphs(bundle.path, bundle.manifest, change(list(bundle.tokens)), SherpaOptions(**options))


def test_command_writes_large_weights_beside_graphs_and_replaces_only_its_own_folders(
    small_bundle, tmp_path, capsys, monkeypatch
):
    out, options = str(tmp_path / "out"), ["--profile", "sherpa-onnx", "--chunk-size", "8"]
    command = ["convert", str(small_bundle.path), out, *options]
    names = {ONLINE.file, OFFLINE.file, "tokens.txt"}
    monkeypatch.setattr(sherpa, "ONE_FILE_LIMIT", 1000)
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "the bundle and the graphs for sherpa-onnx agree in 3 comparisons" in printed
    assert f"OfflineRecognizer.from_wenet_ctc(model='{out}/model.onnx'" in printed
    assert f"OnlineRecognizer.from_wenet_ctc(model='{out}/model-streaming.onnx'" in printed
    assert "chunk_size=8, num_left_chunks=4" in printed
    assert {file.name for file in Path(out).iterdir()} == names | {f"{ONLINE.file}.data", f"{OFFLINE.file}.data"}
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert main(command) == 1
    assert "is not empty: name another folder, or replace it (--overwrite)" in capsys.readouterr().err
    monkeypatch.undo()
    assert main([*command, "--overwrite"]) == 0
    assert {file.name for file in Path(out).iterdir()} == names
    with pytest.raises(BundleError, match=r"contains no tokens\.txt"):
        export_sherpa(small_bundle.path, tmp_path, overwrite=True)
    with pytest.raises(BundleError, match="is a bundle, and only a bundle may replace it"):
        export_sherpa(small_bundle.path, small_bundle.path, overwrite=True)
