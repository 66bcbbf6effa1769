"""Why do runtimes differ? The first tensor that differs, and the first that is rounded or routed otherwise.

    python -m u2moe.benchmarks.runtimes.first_difference BUNDLE AUDIO... --elsewhere NAME=COMMAND ... [--output FILE]

All chunks of each recording run here and elsewhere on the same features and caches, with every intermediate value as an
output. COMMAND runs Python with another onnxruntime or on another processor, for example "/tmp/old/bin/python" or
"qemu-x86_64 -cpu Haswell .venv/bin/python"; "web" is onnxruntime-web in Node (`npm ci --ignore-scripts` in
examples/browser).
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

Arrays = dict[str, npt.NDArray[Any]]
Name = tuple[str, str]
"""A tensor, and what computes it: an operator, and the node of the encoder that it is or is part of."""

CHUNK_SIZE, LEFT_CHUNKS = 16, 4
_NODE = """
import { readFileSync, writeFileSync } from 'node:fs';
const { default: ort } = await import('onnxruntime-web/wasm');
ort.env.wasm.numThreads = 1;
const folder = process.argv[2];
const types = { float32: Float32Array, int64: BigInt64Array };
const session = await ort.InferenceSession.create(readFileSync(`${folder}/graph.onnx`));
for (let chunk = 0; ; chunk += 1) {
  let index;
  try { index = JSON.parse(readFileSync(`${folder}/${chunk}.json`)); } catch { break; }
  const bytes = readFileSync(`${folder}/${chunk}.bin`), feeds = {};
  for (const { name, type, shape, start, end } of index) {
    const part = bytes.buffer.slice(bytes.byteOffset + start, bytes.byteOffset + end);
    feeds[name] = new ort.Tensor(type, new types[type](part), shape);
  }
  const found = await session.run(feeds), parts = [], outputs = [];
  let start = 0;
  for (const [name, { type, data, dims }] of Object.entries(found)) {
    const part = Buffer.from(data.buffer, data.byteOffset, data.byteLength);
    outputs.push({ name, type, shape: dims, start, end: start + part.length });
    parts.push(part);
    start += part.length;
  }
  writeFileSync(`${folder}/${chunk}.out.bin`, Buffer.concat(parts));
  writeFileSync(`${folder}/${chunk}.out.json`, JSON.stringify(outputs));
}
process.exit(0);
"""


def write_arrays(stem: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Arrays as `stem`.bin, and their names, types and shapes as `stem`.json."""
    index, start = [], 0
    for name, array in arrays.items():
        place = {"start": start, "end": start + array.nbytes}
        index.append({"name": name, "type": array.dtype.name, "shape": array.shape, **place})
        start += array.nbytes
    stem.with_name(f"{stem.name}.bin").write_bytes(b"".join(array.tobytes() for array in arrays.values()))
    stem.with_name(f"{stem.name}.json").write_text(json.dumps(index), encoding="utf-8")


def read_arrays(stem: Path) -> Arrays:
    """What `write_arrays` wrote."""
    content = stem.with_name(f"{stem.name}.bin").read_bytes()
    index = json.loads(stem.with_name(f"{stem.name}.json").read_text(encoding="utf-8"))
    return {
        item["name"]: np.frombuffer(content[item["start"] : item["end"]], np.dtype(item["type"])).reshape(item["shape"])
        for item in index
    }


