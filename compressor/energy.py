"""Energy of the processor, where the machine exposes it: Linux' powercap counters (Intel and AMD RAPL).

Invariant: what cannot be read is None, never 0; needs the standard library only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """What a package has used since some moment, in microjoules, and where the counter starts again from 0."""

    used: int
    wraps_at: int


def read_counters(root: Path = POWERCAP) -> dict[str, Counter]:
    """The energy counters of all processor packages; empty where there are none, or only root may read them."""
    counters = {}
    for folder in sorted(root.glob("*-rapl:*")):
        try:
            if (folder / "name").read_text().startswith("package"):
                used, wraps_at = (int((folder / name).read_text()) for name in ("energy_uj", "max_energy_range_uj"))
                counters[folder.name] = Counter(used, wraps_at)
        except (OSError, ValueError):
            return {}  # a part of the packages would tell a part of the energy
    return counters


def joules_between(before: Mapping[str, Counter], after: Mapping[str, Counter]) -> float | None:
    """Joules that all packages used in between, idle draw and other programs included; None where nothing is known.

    Right as long as no counter went round more than once, which takes a minute or more at full load.
    """
    if not before or before.keys() != after.keys():
        return None
    return sum((now.used - before[name].used) % max(now.wraps_at, 1) for name, now in after.items()) / 1e6
