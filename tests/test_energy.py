"""Law: what the counters say is what all packages used in between, also where one went round; or nothing at all."""

from pathlib import Path

import pytest

from compressor.energy import Counter, joules_between, read_counters


def package(root: Path, number: int, used: int, wraps_at: int = 1000, name: str = "") -> Path:
    folder = root / f"intel-rapl:{number}"
    folder.mkdir()
    for file, text in (("name", name or f"package-{number}"), ("energy_uj", used), ("max_energy_range_uj", wraps_at)):
        (folder / file).write_text(f"{text}\n")
    return folder


def test_packages_are_read_and_their_parts_left_out(tmp_path: Path) -> None:
    package(tmp_path, 0, 70)
    package(tmp_path, 1, 80)
    package(tmp_path, 2, 5, name="psys")
    assert read_counters(tmp_path) == {"intel-rapl:0": Counter(70, 1000), "intel-rapl:1": Counter(80, 1000)}


def test_a_package_that_cannot_be_read_makes_all_unknown(tmp_path: Path) -> None:
    package(tmp_path, 0, 70)
    (package(tmp_path, 1, 80) / "energy_uj").unlink()
    assert read_counters(tmp_path) == {}
    assert read_counters(tmp_path / "absent") == {}


@pytest.mark.parametrize(
    ("before", "after", "joules"),
    [
        ({"a": Counter(10, 10**6)}, {"a": Counter(500_010, 10**6)}, 0.5),
        ({"a": Counter(900_000, 10**6)}, {"a": Counter(100_000, 10**6)}, 0.2),  # gone round
        (
            {"a": Counter(0, 10**9), "b": Counter(5, 10**9)},
            {"a": Counter(10**6, 10**9), "b": Counter(2_000_005, 10**9)},
            3.0,
        ),
        ({}, {}, None),
        ({"a": Counter(0, 9)}, {}, None),
    ],
)  # fmt: skip
def test_what_was_used_in_between(before: dict[str, Counter], after: dict[str, Counter], joules: float | None) -> None:
    assert joules_between(before, after) == joules
