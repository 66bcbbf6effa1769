"""Loads a WeNet state dict, merges its adapters, and selects and checks the tensors that an architecture needs."""

import io
import lzma
import math
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from u2moe.export.architecture import Architecture
from u2moe.export.attention import positional_encoding
from u2moe.export.model import SpeechModel
from u2moe.export.positions import position_table
from u2moe.export.text_files import CMVN_ISTD
from u2moe.runtime.errors import CheckpointError, UnsupportedError

WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that nn.DataParallel, DistributedDataParallel and torch.compile add to every tensor name."""
WRAPPED = re.compile(r"(?<![^.])(module|model|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of names that the wrappers above, other programs and fully sharded training add."""
ENCODER_POSITIONS = re.compile(r"encoder\.embed\.pos_enc(_class)?\.pe")
POSITION_TABLE = re.compile(ENCODER_POSITIONS.pattern + r"|decoder\.((left|right)_decoder\.)?embed\.1\.pe")
BATCH_COUNTER = re.compile(r"encoder\.encoders\.\d+\.conv_module\.norm\.num_batches_tracked")
_BLOCK = r"(encoder\.encoders|decoder\.((left|right)_decoder\.)?decoders)\.\d+\."
CONCATENATION = re.compile(_BLOCK + r"concat_linear[12]?\.(weight|bias)")
TIED_OUTPUT = re.compile(r"(decoder\.(?:(?:left|right)_decoder\.)?)output_layer\.weight")
MOST_NAMES = 5
POSITION_ERRORS = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float64: 1e-3}
"""Supported tensor types, each with the largest accepted difference of a position table from our sinusoids. The angle
5000 has an error of 3e-4 in float32. A value near 1 has an error of 2.4e-4 in float16 and of 2e-3 in bfloat16. Other
kinds of table differ by about 1."""
AdapterUse = Literal["add", "contained"]
"""add: add the adapters, because the weights in the file do not include them. contained: the weights include them."""
DOWN, UP = ".lora_A", ".lora_B"


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """LoRA adapters (arXiv 2106.09685) as in `lora_conf`. An adapted weight is weight + alpha / rank * up @ down."""

    rank: int
    alpha: float


def linked_weights(path: Path) -> Path:
    """Return the file with the weights: `path`, the same name with .xz, or the file that a broken link means."""
    # WeNet's training links final.pt to N.pt but writes epoch_N.pt
    if not path.is_symlink() or path.exists():
        packed = path.parent / f"{path.name}.xz"
        return packed if packed.is_file() and not path.exists() else path
    target = str(path.readlink())
    meant = path.parent / f"epoch_{target}"
    if re.fullmatch(r"\d+\.pt", target) and meant.is_file():
        return meant
    raise CheckpointError(f"{path}: is a link to {target}, which does not exist{_choice(path.parent)}")


