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


class Directory:
    """A small checkpoint that a test can change before opening it."""

    def __init__(self, path, config):
        self.path = path
        self.config = config

    def open(self, weights=None):
        return Checkpoint.open(self.path, weights)

    def state(self):
        return torch.load(self.path / "final.pt", weights_only=True)

    def save(self, state, **options):
        torch.save(state, self.path / "final.pt", **options)

    def drop(self, *names):
        state = self.state()
        for name in names:
            del state[name]
        self.save(state)

    def replace(self, **tensors):
        self.save({**self.state(), **tensors})

    def configure(self, **changes):
        (self.path / "train.yaml").write_text(yaml.dump({**self.config, **changes}), encoding="utf-8")

    def write(self, name, text):
        (self.path / name).write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a function from a configuration in JSON to the folder of its checkpoint, written once."""

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
        return Directory(
            shutil.copytree(written(json.dumps(config)), tmp_path / "checkpoint", dirs_exist_ok=True), config
        )

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
    assert checkpoint.path == directory.path
    assert checkpoint.weights == directory.path / "final.pt"
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


def attention(heads, width):
    return Cache(name="att_cache", num_blocks=2, shape=(heads, 0, width))


def convolution(channels, past):
    return Cache(name="cnn_cache", num_blocks=2, shape=(channels, past))


@pytest.mark.parametrize(("arguments", "expected"), [
    ({}, {"streaming": True, "decoder": "bitransformer", "caches": (attention(4, 16), convolution(32, 7))}),
    ({"encoder": "transformer"}, {"streaming": True, "caches": (attention(4, 16),)}),
    ({"decoder": "transformer"}, {"decoder": "transformer"}),
    ({"decoder": None}, {"decoder": "none"}),
    ({"encoder_conf": {"n_kv_head": 2, "head_dim": 8}}, {"caches": (attention(2, 16), convolution(32, 7))}),
    ({"encoder_conf": {"conv_inner_factor": 4}}, {"caches": (attention(4, 16), convolution(64, 7))}),
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
    assert {
        name for name, reason in checkpoint.ignored.items() if reason.startswith("the decoder was not trained")
    } == {name for name in directory.state() if name.startswith("decoder.")}
    assert not [name for name in checkpoint.tensors if name.startswith("decoder.")]
    doubled = {name: tensor * 2 for name, tensor in directory.state().items() if not name.endswith(".pe")}
    torch.save(doubled, directory.path / "avg_30.pt")
    assert directory.open("avg_30.pt").weights.name == "avg_30.pt"
    name = "ctc.ctc_lo.bias"
    assert torch.equal(directory.open("avg_30.pt").tensors[name], 2 * directory.open().tensors[name])
    with pytest.raises(CheckpointError, match=r"avg_5.pt: cannot be read: No such file.*has avg_30.pt, final.pt"):
        directory.open("avg_5.pt")


def test_files_before_torch_1_6_with_tensors_saved_without_need(directory):
    exact = encoded(directory.open())
    unused = {
        "encoder.encoders.0.concat_linear.weight": torch.ones(32, 64),
        "decoder.left_decoder.decoders.1.concat_linear2.bias": torch.ones(32),
    }
    directory.replace(**unused)
    directory.drop("encoder.embed.pos_enc.pe", "decoder.left_decoder.embed.1.pe", "decoder.right_decoder.embed.1.pe")
    checkpoint = directory.open()
    assert set(checkpoint.ignored) == set(unused)
    assert torch.equal(encoded(checkpoint), exact)
    exact = encoded(directory.open())
    directory.save(OrderedDict(directory.state()), _use_new_zipfile_serialization=False)
    assert torch.equal(encoded(directory.open()), exact)


@pytest.mark.parametrize(("stated", "missing"), [((), "decoder_conf and encoder_conf"), (("encoder",), "decoder_conf")])
def test_an_eps_that_nothing_tells_is_asked_for(make, stated, missing):
    """In those months WeNet saved superfluous layers and used either eps, with the same layout."""
    directory = make(old=True)
    sections = {
        f"{name}_conf": directory.config[f"{name}_conf"] | {"norm_eps": "1e-12"} for name in ("encoder", "decoder")
    }
    directory.replace(**{"encoder.encoders.0.concat_linear.weight": torch.ones(32, 64)})
    directory.configure(**{f"{name}_conf": sections[f"{name}_conf"] for name in stated})
    with pytest.raises(CheckpointError, match=f"final.pt: the eps .* is unknown.* 1.0e-12 or .* to {missing} of train"):
        directory.open()
    directory.configure(**sections)
    encoder = directory.open().architecture.encoder
    assert (encoder.norm.eps, encoder.embed_eps) == (1e-12, 1e-12)
    directory.drop("encoder.encoders.0.concat_linear.weight")
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


def set_to(name, value):
    """Replace a tensor, or its last number."""

    def change(directory):
        tensor = directory.state().get(name)
        if isinstance(value, float):
            tensor.view(-1)[-1] = value
        directory.replace(**{name: tensor if isinstance(value, float) else value})

    return change


def without_statistics(directory):
    directory.drop(MEAN, ISTD)
    (directory.path / "global_cmvn").unlink()


def with_statistics_in(write):
    def change(directory):
        without_statistics(directory)
        write(directory.path / "global_cmvn")

    return change


def prefixed(place, added):
    """Without `encoder.` the statistics are also missing, but the error must not say so."""

    def change(directory):
        directory.save({re.sub(place, added, name): tensor for name, tensor in directory.state().items()})
        (directory.path / "global_cmvn").unlink()

    return change


def with_gated_layers(directory):
    directory.configure(encoder_conf={**directory.config["encoder_conf"], "mlp_type": "gated"})


UNUSED = "0 tensors missing; 1 tensors not used by the network "
DAMAGE = [
    ({}, lambda of: of.drop("encoder.encoders.1.norm_ff.bias", "ctc.ctc_lo.weight"),
     r"train.yaml: 2 tensors missing \(ctc.ctc_lo.weight, encoder.encoders.1.norm_ff.bias\); 0 tensors not used"),
    *(({}, set_to(name, torch.ones(2)), UNUSED + rf"\({name}\)") for name in (
        "lfmmi.weight", "encoder.encoders.0.feed_forward.gate.weight", "encoder.encoders.7.norm_ff.weight",
        "module.ctc.ctc_lo.bias")),
    ({}, prefixed("^", "model."), r"final.pt: .* \d+ tensors missing .*; \d+ .*\(model.e.* match without 'model.'; r"),
    ({}, prefixed("^(?=encoder)", "module."), r"\d+ of these names would match without 'module.'; rename them"),
    ({}, prefixed(r"(?<![^.])(?=embed|\d)", "_fsdp_wrapped_module."), "would match without '_fsdp_wrapped_module.'; "),
    ({"encoder_conf": {"mlp_type": "moe"}}, with_gated_layers, r"not used .*\(encoder.encoders.0.feed_forward.experts"),
    ({"decoder": None}, lambda of: of.configure(decoder="bitransformer"), r"missing \(decoder.left_decoder"),
    ({}, set_to(BIAS, torch.ones(61)), rf"{BIAS} has shape \(61,\), but train.yaml requires \(60,\)"),
    ({}, set_to(BIAS, torch.ones(60, dtype=torch.int32)), f"{BIAS} is torch.int32, expected one of float32, float16, "),
    *(({}, set_to(CONVOLUTION, value), f"{CONVOLUTION} has values that are not finite")
      for value in (float("nan"), float("inf"), -float("inf"))),
    ({"encoder_conf": BATCH_NORM}, set_to(VARIANCE, -1.0), f"{VARIANCE} has variances below zero"),
    ({}, set_to(ISTD, torch.zeros(80)), "istd has inverse standard deviations of zero"),
    ({}, lambda of: of.drop(ISTD), "has only encoder.global_cmvn.mean; it must have both"),
    ({}, without_statistics, "global_cmvn: cannot be read: .* trained with feature statistics"),
    ({"old": True}, without_statistics, "global_cmvn: cannot be read: .* trained with feature statistics"),
    ({}, with_statistics_in(os.mkfifo), "global_cmvn: is not a regular file"),
    ({}, with_statistics_in(lambda file: file.write_bytes(b"\0BFM \xff\xfe\x80")), "global_cmvn: is not UTF-8 text"),
    ({}, lambda of: (of.path / "units.txt").unlink(), "no vocabulary; expected one of units.txt, lang_char.txt, words"),
    ({}, lambda of: (of.path / "units.txt").write_bytes("你 0\n".encode("gbk")), "units.txt: is not UTF-8 text"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "change", "message"), DAMAGE, ids=[message[:40] for _, _, message in DAMAGE])
def test_what_does_not_fit_is_named(make, arguments, change, message):
    directory = make(**arguments)
    change(directory)
    with pytest.raises(CheckpointError, match=message):
        directory.open()


class TestFiles:
    """The file of the state dict."""

    @pytest.mark.parametrize(("content", "message"), [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>404</html>", "is not a plain state dict|is damaged"),
        (b"PK\x03\x04" + b"\0" * 100, "is damaged, truncated or not written by torch.save"),
        (bytes(range(256)) * 8, "is not a plain state dict|is damaged"),
        (pickle.dumps(print), "is not a plain state dict|is damaged"),
        (pickle.dumps({"a": 1}, protocol=2), "is not a plain state dict|is damaged"),
    ])  # fmt: skip
    def test_foreign_files(self, directory, content, message):
        (directory.path / "final.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=f"final.pt: ({message})"):
            directory.open()

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_truncated_files(self, directory, share, zipped):
        directory.save(directory.state(), _use_new_zipfile_serialization=zipped)
        content = (directory.path / "final.pt").read_bytes()
        (directory.path / "final.pt").write_bytes(content[: int(share * len(content))])
        with pytest.raises(CheckpointError, match=r"final.pt: is (not a plain state dict|damaged)"):
            directory.open()

    def test_code_in_the_file_is_not_run(self, directory, tmp_path):
        class Attack:
            def __reduce__(self):
                return (open, (str(tmp_path / "owned"), "w"))

        directory.save({"encoder": Attack()})
        with pytest.raises(
            CheckpointError,
            match=r"final.pt: is not a plain state dict of tensors: it refers to (io|_io|builtins).open",
        ):
            directory.open()
        assert not (tmp_path / "owned").exists()

    @pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
    @pytest.mark.parametrize("compressed", [False, True])
    def test_programs(self, directory, compressed):
        """The error must not advise to run them."""
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
        (directory.path / "final.pt").write_bytes(lzma.compress(file.getvalue()) if compressed else file.getvalue())
        with pytest.raises(CheckpointError, match=r"final.pt: is a TorchScript program, as .* the state dict$"):
            directory.open()

    @pytest.mark.parametrize(("state", "message"), [
        ({}, "contains no tensors"),
        ([torch.ones(1)], "contains list, expected a state dict"),
        (torch.ones(1), "contains Tensor, expected a state dict"),
        ({"model": {"a": torch.ones(1)}}, r"has the keys 'model', .* save checkpoint\['model'\] instead"),
        ({"epoch": 3, "state": {"a": torch.ones(1)}}, r"has the keys 'epoch', 'state', .*\['state'\] inst"),
        ({"epoch": 3, "a": torch.ones(1)}, "epoch is int, expected a tensor"),
        ({"options": {"lr": 1}, "a": torch.ones(1)}, "options is dict, expected a tensor"),
        ({3: torch.ones(1)}, "has the key 3, which is not a tensor name"),
        ({"a": torch.ones(2, 2).to_sparse()}, "a is a sparse, quantized or nested tensor"),
        ({"a": torch.ones(2, device="meta")}, "a is a meta tensor, which has no values"),
        ({"a": torch.ones(1).expand(1 << 40)}, r"a \(1099511627776,\) has repeated"),
    ])  # fmt: skip
    def test_what_is_not_a_state_dict(self, directory, state, message):
        directory.save(state)
        with pytest.raises(CheckpointError, match=f"final.pt: {message}"):
            directory.open()

    def test_missing_directory_and_files(self, directory, tmp_path):
        with pytest.raises(CheckpointError, match=r"nowhere: is not a directory; expected one with train.yaml"):
            Checkpoint.open(tmp_path / "nowhere")
        (directory.path / "final.pt").unlink()
        with pytest.raises(CheckpointError, match=r"final.pt: cannot be read: No such file"):
            directory.open()

    def test_compressed(self, directory):
        """The compressed file needs no option and has the same tensors; damage is reported."""
        path, tensors = directory.path / "final.pt", directory.open().tensors
        packed = path.with_name("final.pt.xz")
        packed.write_bytes(lzma.compress(path.read_bytes(), preset=0))
        path.unlink()
        found = directory.open()
        assert found.weights == packed
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
        packed.write_bytes(packed.read_bytes()[:-99])
        with pytest.raises(CheckpointError, match=r"final.pt.xz: is damaged"):
            directory.open()


class TestWhatTrainingLeaves:
    """Directories as WeNet's training writes them, not tidied up for publication."""

    def test_the_link_of_the_last_epoch(self, directory):
        """WeNet links final.pt to 2.pt, but writes epoch_2.pt."""
        (directory.path / "final.pt").rename(directory.path / "epoch_2.pt")
        (directory.path / "final.pt").symlink_to("2.pt")
        assert directory.open().weights == directory.path / "epoch_2.pt"

    @pytest.mark.parametrize("target", ["2.pt", "../exp/avg_30.pt"])
    def test_links_that_lead_nowhere(self, directory, target):
        (directory.path / "final.pt").rename(directory.path / "epoch_1.pt")
        (directory.path / "final.pt").symlink_to(target)
        message = (
            f"final.pt: is a link to {target}, which does not exist; the directory has epoch_1.pt: name one with --w"
        )
        with pytest.raises(CheckpointError, match=message):
            directory.open()
        assert directory.open("epoch_1.pt").weights.name == "epoch_1.pt"

    @pytest.mark.parametrize("name", ["epoch_2", "step_3999"])
    def test_the_yaml_beside_the_weights(self, directory, name):
        infos = {
            "epoch": 2, "step": 3999, "tag": name, "save_time": "26/11/2026 01:02:03", "lrs": [0.001],
            "loss_dict": {"loss": 3.2, "acc": 0.9}, "batch_idx": 17, "grad_norm": 2.5, "save_interval": 1000,
        }  # fmt: skip
        directory.configure(**infos)
        (directory.path / "train.yaml").rename(directory.path / f"{name}.yaml")
        (directory.path / "final.pt").rename(directory.path / f"{name}.pt")
        with pytest.raises(CheckpointError, match=r"train.yaml: cannot be read: No such file"):
            directory.open()
        assert directory.open(f"{name}.pt").architecture.vocab_size == 60
        (directory.path / "final.pt").symlink_to(f"{name}.pt")
        assert directory.open().architecture.vocab_size == 60
        directory.write("train.yaml", "input_dim: 3")  # which takes precedence
        with pytest.raises(CheckpointError, match=r"train.yaml: output_dim must be"):
            directory.open(f"{name}.pt")

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
    def test_names_of_wrapped_networks(self, directory, prefix):
        exact = {name: tensor.clone() for name, tensor in directory.open().tensors.items()}
        directory.save({f"{prefix}{name}": tensor for name, tensor in directory.state().items()})
        tensors = directory.open().tensors
        assert tensors.keys() == exact.keys()
        assert all(torch.equal(tensors[name], exact[name]) for name in exact)

    def test_the_vocabulary_of_the_recipe(self, directory, tmp_path):
        tokens = directory.open().tokens
        (directory.path / "units.txt").rename(tmp_path / "lang_char.txt")
        message = (
            r"checkpoint: has no vocabulary; expected one of units.txt, lang_char.txt, words.txt: "
            r"copy it to this directory, or name it with --units \(the recipe keeps it at data/dict/units.txt\)"
        )
        with pytest.raises(CheckpointError, match=message):
            directory.open()
        assert Checkpoint.open(directory.path, units=tmp_path / "lang_char.txt").tokens == tokens
        (tmp_path / "lang_char.txt").rename(directory.path / "other.txt")
        assert Checkpoint.open(directory.path, units="other.txt").tokens == tokens

    def test_paths_from_here_and_names_in_the_directory(self, directory, monkeypatch):
        """Shells complete to `u2moe export exp --weights exp/avg_5.pt`."""
        torch.save(directory.state(), directory.path / "avg_5.pt")
        monkeypatch.chdir(directory.path.parent)
        for name in ("avg_5.pt", "checkpoint/avg_5.pt", directory.path / "avg_5.pt"):
            assert Checkpoint.open("checkpoint", name).weights.samefile(directory.path / "avg_5.pt")
        with pytest.raises(CheckpointError, match=r"^checkpoint/avg_6.pt: cannot be read: .* has avg_5.pt, final.pt: "):
            Checkpoint.open("checkpoint", "checkpoint/avg_6.pt")


