"""Energy as processors count it themselves: RAPL, which Linux shows in the folder powercap. Not of DRAM or GPUs."""

from __future__ import annotations

from pathlib import Path

_POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Energy used by all processor packages, for any process; on Linux only root may read it.

    Args:
        folder: where the zones lie, each with `name`, `energy_uj` and `max_energy_range_uj`.
    """

    def __init__(self, folder: Path = _POWERCAP) -> None:
        self._zones: dict[Path, int] = {}
        try:
            for zone in sorted(folder.glob("*-rapl:*")):
                if (
                    (zone / "name").read_text().startswith("package")
                ):  # others are parts of packages, or count them again
                    self._zones[zone] = int((zone / "max_energy_range_uj").read_text())
            self._last = self._counted()
        except (OSError, ValueError):
            self._zones = {}

    def joules(self) -> float | None:
        """Joules since the last call, or since the meter was made; None: this system does not say."""
        if not self._zones:
            return None
        before, self._last = self._last, self._counted()
        pairs = zip(before, self._last, self._zones.values(), strict=True)
        return sum((now - then) % largest for then, now, largest in pairs) / 1e6  # counters begin again at the largest

    def _counted(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self._zones]
