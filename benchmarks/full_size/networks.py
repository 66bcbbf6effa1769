"""The full-size models on disk with their adjusted routers, and those in memory for the latest cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from u2moe.benchmarks.bench.expert_usage import measure_experts
from u2moe.benchmarks.full_size.cells import AS_DEMO, DEMO, EVEN, OWN, ROUTED
from u2moe.benchmarks.full_size.even_routing import Gates, TurnedSettings, routing, turned_gates
from u2moe.benchmarks.full_size.models import Artefact
from u2moe.benchmarks.instruments.probe import Mode
from u2moe.benchmarks.instruments.workload import CHUNK_SIZE, NUM_LEFT_CHUNKS, clips, random_frames, utterance
from u2moe.benchmarks.results.provenance import of_bundle
from u2moe.export.random_checkpoint import PRESETS
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.bundle.bundle import Bundle
from u2moe.runtime.model.model import Model
from u2moe.runtime.recognizer import DEMO_FOLDER


class Networks:
    """Models on disk with adjusted routers, and those in memory for the latest cell."""

    def __init__(
        self,
        artefacts: Sequence[Artefact],
        demo: Mapping[str, Any],
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Load nothing yet.

        Args:
            artefacts: the models.
            demo: the result of `demo_routing`.
            progress: called with a line for each step.
        """
        self.artefacts = {item.name: item for item in artefacts}
        self.demo = demo
        self.progress = progress
        self.free()

    def free(self) -> None:
        """Remove all models from memory."""
        self._key: tuple[str, int] | None = None
        self._models: dict[str, Model] = {}
        self._settings: list[TurnedSettings] = []

    def bundles(self, precision: str) -> dict[str, Bundle]:
        """All models."""
        return {name: Bundle.open(item.bundle(precision), verify=False) for name, item in self.artefacts.items()}

    def models(self, precision: str, num_threads: int) -> dict[str, Model]:
        """All models, evenly routed; in int8 on one thread also routed like the demo model."""
        if self._key != (precision, num_threads):
            self.free()
            for name, bundle in self.bundles(precision).items():
                self._load(name, bundle, num_threads, self.gates(name, EVEN))
                if has_experts(name) and (precision, num_threads) == ("int8", 1):
                    self._load(f"{name}/{ROUTED}", bundle, num_threads, self.gates(name, AS_DEMO))
            self._key = (precision, num_threads)
        return self._models

    def _load(self, case: str, bundle: Bundle, num_threads: int, gates: Gates) -> None:
        settings = TurnedSettings(gates)
        self._models[case] = bundle.load(sess_options=settings.options(num_threads))
        self._settings.append(settings)

    def gates(self, name: str, title: str) -> Gates:
        """The adjusted routers of a model, created once; empty without experts."""
        if not has_experts(name):
            return {}
        num_used = self.demo["touched"] if title == AS_DEMO else None
        file = self.artefacts[name].folder / f"routers-{f'{num_used:.2f}' if num_used else 'all'}.npz"
        if not file.exists():
            self.progress(f"{name}: routers, {title}")
            bundle = self.bundles("int8")[name]
            np.savez(file, **turned_gates(bundle, random_frames(bundle), num_used))  # type: ignore[arg-type]
        with np.load(file) as arrays:
            return dict(arrays)

    def routings(self) -> dict[str, Mapping[str, Any]]:
        """Experts that chunks use: in the demo model, and in another model with its own and with adjusted routers."""
        found = {DEMO: self.demo}
        for name, bundle in self.bundles("int8").items():
            if has_experts(name):
                found[OWN] = _means(routing(bundle, utterance(bundle), {}))
                for title in (EVEN, AS_DEMO):
                    found[title] = _means(routing(bundle, random_frames(bundle), self.gates(name, title)))
        return found


def has_experts(name: str) -> bool:
    """Whether a preset's encoder has experts."""
    return "n_expert" in PRESETS[name]["encoder_conf"]


def demo_routing() -> dict[str, Any]:
    """Experts that chunks of real speech use in the demo model, and which `bundle` that is."""
    bundle = Bundle.open(DEMO_FOLDER)
    rate = bundle.manifest.features.sample_rate
    modes = [Mode(chunk_size=CHUNK_SIZE, num_left_chunks=NUM_LEFT_CHUNKS)]
    (found,) = measure_experts(bundle, [read_audio(file, rate) for file in clips()], modes).values()
    return {**_means(found), **of_bundle(DEMO_FOLDER)}


def _means(summary: Mapping[str, Any]) -> dict[str, float]:
    return {
        "num_experts": summary["num_experts"],
        "touched": summary["touched"]["mean"],
        "load_entropy": summary["load_entropy"]["mean"],
    }