def load_weights(
    path: Path, adapters: Adapters | None, use: AdapterUse | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors of a file, with adapters merged, and the reasons for ignoring other tensors, both by name.

    After an epoch, WeNet saves weights that include the adapters. Within an epoch, it saves weights without them. The
    file name shows which kind of file it is; `use` overrides the file name. If neither does, or if the file is damaged
    or an adapter does not fit its weight, the error is a CheckpointError.
    """
    state = load_state_dict(path)
    names = sorted(name.removesuffix(DOWN) for name in state if name.endswith(DOWN))
    if adapters is None or not names:
        return state, {}
    if use is None:
        if re.fullmatch(r"epoch_\d+\.pt", path.resolve().name):
            use = "contained"
        elif re.fullmatch(r"(step_\d+|init|lora_init)\.pt", path.resolve().name):
            use = "add"
        else:
            raise CheckpointError(
                f"{path}: has LoRA adapters: use --lora contained if the weights already include them (as in "
                "epoch_N.pt), or --lora add if not (as in step_N.pt)"
            )
    rest = {name: tensor for name, tensor in state.items() if not name.endswith((DOWN, UP))}
    if use == "contained":
        return rest, dict.fromkeys(state.keys() - rest.keys(), "an adapter that its weight already contains")
    return rest | {f"{name}.weight": _adapted(path, state, name, adapters) for name in names}, {}


def _adapted(path: Path, state: Mapping[str, Tensor], name: str, adapters: Adapters) -> Tensor:
    """Return one layer's weight in float32, with the adapter added."""
    weight, up, down = (state.get(name + ending) for ending in (".weight", UP, DOWN))
    shapes, rank = [None if part is None else tuple(part.shape) for part in (weight, up, down)], adapters.rank
    if weight is None or up is None or down is None or weight.ndim != 2:
        told = f"weight, {UP[1:]} and {DOWN[1:]} have shapes {shapes}, expected matrices"
        raise CheckpointError(f"{path}: {name}: {told}")
    expected = [(weight.shape[0], rank), (rank, weight.shape[1])]
    if shapes[1:] != expected:
        told = f"have shapes {shapes[1:]}, but lora_rank {rank} requires {expected}"
        raise CheckpointError(f"{path}: {name}{UP} and {DOWN} {told}")
    return (weight.double() + up.double() @ down.double() * (adapters.alpha / rank)).float()


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a file written by torch.save, memory-mapped if its format allows.

    The file may be compressed by `xz`. No code from it is run. A prefix in `WRAPPERS` is removed if all tensor names
    have it.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}{_choice(path.parent)}") from error
    if not start:
        raise CheckpointError(f"{path}: is empty")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: is a Git LFS pointer, not the file itself; run git lfs pull")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns about files that it then refuses
            packed = start.startswith(b"\xfd7zXZ\x00")
            file = io.BytesIO(lzma.decompress(path.read_bytes())) if packed else path
            # only the zip format of torch 1.6 and later can be mapped
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=start.startswith(b"PK\x03\x04"))
    except Exception as error:  # damaged files can raise any exception
        told = f"is damaged, truncated or not written by torch.save: {error}"
        if "TorchScript" in str(error):
            told = "is a TorchScript program, as written by WeNet's export_jit.py: expected the state dict"
        elif isinstance(error, pickle.UnpicklingError):  # torch's own message would advise running code from the file
            foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = f"it refers to {foreign[1]}" if foreign else "it cannot be unpickled without running code"
            told = f"is not a plain state dict of tensors: {reason}"
        raise CheckpointError(f"{path}: {told}") from error
    return _checked_state_dict(path, state)


def _choice(directory: Path) -> str:
    """Return the end of an error message: a list of the weight files in the directory; "" if there are none."""
    found = sorted(item.name for item in directory.glob("*.pt") if item.is_file())
    return f"; the directory has {', '.join(found)}: name one with --weights" if found else ""


def _checked_state_dict(path: Path, state: object) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: contains {type(state).__name__}, expected a state dict")
    for name, value in state.items():
        if isinstance(value, Mapping) and any(isinstance(tensor, Tensor) for tensor in value.values()):
            keys = ", ".join(map(repr, state))
            told = f"has the keys {keys}, expected the state dict itself; save checkpoint[{name!r}] instead"
            raise CheckpointError(f"{path}: {told}")
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: has the key {name!r}, which is not a tensor name")
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name} is {type(tensor).__name__}, expected a tensor")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            raise CheckpointError(f"{path}: {name} is a sparse, quantized or nested tensor, expected a dense one")
        if tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: {name} is a {tensor.device.type} tensor, which has no values")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            # a few bytes could expand to a huge tensor
            told = f"{tuple(tensor.shape)} has repeated (expanded) elements, expected a plain tensor"
            raise CheckpointError(f"{path}: {name} {told}")
    if not state:
        raise CheckpointError(f"{path}: contains no tensors")
    while wrapper := next((part for part in WRAPPERS if all(name.startswith(part) for name in state)), None):
        state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
    return {name: tensor.detach() for name, tensor in state.items()}


def expected_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor that this architecture needs, by its name in WeNet's state dict."""
    with torch.device("meta"):
        tensors = SpeechModel(architecture).state_dict().items()
    return {name: tuple(tensor.shape) for name, tensor in tensors if not BATCH_COUNTER.fullmatch(name)}


