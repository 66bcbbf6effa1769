"""The content of a bundle as text or JSON: sizes, parameters by group, experts, tensors, metadata."""

import dataclasses
import json
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from u2moe.quantize.formats import CONVERSIONS
from u2moe.runtime.bundle.contract import MOE_DOMAIN, PACKED
from u2moe.runtime.bundle.functions import FUNCTIONS, is_replaced, plain_name
from u2moe.runtime.bundle.weight_formats import WEIGHT_FORMATS
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.declarations import plain
from u2moe.runtime.errors import U2moeError
from u2moe.runtime.graph.dispatch import mixture_of
from u2moe.runtime.graph.file import group_of
from u2moe.runtime.model.native import Kernels, checked_kernels, choose_kernels, of_graph
from u2moe.runtime.model.settings import DEFAULT_PROVIDER

_SCALES = {part for conversion in CONVERSIONS.values() for part in conversion.others}
"""Last components of the names of initializers that accompany the integers of weights, such as scales."""


def inspect_bundle(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a bundle as plain data.

    Raises:
        BundleError: the folder is not a bundle, or is damaged.
    """
    bundle = Bundle.open(path)
    graphs = _graphs(bundle)
    groups: Counter[str] = Counter()
    for graph in graphs:
        groups.update(graph["parameters"])
    total, active = _numbers(graphs)
    return {
        "path": str(bundle.path), "manifest": dataclasses.asdict(bundle.manifest),
        "decoding": plain(bundle.manifest.decoding), "parameters": dict(groups.most_common()),
        "num_parameters": total, "num_active_parameters": active, "graphs": graphs,
        "kernels": _kernels_here(bundle).data(),
    }  # fmt: skip


def count_parameters(bundle: Bundle) -> dict[str, int] | None:
    """Count all parameters (`total`) and those used for a token (`active`). Return None if weights are packed."""
    is_packed = PACKED in bundle.manifest.quantization
    return None if is_packed else dict(zip(("total", "active"), _numbers(_graphs(bundle)), strict=True))


def _numbers(graphs: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Return the total number of parameters, and the number active for a token (chosen experts only)."""
    total = active = 0
    for graph in graphs:
        own, mixtures = sum(graph["parameters"].values()), graph["moe_layers"]
        idle = 1 - mixtures[0]["top_k"] / mixtures[0]["num_experts"] if mixtures else 0
        total, active = total + own, active + own - round(graph["parameters"].get("experts", 0) * idle)
    return total, active


def _kernels_here(bundle: Bundle) -> Kernels:
    """Return the kernels that run the graphs on this machine. Only loading shows which functions they refuse."""
    kernels = choose_kernels(checked_kernels(None), [DEFAULT_PROVIDER])
    try:
        return bundle.load().kernels if kernels.native else kernels
    except U2moeError as error:
        return kernels.without(str(error))


def _graphs(bundle: Bundle) -> list[dict[str, Any]]:
    return [_graph(ir.load(bundle.path / graph.file)) for graph in bundle.manifest.model.graphs()]


def _graph(model: ir.Model) -> dict[str, Any]:
    parameters: Counter[str] = Counter()
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            kind = name.removesuffix(".half").rpartition(".")[2]
            is_packed = kind in WEIGHT_FORMATS and WEIGHT_FORMATS[kind].bits == 4  # two weights in a byte
            count = 0 if kind in _SCALES or name.startswith("const_") else 1 + is_packed
            parameters[group_of(value)] += count * value.const_value.size
    mixtures = [(node, mixture) for node in model.graph if (mixture := mixture_of(node))]
    return {
        "name": model.graph.name, "opset": model.opset_imports[""], "ir_version": model.ir_version,
        "num_nodes": len(list(model.graph)),
        "inputs": list(map(_tensor, model.graph.inputs)), "outputs": list(map(_tensor, model.graph.outputs)),
        "parameters": dict(parameters),
        "functions": dict(Counter(node.op_type for node in model.graph if node.domain == MOE_DOMAIN)),
        "moe_layers": [{"node": node.name, "function": node.op_type, **each.attributes()} for node, each in mixtures],
        "metadata": dict(model.metadata_props),
    }  # fmt: skip


def _tensor(value: ir.Value) -> dict[str, Any]:
    axes = [axis if isinstance(axis, int) else str(axis.value) for axis in value.shape or ()]
    return {"name": value.name, "dtype": str(value.dtype), "shape": axes}


def describe(content: dict[str, Any]) -> str:
    """Return the result of `inspect_bundle` as text."""
    manifest = content["manifest"]
    model, quantization, files = manifest["model"], manifest["quantization"], manifest["files"]
    streaming = "streaming and full context" if model["streaming"] else "full context only"
    packed = quantization.get(PACKED)
    by_format: dict[str, list[str]] = {}
    for layer, kind in quantization.get("exceptions", {}).items():
        by_format.setdefault(kind, []).append(layer)
    if beyond := quantization.get("beyond_half_precision"):
        by_format["float32 (exceeds half precision)"] = beyond
    chosen = [f"{name} {json.dumps(value, ensure_ascii=False)}" for name, value in content["decoding"].items()]
    counted = "stored numbers" if packed else "parameters"
    active = "" if packed else f", active for a token: {content['num_active_parameters']:,}"
    lines = [
        f"{content['path']}: bundle version {manifest['version']} by {manifest['producer']}",
        *["weights: random, for measurements only"] * manifest["random_weights"],
        f"encoder: {model['num_blocks']} blocks of dimension {model['output_size']}, {streaming}",
        f"one encoder frame per {model['subsampling_rate']} feature frames; decoder: {model['decoder']}",
        f"vocabulary: {model['vocab_size']} ({manifest['text']['tokenizer']})",
        f"decoding defaults of the bundle: {', '.join(chosen) or 'none'}",
        f"quantization: {quantization.get('recipe', 'none')}"
        + (f", weights packed in native kernels' layout {packed}" if packed else ""),
        *(f"  {kind}: {', '.join(layers)}" for kind, layers in by_format.items()),
        *(_limit(name, value) for name, value in quantization.get("goal", {}).items()),
        f"{counted}: {content['num_parameters']:,}{active}",
        *(f"  {group:22} {count:14,}" for group, count in content["parameters"].items()),
        "files:",
        *(f"  {name:22} {item['size']:14,} bytes  sha256 {item['sha256'][:16]}…" for name, item in files.items()),
    ]
    for graph in content["graphs"]:
        shown = "{function} (top {top_k} of {num_experts}, {activation})"
        moe = Counter(shown.format(**layer) for layer in graph["moe_layers"])
        experts = "; ".join(f"{count} x {function}" for function, count in moe.items()) or "none"
        lines.append(
            f"{graph['name']}: opset {graph['opset']}, IR {graph['ir_version']}, {graph['num_nodes']} nodes, "
            f"mixture-of-experts layers: {experts}"
        )
        for kind, tensors in (("in ", graph["inputs"]), ("out", graph["outputs"])):
            lines += [f"  {kind} {tensor['name']:20} {tensor['dtype']} {tensor['shape']}" for tensor in tensors]
    metadata = content["graphs"][0]["metadata"].items()
    return "\n".join([*lines, *_kernels(content), "metadata:", *(f"  {key} = {value}" for key, value in metadata)])


def _limit(name: str, value: float) -> str:
    """Return a line with a limit or a measured value, in the unit of its option."""
    if name == "max_bytes":
        return f"  max size: {value / 1e6:g} MB"
    is_share = name in {"max_damage", "max_wer_increase", "changed_tokens", "changed_tokens_at_most"}
    return f"  {name.replace('_', ' ')}: " + (f"{100 * value:g} %" if is_share else f"{value:g}")


def _kernels(content: dict[str, Any]) -> list[str]:
    """Return lines that state which functions run in native kernels here, and why the others do not."""
    kernels = content["kernels"]
    functions: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for graph in content["graphs"]:
        for name, count in graph["functions"].items():
            why = kernels["refused"].get(of_graph(name, graph["name"])) or _reason(name, kernels["operators"])
            functions[why][plain_name(name)] += count
    calls = {why: ", ".join(f"{count} x {name}" for name, count in found.items()) for why, found in functions.items()}
    return [
        f"kernels here: {kernels['description']}",
        f"  native       {calls.pop('', 'none')}",
        *(f"  onnxruntime  {found}: {why}" for why, found in calls.items()),
    ]


def _reason(function: str, operators: Collection[str]) -> str:
    """Return why a function has no native kernel here, or "" if it has one."""
    declared = FUNCTIONS.get(plain_name(function))
    without = declared.without_kernel if declared else "not known to this version of u2moe"
    return "" if is_replaced(function, operators) else without or "native kernels are not available"
