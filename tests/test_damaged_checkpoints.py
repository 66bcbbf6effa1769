"""Missing, damaged, foreign or unused parts of WeNet's directories are errors that name them."""

import functools
import io
import json
import lzma
import os
import pickle
import warnings
from operator import methodcaller as do

import pytest
import torch
from wenet_directories import Directory

from u2moe.export.checkpoint import Checkpoint
from u2moe.export.exporter import export_bundle
from u2moe.export.text_files import CMVN_ISTD
from u2moe.runtime import CheckpointError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("loaded_networks")]

BATCH_NORM, VARIANCE = {"cnn_module_norm": "batch_norm"}, "encoder.encoders.0.conv_module.norm.running_var"
BIAS = "ctc.ctc_lo.bias"


def program(directory, pack=bytes):
    """Write a TorchScript program; the error must not advise to run it."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions of torch deprecate such programs
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    directory.write("final.pt", pack(file.getvalue()))


def cut(directory, share, zipped):
    directory.save(directory.state(), _use_new_zipfile_serialization=zipped)
    content = (directory / "final.pt").read_bytes()
    directory.write("final.pt", content[: int(share * len(content))])


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
    (lambda of: of.configure(encoder_conf=of.config["encoder_conf"] | {"mlp_type": "gated"}),
     r"not used .*\(encoder.encoders.0.feed_forward.experts", MOE),
    (do("configure", decoder="bitransformer"), r"missing \(decoder.left_decoder", {"decoder": None}),
    (do("replace", {BIAS: torch.ones(61)}), rf"{BIAS} has shape \(61,\), but train.yaml requires \(60,\)"),
    (do("replace", {BIAS: torch.ones(60, dtype=torch.int32)}), f"{BIAS} is torch.int32, expected one of float32, fl"),
    *((do("replace", {BIAS: torch.tensor([0.0] * 59 + [float(value)])}), f"{BIAS} has values that are not finite")
      for value in ("nan", "inf", "-inf")),
    (do("replace", {VARIANCE: torch.tensor([1.0] * 31 + [-1.0])}), f"{VARIANCE} has variances below zero",
     {"encoder_conf": BATCH_NORM}),
    (do("replace", {CMVN_ISTD: torch.zeros(80)}), "istd has inverse standard deviations of zero"),
    (do("drop", CMVN_ISTD), "has only encoder.global_cmvn.mean; it must have both"),
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
    *((functools.partial(cut, share=share, zipped=zipped), f"final.pt: {FOREIGN}")
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
def test_what_does_not_fit_is_named(tmp_path, change, message, arguments):
    directory = Directory(tmp_path, **arguments)
    change(directory)
    directory.refuses(message)


def test_code_in_the_file_is_not_run_and_a_missing_directory_is_named(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    directory = Directory(tmp_path)
    directory.save({"encoder": Attack()})
    directory.refuses(r"final.pt: is not a plain state dict of tensors: it refers to (io|_io|builtins).open")
    assert not (tmp_path / "owned").exists()
    with pytest.raises(CheckpointError, match=r"nowhere: is not a directory; expected one with train.yaml"):
        Checkpoint.open(tmp_path / "nowhere")


@pytest.mark.parametrize(("name", "message"), [("x" * 300, "x: cannot be read: "), ("/", "^/: cannot be read: ")])
def test_paths_that_the_file_system_refuses_are_named(tmp_path, name, message):
    with pytest.raises(CheckpointError, match=message):  # not a BundleError of the folder to write
        export_bundle(Directory(tmp_path / "checkpoint").path, tmp_path / "out", weights=name)
    assert [item.name for item in tmp_path.iterdir()] == ["checkpoint"]