class TestTensors:
    """The tensors of the state dict."""

    @pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
    def test_tables_of_positions_may_be_rounded_and_not_wrong(self, directory, kind):
        name, dim = "decoder.left_decoder.embed.1.pe", 32
        table = positional_encoding(torch.arange(5000), dim).unsqueeze(0)
        directory.replace(**{name: table.to(kind)})
        rounded = "" if kind == torch.float32 else f", not rounded to {kind} as in the file"
        assert directory.open().ignored[name] == f"sinusoids, computed from positions{rounded}"
        table[0, 7, 3] += 0.02
        directory.replace(**{name: table.to(kind)})
        with pytest.raises(UnsupportedError, match=r"embed.1.pe .* is not the sinusoid table"):
            directory.open()

    @pytest.mark.parametrize("table", [torch.zeros(1, 448, 32), torch.zeros(1, 5000, 31), torch.zeros(5000)])
    def test_other_tables_of_positions(self, directory, table):
        """WeNet would use the learned table."""
        directory.replace(**{"decoder.left_decoder.embed.1.pe": table})
        with pytest.raises(UnsupportedError, match=r"embed.1.pe .* is not the sinusoid table"):
            directory.open()

    def test_counters_need_not_be_there(self, make):
        directory = make(encoder_conf=BATCH_NORM)
        exact = encoded(directory.open())
        directory.drop(*[name for name in directory.state() if name.endswith("num_batches_tracked")])
        assert torch.equal(encoded(directory.open()), exact)


