"""WeNet's directories are read strictly: missing, damaged, foreign or unused parts are errors that name them."""

import functools
import io
import json
import lzma
import os
import pickle
import re
import shutil
from collections import OrderedDict
from operator import methodcaller as do

import numpy as np
import pytest
import torch
import yaml

from u2moe.export.attention import positional_encoding
from u2moe.export.checkpoint import Checkpoint
from u2moe.export.random_checkpoint import old_layout, random_config, write_random_checkpoint
from u2moe.runtime import CheckpointError, UnsupportedError
from u2moe.runtime.bundle.contract import Cache
from u2moe.runtime.text.vocabulary import Vocabulary

pytestmark = pytest.mark.slow

BATCH_NORM = {"cnn_module_norm": "batch_norm"}
MEAN, ISTD = "encoder.global_cmvn.mean", "encoder.global_cmvn.istd"
BIAS, CONVOLUTION = "ctc.ctc_lo.bias", "encoder.embed.conv.2.weight"
VARIANCE = "encoder.encoders.0.conv_module.norm.running_var"
CONCATENATION = "encoder.encoders.0.concat_linear.weight"
LEFT_POSITIONS = "decoder.left_decoder.embed.1.pe"


class Directory:
    def __init__(self, path, config):
        self.path, self.config = path, config

    def open(self, weights=None):
        return Checkpoint.open(self.path, weights)

    def refuses(self, message, *weights):
        with pytest.raises(CheckpointError, match=message):
            self.open(*weights)

    def state(self):
        return torch.load(self / "final.pt", weights_only=True)

    def save(self, state, **options):
        torch.save(state, self / "final.pt", **options)

    def drop(self, *names):
        self.save({name: tensor for name, tensor in self.state().items() if name not in names})

    def replace(self, tensors):
        self.save({**self.state(), **tensors})

    def set_last(self, name, value):
        tensor = self.state()[name]
        tensor.view(-1)[-1] = value
        self.replace({name: tensor})

    def cut(self, share, *, zipped):
        self.save(self.state(), _use_new_zipfile_serialization=zipped)
        content = (self / "final.pt").read_bytes()
        self.write("final.pt", content[: int(share * len(content))])

    def prefix(self, place, added):
        """Without `encoder.` the statistics are also missing, but the error must not say so."""
        self.save({re.sub(place, added, name): tensor for name, tensor in self.state().items()})
        (self / "global_cmvn").unlink()

    def configure(self, **changes):
        self.write("train.yaml", yaml.dump({**self.config, **changes}))

    def configure_encoder(self, **changes):
        self.configure(encoder_conf=self.config["encoder_conf"] | changes)

    def write(self, name, content):
        (self / name).write_bytes(content.encode() if isinstance(content, str) else content)

    def __truediv__(self, name):
        return self.path / name

    def without_statistics(self, make=lambda _: None):
        """Remove the statistics, or replace them by those of a file that `make` writes."""
        self.drop(MEAN, ISTD)
        (self / "global_cmvn").unlink()
        make(self / "global_cmvn")

    def units(self):
        return (self / "units.txt").read_text(encoding="utf-8").splitlines()

    def change_units(self, change):
        self.write("units.txt", "\n".join(change(self.units())) + "\n")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    @functools.cache
    def write(config):
        folder = tmp_path_factory.mktemp("written")
        write_random_checkpoint(folder, json.loads(config))
        return folder

    return write


@pytest.fixture
def make(written, tmp_path):
    def make(*, old=False, **arguments):
        config = old_layout(random_config(**arguments)) if old else random_config(**arguments)
        source = written(json.dumps(config))
        return Directory(shutil.copytree(source, tmp_path / "checkpoint", dirs_exist_ok=True), config)

    return make


@pytest.fixture
def directory(make):
    return make()


def encoded(checkpoint):
    features = torch.linspace(-1, 1, 67 * 80).view(1, 67, 80) + 11
    with torch.no_grad():
        return checkpoint.network().encoder(features, torch.tensor([67]))[0]


def test_everything_of_a_checkpoint(make):
    directory = make(encoder_conf={"mlp_type": "moe"} | BATCH_NORM)
    checkpoint = directory.open()
    assert (checkpoint.path, checkpoint.weights) == (directory.path, directory / "final.pt")
    assert checkpoint.tokens[:3] == ["<blank>", "<unk>", "<sos/eos>"]
    assert len(checkpoint.tokens) == checkpoint.architecture.vocab_size == 60
    assert (checkpoint.text.tokenizer, checkpoint.text.unk) == ("char", 1)
    assert checkpoint.features.num_mel_bins == 80
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
    directory.drop(*[name for name in directory.state() if name.endswith("num_batches_tracked")])
    assert torch.equal(encoded(directory.open()), exact)