def select_tensors(
    path: Path, state: Mapping[str, Tensor], architecture: Architecture, *, tied_embedding: bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the network's tensors in float32, and why each other tensor is ignored. Raises CheckpointError."""
    expected = expected_shapes(architecture)
    sources = {name: name for name in expected}
    if tied_embedding:
        sources = {name: TIED_OUTPUT.sub(r"\1embed.0.weight", name) for name in expected}
    others = [name for name in state if sources.get(name) != name]
    ignored = {name: _reason(path, name, state[name], sources, architecture) for name in others}
    unused = [name for name, reason in ignored.items() if not reason]
    missing = sorted({source for source in sources.values() if source not in state})
    if unused or missing:
        told = f"{_listed('missing', missing)}; {_listed('not used by the network', unused)}"
        if fitting := [name for name in unused if WRAPPED.sub("", name) in missing]:
            added = ", ".join(sorted({f"'{part}.'" for name in fitting for part in WRAPPED.findall(name)}))
            told += f"; {len(fitting)} of these names would match without {added}; rename them and save the file again"
        raise CheckpointError(f"{path}: does not fit its train.yaml: {told}")
    loaded = {source: _loaded(path, source, state[source], expected[source]) for source in set(sources.values())}
    return {name: loaded[source] for name, source in sources.items()}, ignored


def _reason(path: Path, name: str, tensor: Tensor, sources: Mapping[str, str], architecture: Architecture) -> str:
    """Return why a tensor has no effect; empty if unknown."""
    if name in sources:
        return f"tied: replaced by {sources[name]}"
    if BATCH_COUNTER.fullmatch(name):
        return "count of training batches"
    if CONCATENATION.fullmatch(name):
        return "belongs to concat_after, which is off; until 2022 WeNet saved it anyway"
    if not POSITION_TABLE.fullmatch(name):
        return ""
    # WeNet would use this table, so it must equal the positional encodings computed here
    _check_type(path, name, tensor)
    length, kind = tensor.shape[1] if tensor.ndim > 1 else 0, "abs_pos"
    expected: Tensor | None = positional_encoding(torch.arange(length), architecture.encoder.dim).unsqueeze(0)
    if ENCODER_POSITIONS.fullmatch(name):
        kind, expected = architecture.encoder.positions, position_table(architecture.encoder, length)
    is_like = expected is not None and length > 0 and tensor.shape == expected.shape
    if expected is None or not is_like or not (tensor.float() - expected).abs().max() <= POSITION_ERRORS[tensor.dtype]:
        raise UnsupportedError(f"{path}: {name} {tuple(tensor.shape)} is not the sinusoid table of {kind}")
    rounded = "" if tensor.dtype == torch.float32 else f", not rounded to {tensor.dtype} as in the file"
    return f"sinusoids, computed from positions{rounded}"


def _loaded(path: Path, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{path}: {name} has shape {tuple(tensor.shape)}, but train.yaml requires {shape}")
    _check_type(path, name, tensor)
    tensor = tensor.float()  # the mapped tensor itself if it is float32
    # a sum in float64 cannot overflow and, unlike isfinite(), needs no memory
    if not math.isfinite(tensor.sum(dtype=torch.float64).item()):
        raise CheckpointError(f"{path}: {name} has values that are not finite")
    if name.endswith(".running_var") and bool((tensor < 0).any()):
        raise CheckpointError(f"{path}: {name} has variances below zero")
    if name == CMVN_ISTD and not bool(tensor.all()):
        raise CheckpointError(f"{path}: {name} has inverse standard deviations of zero")
    return tensor


def _check_type(path: Path, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in POSITION_ERRORS:
        supported = ", ".join(str(kind).removeprefix("torch.") for kind in POSITION_ERRORS)
        raise CheckpointError(f"{path}: {name} is {tensor.dtype}, expected one of {supported}")


def _listed(what: str, names: list[str]) -> str:
    shown = ", ".join(names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "")
    return f"{len(names)} tensors {what}" + (f" ({shown})" if names else "")