class TestStatistics:
    """A network that was trained with normalised features is never read without them."""

    def kaldi(self, stats):
        rows = [*stats["mean_stat"], stats["frame_num"]], [*stats["var_stat"], 0]
        return " [\n  " + "\n  ".join(" ".join(map(repr, row)) for row in rows) + " ]\n"

    @pytest.mark.parametrize("old", [False, True])
    def test_those_of_the_state_dict_are_used(self, make, old):
        directory = make(old=old)
        (directory.path / "global_cmvn").unlink()
        assert torch.equal(directory.open().tensors[MEAN], directory.state()[MEAN])

    @pytest.mark.parametrize("cmvn", [None, "null"])
    def test_a_yaml_that_says_null_counts_more_than_the_state_dict(self, directory, cmvn):
        """WeNet builds a network without statistics and ignores those of the file."""
        normalized = encoded(directory.open())
        directory.configure(cmvn=cmvn)
        checkpoint = directory.open()
        assert {name for name, reason in checkpoint.ignored.items() if "cmvn: null" in reason} == {MEAN, ISTD}
        assert not checkpoint.architecture.encoder.normalized_input
        assert (encoded(checkpoint) - normalized).abs().max() > 0.1

    def test_a_file_that_is_named_twice(self, directory):
        directory.drop(MEAN, ISTD)
        directory.configure(cmvn_file="exp/other")
        assert directory.open().architecture.encoder.normalized_input
        (directory.path / "global_cmvn").unlink()
        with pytest.raises(CheckpointError, match=r"checkpoint/global_cmvn: cannot be read"):
            directory.open()

    @pytest.mark.parametrize("old", [False, True])
    @pytest.mark.parametrize("layout", ["json", "kaldi"])
    def test_those_of_the_file_otherwise(self, make, old, layout):
        directory = make(old=old)
        exact = encoded(directory.open())
        if layout == "kaldi":
            directory.write("global_cmvn", self.kaldi(json.loads((directory.path / "global_cmvn").read_text())))
        directory.drop(MEAN, ISTD)
        checkpoint = directory.open()
        assert checkpoint.architecture.encoder.normalized_input
        assert torch.equal(encoded(checkpoint), exact)

    def test_the_file_lies_in_the_directory(self, directory):
        """Paths of the training machine have no meaning here and must not be followed."""
        directory.drop(MEAN, ISTD)
        directory.configure(cmvn_conf={"cmvn_file": "../../etc/stats", "is_json_cmvn": True})
        with pytest.raises(CheckpointError, match=r"checkpoint/stats: cannot be read"):
            directory.open()
        (directory.path / "global_cmvn").rename(directory.path / "stats")
        assert directory.open().architecture.encoder.normalized_input

    def test_training_without(self, directory):
        directory.drop(MEAN, ISTD)
        directory.configure(cmvn=None, cmvn_conf=None)
        checkpoint = directory.open()
        assert not checkpoint.architecture.encoder.normalized_input
        assert MEAN not in checkpoint.tensors

    @pytest.mark.parametrize(("text", "message"), [
        ("", "is not a statistics file in JSON or Kaldi text format"),
        ("{", "is not a statistics file in JSON or Kaldi text format"),
        ('{"mean_stat": [1]}', "is not a statistics file in JSON or Kaldi text format: 'var_stat'"),
        ('{"mean_stat": [1], "var_stat": [2], "frame_num": 3}', "has 1 means and 1 variances, expected 80"),
        ("[ 1 2 3 x ]", "is not a statistics file in JSON or Kaldi text format"),
        ("[ 1 2 3 0 ]", "has 1 means and 1 variances, expected 80"),
        (json.dumps({"mean_stat": [1] * 80, "var_stat": [2] * 80, "frame_num": 0}), "no frames"),
        (json.dumps({"mean_stat": [1e999] * 80, "var_stat": [2] * 80, "frame_num": 9}), "are not finite"),
        (json.dumps({"mean_stat": [1] * 80, "var_stat": [2] * 80, "frame_num": 5e-324}), "not finite in float32"),
        (json.dumps({"mean_stat": [10] * 80, "var_stat": [9] * 80, "frame_num": 10}), "sums of squares are too small "),
        ('{"mean_stat": ' + "[" * 100_000, "is not a statistics file in JSON or Kaldi text format"),
    ])  # fmt: skip
    def test_damaged_files(self, directory, text, message):
        directory.drop(MEAN, ISTD)
        directory.write("global_cmvn", text)
        with pytest.raises(CheckpointError, match=f"global_cmvn: {message}|{message}"):
            directory.open()

    def test_the_arithmetic(self, directory):
        directory.drop(MEAN, ISTD)
        stats = {"mean_stat": [20.0] * 80, "var_stat": [130.0] * 79 + [40.0], "frame_num": 10}
        directory.write("global_cmvn", json.dumps(stats))
        tensors = directory.open().tensors
        np.testing.assert_array_equal(tensors[MEAN], np.full(80, 2.0, np.float32))
        assert tensors[ISTD][0].item() == pytest.approx(1 / 3)
        assert tensors[ISTD][79].item() == pytest.approx(1e10)  # the smallest variance is 1e-20


