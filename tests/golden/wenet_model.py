"""WeNet's own code on a checkpoint, for the scripts beside this file; needs a checkout of WeNet and its imports.
Nothing here computes with code of this repository."""

import contextlib
import importlib
import inspect
import sys
from pathlib import Path

import torch
import yaml

HYPOTHESES = [[5, 9, 3, 11, 4], [7, 6, 5], [], [12]]


def import_from(checkout):
    """Make `wenet` importable from a checkout; ValueError if it is not one."""
    if not (Path(checkout) / "wenet" / "utils" / "checkpoint.py").is_file():
        raise ValueError(f"{checkout}: is not a checkout of WeNet")
    sys.path.insert(0, str(checkout))


def load(directory):
    """Return WeNet's model with the weights in a checkpoint directory; every tensor is used."""
    configs = yaml.safe_load((directory / "train.yaml").read_text(encoding="utf-8"))
    if configs.get("cmvn_file") or configs.get("cmvn_conf", {}).get("cmvn_file"):  # old layouts have no cmvn_conf
        configs |= {"cmvn": "global_cmvn"}
        configs["cmvn_conf"] = {"cmvn_file": str(directory / "global_cmvn"), "is_json_cmvn": True}
        configs |= configs["cmvn_conf"]  # its place in old releases
    for section in ("encoder_conf", "decoder_conf"):
        configs.get(section, {}).pop("use_sdpa", None)  # with it, WeNet cannot stream
    model = built(configs)
    state = torch.load(directory / "final.pt", weights_only=True)
    # old releases do not save computed tensors
    model.load_state_dict(
        {name: state[name] for name in state if not name.endswith(".pe") or name in model.state_dict()}
    )
    if model.decoder is not None and hasattr(model, "tie_or_clone_weights"):
        model.tie_or_clone_weights(jit_mode=False)
    if type(model.encoder).__module__ == "wenet.models.efficient_conformer.encoder":  # releases do not fail
        for layer in model.encoder.encoders:
            layer.self_attn.register_forward_pre_hook(as_read)
            layer.self_attn.register_forward_hook(as_kept)
    return model.eval()


def built(configs):
    """Return the model, built by the function of the imported release."""
    for module, function in (("utils.init_model", "init_model"), ("transformer.asr_model", "init_asr_model")):
        with contextlib.suppress(ModuleNotFoundError):
            make = getattr(importlib.import_module(f"wenet.{module}"), function)
            break
    made = make(*(None, configs)[-len(inspect.signature(make).parameters) :])
    model = made[0] if isinstance(made, tuple) else made
    if configs.get("lora_conf"):
        importlib.import_module("wenet.utils.init_model").inject_lora_to_model(model, configs["lora_conf"])
    return model


def as_read(layer, inputs):
    """Convert a cache: at commit 0154699 this encoder passes some attentions the other's form, and they fail."""
    cache = inputs[5]
    if type(layer).__name__ == "GroupedRelPositionMultiHeadedAttention":
        return (*inputs[:5], torch.zeros(0, 0, 0, 0) if isinstance(cache, tuple) else cache)
    return (*inputs[:5], cache if isinstance(cache, tuple) else cache.chunk(2, dim=-1))


def as_kept(_, __, outputs):
    """Return the new cache in the form that this encoder carries."""
    x, cache = outputs
    return x, torch.cat(cache, dim=-1) if isinstance(cache, tuple) else cache


@torch.no_grad()
def outputs(model, features):
    """Return the outputs listed in configurations/README.md for features [frames, bins], as numpy arrays by name."""
    batch = torch.from_numpy(features).unsqueeze(0)
    full, _ = model.encoder(batch, torch.tensor([len(features)]), -1, -1)
    log_probs = model.ctc.log_softmax(full)
    results = {"full": full[0], "ctc_log_probs": log_probs[0]}
    if streams(model.encoder):
        size = 12 if type(model.encoder).__name__ == "EfficientConformerEncoder" else 4  # whole groups of frames
        results[f"stream_{size}_1"] = streamed(model.encoder, batch, size, 1)[0]
    if model.decoder is not None:
        memory = full
        if getattr(model, "apply_non_blank_embedding", False):
            memory, _ = model.filter_blank_embedding(log_probs, full)
        results |= scores(model, memory)
    return {name: value.numpy() for name, value in results.items()}


def streams(encoder):
    """Return whether the encoder was trained for chunks with caches: chunk masks, and no look-ahead."""
    if type(encoder.embed).__name__ == "Conv1dSubsampling2":
        return False  # it pads each chunk and returns too many frames
    causal = all(part.lorder > 0 or kernel == (1,) for part, kernel in _convolutions(encoder))
    averaged = any(getattr(layer, "merge_method", "") == "learned_ave" for layer in encoder.encoders)  # over all time
    ahead = any(
        getattr(part, "do_rel_shift", False) or type(part).__name__ == "TimeReductionLayer1D"
        for part in encoder.modules()
    )
    return causal and not averaged and not ahead and (encoder.use_dynamic_chunk or encoder.static_chunk_size > 0)


def streamed(encoder, batch, chunk_size, num_left_chunks):
    """Return the output in chunks [1, time, dim]; by a mask if WeNet's streaming fails or miscounts."""
    is_rotary = any(type(part).__name__ == "RopeMultiHeadedAttention" for part in encoder.modules())
    # forward_chunk forgets the past of E-Branchformers' merging convolution; the mask does not
    merges = any(getattr(layer, "lorder", 0) for layer in encoder.encoders)
    if merges or is_rotary or type(encoder.embed).__name__ == "StackNFramesSubsampling":
        return encoder(batch, torch.tensor([batch.shape[1]]), chunk_size, num_left_chunks)[0]
    return encoder.forward_chunk_by_chunk(batch, chunk_size, num_left_chunks)[0]


def _convolutions(encoder):
    """Yield the parts with a convolution over time, with its kernel."""
    names = ("depthwise_conv", "conv", "depthwise_conv_fusion")
    parts = [part for part in encoder.modules() if hasattr(part, "lorder")]
    return [(part, getattr(part, name).kernel_size) for part in parts for name in names if hasattr(part, name)]


def scores(model, memory, texts=HYPOTHESES):
    """Return scores of hypotheses in the layout of the decoder graph, on `memory` [1, time, dim]."""
    rows, length = len(texts), max(map(len, texts))
    hypotheses = torch.full((rows, length + 1), model.eos)
    hypotheses[:, 0] = model.sos
    for row, tokens in enumerate(texts):
        hypotheses[row, 1 : len(tokens) + 1] = torch.tensor(tokens, dtype=torch.int64)
    lengths = torch.tensor([len(tokens) + 1 for tokens in texts])
    both = type(model.decoder).__name__ == "BiTransformerDecoder"
    left, right = model.forward_attention_decoder(hypotheses, lengths, memory, 0.5 if both else 0.0)
    score, r_score = torch.zeros(rows, length + 1), torch.zeros(rows, length + 1)
    for row, tokens in enumerate(texts):
        n = len(tokens)
        for place, token in enumerate([*tokens, model.eos]):
            score[row, place] = left[row, place, token]
            if both:
                r_score[row, place] = right[row, n if place == n else n - 1 - place, token]
    following = torch.stack([left[row, len(tokens)] for row, tokens in enumerate(texts)])
    results = {"score": score, "next_log_probs": following}
    return results | {"r_score": r_score} if both else results
