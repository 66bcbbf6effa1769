"""Does `u2moe serve` last while connections come, go and break?

    python -m u2moe.benchmarks.serving.churn [--bundle BUNDLE] [--connections 10000] [--hours 1] [--output churn.json]

Clients of all protocols connect at random, a few at a time, and leave: as they should, by closing early, or by losing
the connection in the middle, evenly over the time. Exits with 1 if memory or open files grew after a tenth (and 1500
connections), or if it no longer recognises what it did.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.results.provenance import publish
from u2moe.benchmarks.script import report, run_script, script_parser
from u2moe.benchmarks.serving.messages import WEBSOCKETS
from u2moe.benchmarks.serving.servers import RunningServer, our_server
from u2moe.benchmarks.serving.state import WARM_UP, State, speaks_still
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.recognizer import DEMO_FOLDER

ENDS = ("to the end", "closed early", "lost")
_AT_ONCE = 16
_LAST_S = 30.0


async def visit(server: RunningServer, samples: np.ndarray, random: np.random.Generator) -> str:
    """One client: how it ended."""
    path = str(random.choice(list(WEBSOCKETS)))
    end = str(random.choice(ENDS))
    messages = WEBSOCKETS[path](samples)
    if end != "to the end":
        messages = messages[: int(random.integers(len(messages) + 1))]
    url = f"ws://127.0.0.1:{server.port}{path}"
    try:
        async with asyncio.timeout(_LAST_S), connect(url, proxy=None) as websocket:
            for message in messages:
                await websocket.send(message)
            if end == "lost":
                websocket.transport.abort()
            elif end == "to the end" and path != "/v1/realtime":  # which goes on until it is closed
                async for _ in websocket:
                    pass
    except (OSError, TimeoutError, WebSocketException) as error:
        return end if end == "lost" else f"failed: {type(error).__name__}"
    return end


async def churn(server: RunningServer, num_connections: int, seconds: float) -> dict[str, Any]:
    """Connections until there were enough for long enough."""
    samples = (read_audio(DEMO_FOLDER / "clips" / "command.flac", 16_000) * 32767).astype(np.int16)
    random = np.random.default_rng(0)
    outcomes: Counter[str] = Counter()
    begin = time.monotonic()
    start, tenths = None, [State.of(server.pid)]
    while outcomes.total() < num_connections:
        outcomes.update(await asyncio.gather(*(visit(server, samples, random) for _ in range(_AT_ONCE))))
        share = outcomes.total() / num_connections
        if start is None and share >= 0.1 and outcomes.total() >= WARM_UP:
            start = State.of(server.pid)
        if share >= len(tenths) / 10:
            tenths.append(State.of(server.pid))
            report(f"{outcomes.total()} connections, {tenths[-1]}")
        await asyncio.sleep(share * seconds - (time.monotonic() - begin))
    failures = [f"{count} {outcome}" for outcome, count in outcomes.items() if outcome not in ENDS]
    if not await speaks_still(server):
        failures.append("afterwards it does not recognise what it did before")
    end = State.of(server.pid)
    failures += end.grown_since(start or end)
    found = {"outcomes": dict(outcomes), "wall_s": time.monotonic() - begin, "failures": failures}
    return {**found, "start": vars(start or end), "end": vars(end), "tenths": [vars(state) for state in tenths]}


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: how connections ended, and what the process held."""
    start, end, tenths = results["start"], results["end"], results["tenths"]
    rows = [
        (f"connections in {results['wall_s'] / 60:.0f} minutes", str(sum(results["outcomes"].values()))),
        *((f"... {outcome}", str(count)) for outcome, count in sorted(results["outcomes"].items())),
        ("memory, MB, before and after each tenth", ", ".join(f"{state['resident_mb']:.0f}" for state in tenths)),
        ("memory, MB, after the warm-up and at the end", f"{start['resident_mb']:.0f}, {end['resident_mb']:.0f}"),
        ("open files, likewise", f"{start['num_files']}, {end['num_files']}"),
        ("failures", "; ".join(results["failures"]) or "none"),
    ]
    return {"table": table(("", ""), rows)}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = script_parser("serving.churn", __doc__)
    parser.add_argument("--bundle", type=Path, default=DEMO_FOLDER, help="default: the demo model")
    parser.add_argument("--connections", type=int, default=10_000, help="default: 10000")
    parser.add_argument("--hours", type=float, default=1.0, help="default: 1")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(our_server(args.bundle))
        found = asyncio.run(churn(server, args.connections, args.hours * 3600))
    publish(args.bundle, found, values, args.output)
    for failure in found["failures"]:
        print(f"FAILED: {failure}")
    return int(bool(found["failures"]))


if __name__ == "__main__":
    run_script(main)
