"""What does an execution provider do to a bundle? Texts, processor time and the nodes that it leaves to the CPU.

    python -m u2moe.benchmarks.runtimes.providers --provider OpenVINOExecutionProvider --bundle float32=FP32
        --bundle int8=INT8 [--output FILE]

Run it in an environment whose onnxruntime has the provider, with the same FILE for each provider. Each bundle also runs
on CPUExecutionProvider of the same onnxruntime; a bundle that the provider cannot run is a row with the reason, and a
provider that does not start is one, too. What others lack comes from their documentation: see `provider_operators`.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import distributions, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import onnxruntime

from u2moe.benchmarks.instruments.operators import node_events, profiled
from u2moe.benchmarks.results.files import read_json
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.results.provenance import publish
from u2moe.benchmarks.runtimes.provider_operators import operators_of, paper_table, sources
from u2moe.benchmarks.script import report, run_script, script_parser
from u2moe.runtime import Bundle, DecodingOptions, EndpointConfig, ProviderError, Recognizer
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.model.settings import DEFAULT_PROVIDER, SessionSettings
from u2moe.runtime.recognizer import DEMO_FOLDER
from u2moe.runtime.text.word_errors import read_manifest

STREAM = DecodingOptions(chunk_size=16, num_left_chunks=4, endpoint=EndpointConfig())


def measure(bundle: Path, provider: str, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Recognise the clips as streams, again and again.

    Returns:
        `error` if it does not run; else `texts`, the least `cpu` seconds that all clips took after the first time
        (other programs on the machine only add to it), `seconds` of audio, and `nodes`: how many nodes of the encoder
        each provider ran.
    """
    manifest = Bundle.open(bundle).manifest
    clips = [read_audio(item.path, manifest.features.sample_rate) for item in read_manifest(_CLIPS)]
    progress(f"{bundle.name}, {provider}")
    try:
        recognizer = Recognizer.from_pretrained(bundle, providers=[provider], options=STREAM)
        texts = [recognizer.transcribe(clip).text for clip in clips]
        spent = min(_processor_seconds(recognizer, clips) for _ in range(_REPEATS))
        nodes = _nodes(bundle, provider, clips[0])
    except ProviderError as error:
        return {"error": reason_of(error)}
    seconds = sum(map(len, clips)) / manifest.features.sample_rate
    return {"texts": texts, "cpu": round(spent, 3), "seconds": seconds, "nodes": nodes}


def apart(call: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a call returns in a process of its own, or an `error` with the signal that ended it: providers crash.

    Raises:
        RuntimeError: the call raised something; standard error has it.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, call, *arguments))
    process.start()
    sender.close()
    try:
        found: dict[str, Any] = receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode is None or process.exitcode >= 0:
            raise RuntimeError(f"{call.__name__} failed in its process") from None
        return {"error": f"the process was ended by {signal.Signals(-process.exitcode).name}"}
    process.join()
    return found


def _send(sender: Connection, call: Callable[..., dict[str, Any]], *arguments: Any) -> None:
    sender.send(call(*arguments))


def _measure(bundle: Path, provider: str, plugin: str | None) -> dict[str, Any]:
    if plugin:
        library = importlib.import_module(plugin).get_library_path()
        onnxruntime.register_execution_provider_library(provider, library)
    return measure(bundle, provider, report)


def _processor_seconds(recognizer: Recognizer, clips: Sequence[Any]) -> float:
    start = time.process_time()
    for clip in clips:
        recognizer.transcribe(clip)
    return time.process_time() - start


_CLIPS = DEMO_FOLDER / "clips" / "transcripts.txt"
_REPEATS = 7


def reason_of(error: Exception) -> str:
    """The end of a message of onnxruntime, where the provider says why, without paths of this machine."""
    return re.sub(r"(?:[\w.+-]*/)+", "", " ".join(str(error).split()))[-200:].strip()


def _nodes(bundle: Path, provider: str, clip: Any) -> dict[str, int]:
    """Node runs of the encoder by provider, from a profile of its session."""
    with tempfile.TemporaryDirectory() as folder:
        opened = Bundle.open(bundle)
        model = profiled(opened, Path(folder), SessionSettings(providers=(provider,), kernels="onnxruntime"))
        Recognizer(opened, model, STREAM).transcribe(clip)
        del model
        gc.collect()  # a session writes its profile when it is destroyed
        ran = [event["args"].get("provider") for event in node_events(next(Path(folder).glob("0_*.json")))]
    return dict(Counter(name for name in ran if name))


def wheel() -> str:
    """Name and version of the package that this onnxruntime is from."""
    folder = Path(onnxruntime.__file__).parents[1]
    names = (
        str(item.metadata["Name"])
        for item in distributions(path=[str(folder)])
        if any(str(file) == "onnxruntime/__init__.py" for file in item.files or ())
    )
    name = next(names, "onnxruntime")
    return f"{name} {onnxruntime.__version__}"


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: a row for each package, bundle and provider; what does not run and why; what others lack."""
    rows, reasons = [], []
    for package, bundles in results["found"].items():
        for bundle, providers in bundles.items():
            for provider, item in providers.items():
                name = provider.removesuffix("ExecutionProvider")
                if "error" in item:
                    rows.append((package, bundle, name, "does not run", "", ""))
                    reasons.append((package, bundle, name, item["error"].replace("|", "/")))
                else:
                    rows.append((package, bundle, name, *_cells(item, provider, providers[DEFAULT_PROVIDER])))
    header = ("bundle", "provider", "texts", "processor time per second", "node runs left to the CPU")
    return {
        "table": table(("package", *header), rows, left=4),
        "reasons": table(("package", "bundle", "provider", "reason"), reasons, left=4),
        "paper": paper_table(results["operators"]),
        "sources": sources(),
    }


def _cells(item: Mapping[str, Any], provider: str, reference: Mapping[str, Any]) -> tuple[str, ...]:
    total, own = sum(item["nodes"].values()), item["nodes"].get(provider, 0)
    return (
        "same" if item["texts"] == reference["texts"] else "other",
        f"{item['cpu'] / item['seconds']:.4f}",
        f"{total - own} of {total}",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = script_parser("runtimes.providers", __doc__)
    parser.add_argument("--provider", required=True)
    parser.add_argument("--plugin", metavar="MODULE", help="module of the package that has the provider's library")
    parser.add_argument("--bundle", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    package = wheel()
    if args.plugin:
        package = f"{args.plugin.replace('_', '-')} {version(args.plugin)} with {package}"
    found = read_json(args.output).get("found", {}) if args.output else {}
    folders = {name: Path(folder) for name, _, folder in (item.partition("=") for item in args.bundle)}
    for name, folder in folders.items():
        cells = found.setdefault(package, {}).setdefault(name, {})
        cells[DEFAULT_PROVIDER] = apart(_measure, folder, DEFAULT_PROVIDER, None)
        cells[args.provider] = apart(_measure, folder, args.provider, args.plugin)
    operators = {name: operators_of(folder) for name, folder in folders.items()}
    publish(None, {"found": found, "operators": operators}, values, args.output)
    return 0


if __name__ == "__main__":
    run_script(main)