class TestVocabulary:
    """units.txt and its older names."""

    def lines(self, directory):
        return (directory.path / "units.txt").read_text(encoding="utf-8").splitlines()

    @pytest.mark.parametrize("name", ["units.txt", "words.txt", "lang_char.txt", "my_dict.txt"])
    def test_names(self, directory, name):
        tokens = directory.open().tokens
        (directory.path / "units.txt").rename(directory.path / name)
        conf = {**directory.config["tokenizer_conf"], "symbol_table_path": "D:\\data\\my_dict.txt"}
        directory.configure(tokenizer_conf=conf)
        assert directory.open().tokens == tokens

    @pytest.mark.parametrize(("change", "message"), [
        (lambda lines: lines[:-1], "has 59 symbols, expected 60, the output_dim in train.yaml"),
        (lambda lines: [*lines, "x 60"], "has 61 symbols, expected 60, the output_dim in train.yaml"),
        (lambda lines: [*lines[:-1], "x y z"], "line 60 must be 'symbol id', got 'x y z'"),
        (lambda lines: [*lines[:-1], "<unk> 59"], "has the symbol '<unk>' more than once"),
        (lambda lines: ["<unk> 0", "<blank> 1", *lines[2:]], "<blank> has id 1, expected 0 as in train.yaml"),
        (lambda lines: [*lines[:2], "x 2", *lines[3:-1], "<sos/eos> 59"],
         "<sos/eos> has id 59, expected 2 as for <sos> and <eos> in train.yaml"),
    ])  # fmt: skip
    def test_damaged_ones(self, directory, change, message):
        directory.write("units.txt", "\n".join(change(self.lines(directory))) + "\n")
        with pytest.raises(CheckpointError, match=f"units.txt: {message}"):
            directory.open()

    @pytest.mark.parametrize("stated", [{}, {"ctc_conf": {"ctc_blank_id": 5}}])
    def test_the_blank_is_where_the_vocabulary_has_it(self, make, stated):
        directory = make(old=True, changes=stated)
        lines = [line.replace("<blank>", "x") for line in self.lines(directory)]
        directory.write("units.txt", "\n".join([*lines[:5], "<blank> 5", *lines[6:]]))
        assert directory.open().architecture.blank == 5

    def test_the_blank_of_a_vocabulary_without_one(self, make):
        directory = make(old=True)
        directory.write("units.txt", "\n".join(self.lines(directory)).replace("<blank>", "x"))
        assert directory.open().architecture.blank == 0

    def test_symbols_that_look_like_line_ends(self, directory):
        directory.write("units.txt", "\n".join([*self.lines(directory)[:-1], "a\u200bb 59"]))
        assert directory.open().tokens[59] == "a\u200bb"

    def test_sos_and_eos(self, make):
        assert make(old=True).open().architecture.eos == 59
        specials = {"<blank>": 0, "<unk>": 1, "<sos>": 3, "<eos>": 5}
        architecture = make(changes={"tokenizer_conf": {"special_tokens": specials}}).open().architecture
        assert (architecture.sos, architecture.eos, architecture.blank) == (3, 5, 0)

    def test_old_files_tell_bpe_by_their_pieces(self, make):
        directory = make(old=True)
        assert directory.open().text.tokenizer == "char"
        lines = self.lines(directory)
        directory.write("units.txt", "\n".join([*lines[:4], "\u2581the 4", *lines[5:]]))
        assert directory.open().text.tokenizer == "bpe"

    def test_tokens_that_are_words(self, make):
        """connect_symbol ' ', as for phones: each token is marked as the beginning of a word."""
        conf = random_config()["tokenizer_conf"] | {"connect_symbol": " ", "split_with_space": True}
        directory = make(changes={"tokenizer_conf": conf})
        checkpoint, symbols = directory.open(), [line.split()[0] for line in self.lines(directory)]
        vocabulary = Vocabulary(checkpoint.tokens, checkpoint.text)
        assert vocabulary.text([7, 1, 9]) == " ".join(symbols[token] for token in (7, 1, 9))
        assert [word.text for word in vocabulary.words([7, 9])] == [symbols[7], symbols[9]]
        assert (checkpoint.tokens[0], checkpoint.text.unk) == ("<blank>", 1)

    def test_old_files_tell_bpe_by_their_model(self, make):
        directory = make(old=True)
        directory.write("train_unigram5000.model", "")
        assert directory.open().text.tokenizer == "bpe"