def run_folder(folder: Path) -> None:
    """Run graph.onnx of a folder on each chunk in it, and write what it gives as N.out."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(folder / "graph.onnx"), options)
    names = [output.name for output in session.get_outputs()]
    for number in range(len(list(folder.glob("*.bin")))):
        outputs = session.run(names, read_arrays(folder / str(number)))
        write_arrays(folder / f"{number}.out", dict(zip(names, outputs, strict=True)))


def open_graph(encoder: Path, target: Path) -> list[Name]:
    """Write the encoder without functions and with every intermediate value as an output; returns these in order."""
    import onnx  # noqa: PLC0415 - not needed elsewhere
    from onnx import inliner  # noqa: PLC0415

    model = inliner.inline_local_functions(onnx.load(encoder))
    del model.functions[:]
    known = {output.name for output in model.graph.output}
    names, place = list[Name](), ""
    for node in reversed(model.graph.node):
        # The nodes of a function end with the one that computes what its call gave, under its name.
        place = next((output for output in node.output if output.startswith("encoder/")), place)
        if node.op_type != "Constant":
            shown = f"`{place}`" if place.endswith(node.op_type) else f"{node.op_type} in `{place}`"
            names += [(output, shown) for output in node.output if output]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name, _ in names if name not in known)
    onnx.save(model, target)
    return names[::-1]


def write_chunks(bundle: Path, audio: Path, folder: Path) -> int:
    """Write the inputs of the encoder for each chunk of a recording; returns their number."""
    from u2moe.runtime import Bundle  # noqa: PLC0415
    from u2moe.runtime.audio.reading import read_audio  # noqa: PLC0415
    from u2moe.runtime.model.encoder import required_cache_size  # noqa: PLC0415
    from u2moe.runtime.model.features import fbank  # noqa: PLC0415
    from u2moe.runtime.model.windows import Windows  # noqa: PLC0415

    opened = Bundle.open(bundle)
    model, config = opened.load(kernels="onnxruntime"), opened.manifest.features
    windows, caches, number = Windows(model.config, CHUNK_SIZE), model.encoder.start(), 0
    windows.accept(fbank(read_audio(audio, config.sample_rate), config))
    windows.finish()
    required = required_cache_size(CHUNK_SIZE, LEFT_CHUNKS)
    while (window := windows.take()) is not None:
        feeds: Arrays = {
            "chunk": window[np.newaxis],
            "chunk_lens": np.array([len(window)]),
            "offset": caches.offset,
            "required_cache_size": np.array(required),
            "att_cache": caches.att,
        }
        write_arrays(folder / str(number), feeds if caches.cnn is None else {**feeds, "cnn_cache": caches.cnn})
        _, caches = model.encoder.step(window[np.newaxis], caches, required_cache_size=required)
        number += 1
    return number


def run_elsewhere(command: str, folder: Path) -> None:
    """Run a folder by a command, or by onnxruntime-web in Node."""
    from u2moe.benchmarks.results.files import repository  # noqa: PLC0415

    if command == "web":
        script = repository() / "examples" / "browser" / "first_difference.mjs"
        script.write_text(_NODE, encoding="utf-8")
        try:
            subprocess.run(["node", str(script), str(folder)], check=True, capture_output=True)  # noqa: S603, S607
        finally:
            script.unlink()
    else:
        own = [*shlex.split(command), str(Path(__file__).resolve()), "--folder", str(folder)]
        subprocess.run(own, check=True, capture_output=True)  # noqa: S603


def differences(names: Sequence[Name], here: Sequence[Arrays], there: Sequence[Arrays]) -> dict[str, Any]:
    """The first tensor that differs, and the first of integers that does, over all chunks in order.

    Integers are quantized values, and the numbers of the experts that routers choose.

    Returns:
        `first` and `rounded`, None without any: chunk, place, number of values and of those that differ, and
        the largest difference; the largest difference of the encoder's output in chunks without another rounding,
        `before`, and in those with one, `after`.
    """
    first = rounded = None
    before = after = 0.0
    for number, (ours, theirs) in enumerate(zip(here, there, strict=True)):
        found = list(_differing(names, ours, theirs, number))
        integers = [item for item in found if item["is_integer"]]
        first = first or next(iter(found), None)
        rounded = rounded or next(iter(integers), None)
        off = float(np.abs(ours["output"] - theirs["output"]).max())
        before, after = (before, max(after, off)) if integers else (max(before, off), after)
    return {"first": first, "rounded": rounded, "before": before, "after": after}


def _differing(names: Sequence[Name], ours: Arrays, theirs: Arrays, number: int) -> Iterator[dict[str, Any]]:
    for name, place in names:
        if name not in ours or ours[name].shape != theirs[name].shape or ours[name].size == 0:
            continue
        num = int((ours[name] != theirs[name]).sum())
        if num:
            most = float(np.abs(ours[name].astype(np.float64) - theirs[name].astype(np.float64)).max())
            sizes = {"num_values": ours[name].size, "num_different": num, "largest": most}
            is_integer = np.issubdtype(ours[name].dtype, np.integer)
            yield {"chunk": number, "place": place, "is_integer": is_integer, **sizes}


def measure(
    bundle: Path, audio: Path, elsewhere: Mapping[str, str], progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Differences of a recording by place; see `differences`."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = open_graph(bundle / "encoder.onnx", folder / "graph.onnx")
        num_chunks = write_chunks(bundle, audio, folder)
        run_folder(folder)
        here = [read_arrays(folder / f"{number}.out") for number in range(num_chunks)]
        for place, command in elsewhere.items():
            progress(f"{audio.name}, {place}")
            for file in folder.glob("*.out.*"):
                file.unlink()
            run_elsewhere(command, folder)
            there = [read_arrays(folder / f"{number}.out") for number in range(num_chunks)]
            found[place] = differences(names, here, there)
    return found


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: a row for each recording and place."""
    from u2moe.benchmarks.results.markdown import table  # noqa: PLC0415

    rows = [
        (audio, place, _shown(item["first"]), _shown(item["rounded"]), f"{item['before']:.1g}", f"{item['after']:.1g}")
        for audio, places in results["found"].items()
        for place, item in places.items()
    ]
    header = ("recording", "beside", "first difference", "first rounded or routed otherwise", "output before", "after")
    return {"table": table(header, rows, left=4)}


def _shown(item: Mapping[str, Any] | None) -> str:
    if item is None:
        return "none"
    count = f"{item['num_different']} of {item['num_values']}"
    return f"chunk {item['chunk'] + 1}, {item['place']}: {count} by up to {item['largest']:.1g}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    from u2moe.benchmarks.results.provenance import publish  # noqa: PLC0415
    from u2moe.benchmarks.script import named, report, script_parser  # noqa: PLC0415

    parser = script_parser("runtimes.first_difference", __doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("audio", type=Path, nargs="+")
    parser.add_argument("--elsewhere", type=named, action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    found = {audio.stem: measure(args.bundle, audio, dict(args.elsewhere), report) for audio in args.audio}
    publish(args.bundle, {"found": found}, values, args.output)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--folder"]:  # in another environment, which needs numpy and onnxruntime alone
        run_folder(Path(sys.argv[2]))
    else:
        sys.exit(main())
