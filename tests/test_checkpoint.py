"""Weights, statistics and vocabulary of WeNet's directories, under all names and in all layouts."""

import json
import lzma
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
from wenet_directories import Directory

from u2moe.export.attention import positional_encoding
from u2moe.export.checkpoint import Checkpoint
from u2moe.export.random_checkpoint import random_config
from u2moe.export.text_files import CMVN_ISTD, CMVN_MEAN
from u2moe.runtime import CheckpointError, UnsupportedError
from u2moe.runtime.text.vocabulary import Vocabulary

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("loaded_networks")]

CONCATENATION = "encoder.encoders.0.concat_linear.weight"
LEFT_POSITIONS = "decoder.left_decoder.embed.1.pe"


@pytest.fixture
def make(tmp_path):
    return partial(Directory, tmp_path / "checkpoint")


@pytest.fixture
def directory(make):
    return make()


def encoded(checkpoint):
    features = torch.linspace(-1, 1, 67 * 80).view(1, 67, 80) + 11
    with torch.no_grad():
        return checkpoint.network().encoder(features, torch.tensor([67]))[0]


def test_everything_of_a_checkpoint(make):
    directory = make(encoder_conf={"mlp_type": "moe", "cnn_module_norm": "batch_norm", "static_chunk_size": 4})
    checkpoint = directory.open()
    assert (checkpoint.path, checkpoint.weights) == (directory.path, directory / "final.pt")
    assert checkpoint.tokens[:3] == ["<blank>", "<unk>", "<sos/eos>"]
    assert len(checkpoint.tokens) == checkpoint.architecture.vocab_size == 60
    assert (checkpoint.text.tokenizer, checkpoint.text.unk) == ("char", 1)
    assert checkpoint.features.num_mel_bins == 80
    assert checkpoint.model_config().static_chunk_size == 0  # any chunk size was trained
    assert checkpoint.architecture.encoder.normalized_input
    assert set(checkpoint.tensors) | set(checkpoint.ignored) == set(directory.state())
    assert not set(checkpoint.tensors) & set(checkpoint.ignored)
    assert set(checkpoint.ignored.values()) == {"count of training batches", "sinusoids, computed from positions"}
    network = checkpoint.network()
    assert not network.training
    for name, tensor in network.state_dict().items():
        if name in checkpoint.tensors:
            assert tensor.data_ptr() == checkpoint.tensors[name].data_ptr()  # nothing is copied
    exact = encoded(checkpoint)
    counters = {name: tensor for name, tensor in directory.state().items() if name.endswith("num_batches_tracked")}
    directory.replace({name: tensor / 2 for name, tensor in counters.items()})  # like those of average_model.py
    assert torch.equal(encoded(directory.open()), exact)
    directory.drop(*counters)
    assert torch.equal(encoded(directory.open()), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(directory, dtype):
    exact = encoded(directory.open())
    directory.save({name: tensor.to(dtype) for name, tensor in directory.state().items()})
    checkpoint = directory.open()
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {torch.float32}
    limit = {torch.float16: 0.02, torch.bfloat16: 0.2, torch.float64: 1e-6}[dtype]  # a few steps of that precision
    assert (encoded(checkpoint) - exact).abs().max() < limit


def test_a_decoder_that_was_not_trained_and_averaged_weights(directory):
    directory.configure(model_conf={**directory.config["model_conf"], "ctc_weight": 1.0})
    checkpoint = directory.open()
    assert checkpoint.model_config().decoder == "none"
    untrained = [name for name, reason in checkpoint.ignored.items() if reason.startswith("the decoder was not traine")]
    assert set(untrained) == {name for name in directory.state() if name.startswith("decoder.")}
    assert not [name for name in checkpoint.tensors if name.startswith("decoder.")]
    doubled = {name: tensor * 2 for name, tensor in directory.state().items() if not name.endswith(".pe")}
    torch.save(doubled, directory / "avg_30.pt")
    averaged = directory.open("avg_30.pt")
    assert averaged.weights.name == "avg_30.pt"
    assert torch.equal(averaged.tensors["ctc.ctc_lo.bias"], 2 * checkpoint.tensors["ctc.ctc_lo.bias"])
    directory.refuses(r"avg_5.pt: cannot be read: No such file.*has avg_30.pt, final.pt", "avg_5.pt")


def test_files_before_torch_1_6_with_tensors_saved_without_need(directory):
    exact = encoded(directory.open())
    unused = {CONCATENATION: torch.ones(32, 64)}
    unused |= {"decoder.left_decoder.decoders.1.concat_linear2.bias": torch.ones(32)}
    directory.replace(unused)
    directory.drop("encoder.embed.pos_enc.pe", LEFT_POSITIONS, "decoder.right_decoder.embed.1.pe")
    directory.save(OrderedDict(directory.state()), _use_new_zipfile_serialization=False)
    checkpoint = directory.open()
    assert set(checkpoint.ignored) == set(unused)
    assert torch.equal(encoded(checkpoint), exact)


@pytest.mark.parametrize(("stated", "missing"), [((), "decoder_conf and encoder_conf"), (("encoder",), "decoder_conf")])
def test_an_eps_that_nothing_tells_is_asked_for(make, stated, missing):
    """In those months WeNet saved superfluous layers and used either eps, with the same layout."""
    directory = make(old=True)
    names = [f"{name}_conf" for name in ("encoder", "decoder")]
    sections = {name: directory.config[name] | {"norm_eps": "1e-12"} for name in names}
    directory.replace({CONCATENATION: torch.ones(32, 64)})
    directory.configure(**{f"{name}_conf": sections[f"{name}_conf"] for name in stated})
    directory.refuses(f"final.pt: the eps .* is unknown.* 1.0e-12 or .* to {missing} of train")
    directory.configure(**sections)
    encoder = directory.open().architecture.encoder
    assert (encoder.norm.eps, encoder.embed_eps) == (1e-12, 1e-12)
    directory.drop(CONCATENATION)
    directory.configure()
    assert directory.open().architecture.encoder.norm.eps == 1e-5


def test_tied_embeddings_replace_the_output_weights(make):
    directory, output = make(decoder_conf={"tie_word_embedding": True}), "decoder.left_decoder.output_layer.weight"
    checkpoint = directory.open()
    assert checkpoint.ignored[output] == "tied: replaced by decoder.left_decoder.embed.0.weight"
    directory.drop(output)
    assert directory.open().tensors.keys() == checkpoint.tensors.keys()


def test_compressed(directory):
    path, tensors = directory / "final.pt", directory.open().tensors
    packed = lzma.compress(path.read_bytes(), preset=0)
    path.unlink()
    directory.write("final.pt.xz", packed)
    found = directory.open()
    assert found.weights == directory / "final.pt.xz"
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    directory.write("final.pt.xz", packed[:-99])
    directory.refuses(r"final.pt.xz: is damaged")


@pytest.mark.parametrize("target", ["2.pt", "../exp/avg_30.pt"])
def test_the_link_of_the_last_epoch_and_links_that_lead_nowhere(directory, target):
    (directory / "final.pt").rename(directory / "epoch_1.pt")
    (directory / "final.pt").symlink_to(target)
    directory.refuses(f"final.pt: is a link to {target}, which does not exist; the directory has epoch_1.pt: name one ")
    assert directory.open("epoch_1.pt").weights.name == "epoch_1.pt"
    if target == "2.pt":  # WeNet links final.pt to 2.pt, but writes epoch_2.pt
        (directory / "epoch_1.pt").rename(directory / "epoch_2.pt")
        assert directory.open().weights == directory / "epoch_2.pt"


def test_the_yaml_beside_the_weights(directory):
    directory.configure(
        epoch=2, step=3999, tag="epoch_2", save_time="26/11/2026 01:02:03", lrs=[0.001], batch_idx=17, grad_norm=2.5,
        loss_dict={"loss": 3.2, "acc": 0.9}, save_interval=1000,
    )  # fmt: skip
    (directory / "train.yaml").rename(directory / "epoch_2.yaml")
    (directory / "final.pt").rename(directory / "epoch_2.pt")
    directory.refuses(r"train.yaml: cannot be read: No such file")
    assert directory.open("epoch_2.pt").architecture.vocab_size == 60
    (directory / "final.pt").symlink_to("epoch_2.pt")
    assert directory.open().architecture.vocab_size == 60
    directory.write("train.yaml", "input_dim: 3")  # which takes precedence
    directory.refuses(r"train.yaml: output_dim must be", "epoch_2.pt")


@pytest.mark.parametrize("prefix", ["module._orig_mod.", "_orig_mod.module."])
def test_names_of_wrapped_networks(directory, prefix):
    exact = {name: tensor.clone() for name, tensor in directory.open().tensors.items()}
    directory.prefix("^", prefix)
    tensors = directory.open().tensors
    assert tensors.keys() == exact.keys()
    assert all(torch.equal(tensors[name], exact[name]) for name in exact)


def test_paths_from_here_and_names_in_the_directory(directory, monkeypatch):
    """Shells complete to `u2moe export exp --weights exp/avg_5.pt`."""
    (directory / "final.pt").rename(directory / "avg_5.pt")
    monkeypatch.chdir(directory.path.parent)
    for name in ("avg_5.pt", "checkpoint/avg_5.pt", directory / "avg_5.pt"):
        assert Checkpoint.open("checkpoint", name).weights.samefile(directory / "avg_5.pt")
    with pytest.raises(CheckpointError, match=r"^checkpoint/avg_6.pt: cannot be read: .* has avg_5.pt: "):
        Checkpoint.open("checkpoint", "checkpoint/avg_6.pt")


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_tables_of_positions_may_be_rounded_and_not_wrong(directory, kind):
    """WeNet would use a learned table."""
    table = positional_encoding(torch.arange(5000), 32).unsqueeze(0)
    directory.replace({LEFT_POSITIONS: table.to(kind)})
    rounded = "" if kind == torch.float32 else f", not rounded to {kind} as in the file"
    assert directory.open().ignored[LEFT_POSITIONS] == f"sinusoids, computed from positions{rounded}"
    table[0, 7, 3] += 0.02
    for other in (table, torch.zeros(1, 448, 32), torch.zeros(1, 5000, 31), torch.zeros(5000)):
        directory.replace({LEFT_POSITIONS: other.to(kind)})
        with pytest.raises(UnsupportedError, match=r"embed.1.pe .* is not the sinusoid table"):
            directory.open()


@pytest.mark.parametrize("cmvn", [None, "null"])
def test_a_yaml_that_says_null_counts_more_than_the_state_dict(directory, cmvn):
    """WeNet builds a network without statistics and ignores those of the file."""
    normalized = encoded(directory.open())
    directory.configure(cmvn=cmvn)
    checkpoint = directory.open()
    assert {name for name, reason in checkpoint.ignored.items() if "cmvn: null" in reason} == {CMVN_MEAN, CMVN_ISTD}
    assert not checkpoint.architecture.encoder.normalized_input
    assert (encoded(checkpoint) - normalized).abs().max() > 0.1
    directory.without_statistics()
    directory.configure(cmvn=cmvn, cmvn_conf=None)
    checkpoint = directory.open()
    assert not checkpoint.architecture.encoder.normalized_input
    assert CMVN_MEAN not in checkpoint.tensors


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("layout", ["json", "kaldi"])
def test_statistics_of_the_state_dict_are_used_and_those_of_the_file_otherwise(make, old, layout):
    directory = make(old=old)
    text = (directory / "global_cmvn").read_text()
    (directory / "global_cmvn").unlink()
    checkpoint = directory.open()
    assert torch.equal(checkpoint.tensors[CMVN_MEAN], directory.state()[CMVN_MEAN])
    exact = encoded(checkpoint)
    if layout == "kaldi":
        stats = json.loads(text)
        rows = [*stats["mean_stat"], stats["frame_num"]], [*stats["var_stat"], 0]
        text = " [\n  " + "\n  ".join(" ".join(map(repr, row)) for row in rows) + " ]\n"
    directory.write("global_cmvn", text)
    directory.drop(CMVN_MEAN, CMVN_ISTD)
    checkpoint = directory.open()
    assert checkpoint.architecture.encoder.normalized_input
    assert torch.equal(encoded(checkpoint), exact)


@pytest.mark.parametrize(("changes", "name"), [
    ({"cmvn_file": "exp/other"}, "global_cmvn"),  # a file that is named twice
    ({"cmvn_conf": {"cmvn_file": "../../etc/stats", "is_json_cmvn": True}}, "stats"),
])  # fmt: skip
def test_the_file_of_statistics_lies_in_the_directory(directory, changes, name):
    """Paths of the training machine have no meaning here and must not be followed."""
    directory.drop(CMVN_MEAN, CMVN_ISTD)
    (directory / "global_cmvn").rename(directory / "elsewhere")
    directory.configure(**changes)
    directory.refuses(f"checkpoint/{name}: cannot be read")
    stats = {"mean_stat": [20.0] * 80, "var_stat": [130.0] * 79 + [40.0], "frame_num": 10}
    directory.write(name, json.dumps(stats))
    checkpoint = directory.open()
    assert checkpoint.architecture.encoder.normalized_input
    np.testing.assert_array_equal(checkpoint.tensors[CMVN_MEAN], np.full(80, 2.0, np.float32))
    assert checkpoint.tensors[CMVN_ISTD][0].item() == pytest.approx(1 / 3)
    assert checkpoint.tensors[CMVN_ISTD][79].item() == pytest.approx(1e10)  # the smallest variance is 1e-20


@pytest.mark.parametrize("name", ["units.txt", "words.txt", "lang_char.txt", "my_dict.txt"])
def test_names_of_the_vocabulary(directory, tmp_path, name):
    tokens = directory.open().tokens
    (directory / "units.txt").rename(tmp_path / "elsewhere.txt")
    directory.refuses(
        r"checkpoint: has no vocabulary; expected one of units.txt, lang_char.txt, words.txt: "
        r"copy it to this directory, or name it with --units \(the recipe keeps it at data/dict/units.txt\)"
    )
    assert Checkpoint.open(directory.path, units=tmp_path / "elsewhere.txt").tokens == tokens
    (tmp_path / "elsewhere.txt").rename(directory / name)
    assert Checkpoint.open(directory.path, units=name).tokens == tokens
    directory.configure(tokenizer_conf=directory.config["tokenizer_conf"] | {"symbol_table_path": "D:\\a\\my_dict.txt"})
    assert directory.open().tokens == tokens


def test_symbols_of_old_files(make):
    for stated in ({"ctc_conf": {"ctc_blank_id": 5}}, {}):
        directory = make(old=True, changes=stated)
        directory.change_units(lambda lines: [line.replace("<blank>", "x") for line in lines])
        if not stated:
            assert directory.open().architecture.blank == 0
        directory.change_units(lambda lines: [*lines[:5], "<blank> 5", *lines[6:]])
        assert directory.open().architecture.blank == 5
    directory = make(old=True)
    assert directory.open().architecture.eos == 59
    assert directory.open().text.tokenizer == "char"
    directory.change_units(lambda lines: [*lines[:-1], "a\u200bb 59"])  # looks like the end of a line
    assert directory.open().tokens[59] == "a\u200bb"
    directory.write("train_unigram5000.model", "")
    assert directory.open().text.tokenizer == "bpe"
    (directory / "train_unigram5000.model").unlink()
    directory.change_units(lambda lines: [*lines[:4], "\u2581the 4", *lines[5:]])
    assert directory.open().text.tokenizer == "bpe"
    specials = {"<blank>": 0, "<unk>": 1, "<sos>": 3, "<eos>": 5}
    architecture = make(changes={"tokenizer_conf": {"special_tokens": specials}}).open().architecture
    assert (architecture.sos, architecture.eos, architecture.blank) == (3, 5, 0)


def test_tokens_that_are_words(make):
    """connect_symbol ' ', as for phones: each token is marked as the beginning of a word."""
    conf = random_config()["tokenizer_conf"] | {"connect_symbol": " ", "split_with_space": True}
    directory = make(changes={"tokenizer_conf": conf})
    checkpoint, symbols = directory.open(), [line.split()[0] for line in directory.units()]
    vocabulary = Vocabulary(checkpoint.tokens, checkpoint.text)
    assert vocabulary.text([7, 1, 9]) == " ".join(symbols[token] for token in (7, 1, 9))
    assert [word.text for word in vocabulary.words([7, 9])] == [symbols[7], symbols[9]]
    assert (checkpoint.tokens[0], checkpoint.text.unk) == ("<blank>", 1)