ATTENTION = functools.partial(Cache, name="att_cache", num_blocks=2)
CONVOLUTIONS = functools.partial(Cache, name="cnn_cache", num_blocks=2)
WIDE, LONG = ATTENTION(shape=(4, 0, 16)), CONVOLUTIONS(shape=(32, 7))


@pytest.mark.parametrize(("arguments", "expected"), [
    ({}, {"streaming": True, "decoder": "bitransformer", "caches": (WIDE, LONG)}),
    ({"encoder": "transformer"}, {"streaming": True, "caches": (WIDE,)}),
    ({"decoder": "transformer"}, {"decoder": "transformer"}),
    ({"decoder": None}, {"decoder": "none"}),
    ({"encoder_conf": {"n_kv_head": 2, "head_dim": 8}}, {"caches": (ATTENTION(shape=(2, 0, 16)), LONG)}),
    ({"encoder_conf": {"conv_inner_factor": 4}}, {"caches": (WIDE, CONVOLUTIONS(shape=(64, 7)))}),
    ({"encoder_conf": {"input_layer": "conv2d6"}}, {"subsampling_rate": 6, "right_context": 10}),
    ({"encoder_conf": {"causal": False, "cnn_module_kernel": 7}}, {"streaming": False, "caches": ()}),
    ({"encoder_conf": {"static_chunk_size": 4}}, {"static_chunk_size": 0}),
    ({"encoder_conf": {"static_chunk_size": 4, "use_dynamic_chunk": False}}, {"static_chunk_size": 4}),
])  # fmt: skip
def test_what_the_runtime_is_told(make, arguments, expected):
    config = make(**arguments).open().model_config()
    assert {name: getattr(config, name) for name in expected} == expected


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
    assert torch.equal(averaged.tensors[BIAS], 2 * checkpoint.tensors[BIAS])
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
    directory = make(decoder_conf={"tie_word_embedding": True})
    checkpoint = directory.open()
    for side in ("left", "right"):
        embedding = checkpoint.tensors[f"decoder.{side}_decoder.embed.0.weight"]
        assert checkpoint.tensors[f"decoder.{side}_decoder.output_layer.weight"] is embedding
        assert checkpoint.ignored[f"decoder.{side}_decoder.output_layer.weight"].startswith("tied: replaced by")
    directory.drop("decoder.left_decoder.output_layer.weight")
    assert directory.open().tensors.keys() == checkpoint.tensors.keys()


def program(directory, pack=bytes):
    """Write a TorchScript program; the error must not advise to run it."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    directory.write("final.pt", pack(file.getvalue()))


MOE, OLD = {"encoder_conf": {"mlp_type": "moe"}}, {"old": True}
ROPE = {"selfattention_layer_type": "rope_abs_selfattn"}
FOREIGN = "(is not a plain state dict|is damaged)"
UNUSED = "0 tensors missing; 1 tensors not used by the network "
ONE = torch.ones(1)
NO_STATISTICS = "is not a statistics file in JSON or Kaldi text format"
DAMAGE = [
    (do("drop", "encoder.encoders.1.norm_ff.bias", "ctc.ctc_lo.weight"),
     r"train.yaml: 2 tensors missing \(ctc.ctc_lo.weight, encoder.encoders.1.norm_ff.bias\); 0 tensors not used"),
    *((do("replace", {name: torch.ones(2)}), UNUSED + rf"\({name}\)") for name in (
        "lfmmi.weight", "encoder.encoders.0.feed_forward.gate.weight", "encoder.encoders.7.norm_ff.weight",
        "module.ctc.ctc_lo.bias")),
    (do("prefix", "^", "model."), r"final.pt: .* \d+ tensors missing .*; \d+ .*\(model.e.* match without 'model.'; r"),
    (do("prefix", "^(?=encoder)", "module."), r"\d+ of these names would match without 'module.'; rename them"),
    (do("prefix", r"(?<![^.])(?=embed|\d)", "_fsdp_wrapped_module."), "match without '_fsdp_wrapped_module.'; "),
    (do("configure_encoder", mlp_type="gated"), r"not used .*\(encoder.encoders.0.feed_forward.experts", MOE),
    (do("configure", decoder="bitransformer"), r"missing \(decoder.left_decoder", {"decoder": None}),
    (do("replace", {BIAS: torch.ones(61)}), rf"{BIAS} has shape \(61,\), but train.yaml requires \(60,\)"),
    (do("replace", {BIAS: torch.ones(60, dtype=torch.int32)}), f"{BIAS} is torch.int32, expected one of float32, fl"),
    *((do("set_last", CONVOLUTION, float(value)), f"{CONVOLUTION} has values that are not finite")
      for value in ("nan", "inf", "-inf")),
    (do("set_last", VARIANCE, -1.0), f"{VARIANCE} has variances below zero", {"encoder_conf": BATCH_NORM}),
    (do("replace", {ISTD: torch.zeros(80)}), "istd has inverse standard deviations of zero"),
    (do("drop", ISTD), "has only encoder.global_cmvn.mean; it must have both"),
    *((do("replace", {"encoder.embed.pos_enc.pe": torch.ones(1, 9, *shape)}),
       f"encoder.embed.pos_enc.pe .* is not the sinusoid table .*{kind}",
       {"encoder_conf": {"pos_enc_layer_type": kind, **attention}})
      for kind, attention, shape in (("rope_pos", ROPE, (4, 2)), ("no_pos", {}, (32,)))),
    *((do("without_statistics"), "global_cmvn: cannot be read: .* trained with feature statistics", arguments)
      for arguments in ({}, OLD)),
    (do("without_statistics", os.mkfifo), "global_cmvn: is not a regular file"),
    *((do("without_statistics", do("write_bytes", content)), f"global_cmvn: .*{message}")
      for content, message in (
        (b"\0BFM \xff\xfe\x80", "is not UTF-8 text"),
        (b"", NO_STATISTICS),
        (b"{", NO_STATISTICS),
        (b'{"mean_stat": [1]}', f"{NO_STATISTICS}: 'var_stat'"),
        (b'{"mean_stat": [1], "var_stat": [2], "frame_num": 3}', "has 1 means and 1 variances, expected 80"),
        (b"[ 1 2 3 x ]", NO_STATISTICS),
        (b"[ 1 2 3 0 ]", "has 1 means and 1 variances, expected 80"),
        (b'{"mean_stat": ' + b"[" * 100_000, NO_STATISTICS))),
    *((do("without_statistics", do("write_text", json.dumps(
        {"mean_stat": [mean] * 80, "var_stat": [var] * 80, "frame_num": count}))), f"global_cmvn: .*{message}")
      for mean, var, count, message in (
        (1, 2, 0, "no frames"), (1e999, 2, 9, "are not finite"), (1, 2, 5e-324, "not finite in float32"),
        (10, 9, 10, "sums of squares are too small "))),
    (lambda of: (of / "units.txt").unlink(), "no vocabulary; expected one of units.txt, lang_char.txt, words"),
    (do("write", "units.txt", "你 0\n".encode("gbk")), "units.txt: is not UTF-8 text"),
    *((do("change_units", change), f"units.txt: {message}") for change, message in (
        (lambda lines: lines[:-1], "has 59 symbols, expected 60, the output_dim in train.yaml"),
        (lambda lines: [*lines, "x 60"], "has 61 symbols, expected 60, the output_dim in train.yaml"),
        (lambda lines: [*lines[:-1], "x y z"], "line 60 must be 'symbol id', got 'x y z'"),
        (lambda lines: [*lines[:-1], "<unk> 59"], "has the symbol '<unk>' more than once"),
        (lambda lines: ["<unk> 0", "<blank> 1", *lines[2:]], "<blank> has id 1, expected 0 as in train.yaml"),
        (lambda lines: [*lines[:2], "x 2", *lines[3:-1], "<sos/eos> 59"],
         "<sos/eos> has id 59, expected 2 as for <sos> and <eos> in train.yaml"))),
    (lambda of: (of / "final.pt").unlink(), r"final.pt: cannot be read: No such file"),
    *((do("write", "final.pt", content), f"final.pt: {message}") for content, message in (
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>404</html>", FOREIGN),
        (b"PK\x03\x04" + b"\0" * 100, "is damaged, truncated or not written by torch.save"),
        (bytes(range(256)) * 8, FOREIGN),
        (pickle.dumps(print), FOREIGN),
        (pickle.dumps({"a": 1}, protocol=2), FOREIGN))),
    *((do("cut", share, zipped=zipped), f"final.pt: {FOREIGN}")
      for share in (0.1, 0.5, 0.99) for zipped in (True, False)),
    *((functools.partial(program, pack=pack), r"final.pt: is a TorchScript program, as .* the state dict$")
      for pack in (bytes, lzma.compress)),
    *((do("save", state), f"final.pt: {message}") for state, message in (
        ({}, "contains no tensors"),
        ([ONE], "contains list, expected a state dict"),
        (ONE, "contains Tensor, expected a state dict"),
        ({"model": {"a": ONE}}, r"has the keys 'model', .* save checkpoint\['model'\] instead"),
        ({"epoch": 3, "state": {"a": ONE}}, r"has the keys 'epoch', 'state', .*\['state'\] inst"),
        ({"epoch": 3, "a": ONE}, "epoch is int, expected a tensor"),
        ({"options": {"lr": 1}, "a": ONE}, "options is dict, expected a tensor"),
        ({3: ONE}, "has the key 3, which is not a tensor name"),
        ({"a": torch.ones(2, 2).to_sparse()}, "a is a sparse, quantized or nested tensor"),
        ({"a": torch.ones(2, device="meta")}, "a is a meta tensor, which has no values"),
        ({"a": ONE.expand(1 << 40)}, r"a \(1099511627776,\) has repeated"))),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("change", "message", "arguments"), [(*row, {})[:3] for row in DAMAGE])
def test_what_does_not_fit_is_named(make, change, message, arguments):
    directory = make(**arguments)
    change(directory)
    directory.refuses(message)


def test_code_in_the_file_is_not_run_and_a_missing_directory_is_named(directory, tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    directory.save({"encoder": Attack()})
    directory.refuses(r"final.pt: is not a plain state dict of tensors: it refers to (io|_io|builtins).open")
    assert not (tmp_path / "owned").exists()
    with pytest.raises(CheckpointError, match=r"nowhere: is not a directory; expected one with train.yaml"):
        Checkpoint.open(tmp_path / "nowhere")


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


@pytest.mark.parametrize("name", ["epoch_2", "step_3999"])
def test_the_yaml_beside_the_weights(directory, name):
    directory.configure(
        epoch=2, step=3999, tag=name, save_time="26/11/2026 01:02:03", lrs=[0.001], loss_dict={"loss": 3.2, "acc": 0.9},
        batch_idx=17, grad_norm=2.5, save_interval=1000,
    )  # fmt: skip
    (directory / "train.yaml").rename(directory / f"{name}.yaml")
    (directory / "final.pt").rename(directory / f"{name}.pt")
    directory.refuses(r"train.yaml: cannot be read: No such file")
    assert directory.open(f"{name}.pt").architecture.vocab_size == 60
    (directory / "final.pt").symlink_to(f"{name}.pt")
    assert directory.open().architecture.vocab_size == 60
    directory.write("train.yaml", "input_dim: 3")  # which takes precedence
    directory.refuses(r"train.yaml: output_dim must be", f"{name}.pt")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
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
    assert {name for name, reason in checkpoint.ignored.items() if "cmvn: null" in reason} == {MEAN, ISTD}
    assert not checkpoint.architecture.encoder.normalized_input
    assert (encoded(checkpoint) - normalized).abs().max() > 0.1
    directory.without_statistics()
    directory.configure(cmvn=cmvn, cmvn_conf=None)
    checkpoint = directory.open()
    assert not checkpoint.architecture.encoder.normalized_input
    assert MEAN not in checkpoint.tensors


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("layout", ["json", "kaldi"])
def test_statistics_of_the_state_dict_are_used_and_those_of_the_file_otherwise(make, old, layout):
    directory = make(old=old)
    text = (directory / "global_cmvn").read_text()
    (directory / "global_cmvn").unlink()
    checkpoint = directory.open()
    assert torch.equal(checkpoint.tensors[MEAN], directory.state()[MEAN])
    exact = encoded(checkpoint)
    if layout == "kaldi":
        stats = json.loads(text)
        rows = [*stats["mean_stat"], stats["frame_num"]], [*stats["var_stat"], 0]
        text = " [\n  " + "\n  ".join(" ".join(map(repr, row)) for row in rows) + " ]\n"
    directory.write("global_cmvn", text)
    directory.drop(MEAN, ISTD)
    checkpoint = directory.open()
    assert checkpoint.architecture.encoder.normalized_input
    assert torch.equal(encoded(checkpoint), exact)


@pytest.mark.parametrize(("changes", "name"), [
    ({"cmvn_file": "exp/other"}, "global_cmvn"),  # a file that is named twice
    ({"cmvn_conf": {"cmvn_file": "../../etc/stats", "is_json_cmvn": True}}, "stats"),
])  # fmt: skip
def test_the_file_of_statistics_lies_in_the_directory(directory, changes, name):
    """Paths of the training machine have no meaning here and must not be followed."""
    directory.drop(MEAN, ISTD)
    (directory / "global_cmvn").rename(directory / "elsewhere")
    directory.configure(**changes)
    directory.refuses(f"checkpoint/{name}: cannot be read")
    stats = {"mean_stat": [20.0] * 80, "var_stat": [130.0] * 79 + [40.0], "frame_num": 10}
    directory.write(name, json.dumps(stats))
    checkpoint = directory.open()
    assert checkpoint.architecture.encoder.normalized_input
    np.testing.assert_array_equal(checkpoint.tensors[MEAN], np.full(80, 2.0, np.float32))
    assert checkpoint.tensors[ISTD][0].item() == pytest.approx(1 / 3)
    assert checkpoint.tensors[ISTD][79].item() == pytest.approx(1e10)  # the smallest variance is 1e-20


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
