"""Laws of the synthetic printed-circuit crops, checked with an independent flood fill."""

import hashlib

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from compressor.data.pcb_topology import measure_topology
from compressor.data.synthetic_pcb import CLASSES, Pairs, generate, generate_pairs
from compressor.errors import DataError

# What a defect changes: copper components, holes in copper.
CHANGES = {
    "ok": (0, 0),
    "open": (1, 0),
    "short": (-1, 0),
    "mousebite": (0, 0),
    "spur": (0, 0),
    "copper": (1, 0),
    "pinhole": (0, 1),
}

# Of two images a class at 64 px, seed 0, made on x86-64 with NumPy 2.4.
DIGEST = "7b2a714028d40374476cf94e30c864c9ece77b66b277d8dc0aa5db2001bb5aa6"


def flood(mask: NDArray[np.bool_], diagonal: bool) -> list[set[tuple[int, int]]]:
    """Connected regions of `mask`, each as the set of its pixels."""
    steps = [(0, 1), (0, -1), (1, 0), (-1, 0)] + ([(1, 1), (1, -1), (-1, 1), (-1, -1)] if diagonal else [])
    waiting = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    regions = []
    while waiting:
        stack = [waiting.pop()]
        region = set(stack)
        while stack:
            y, x = stack.pop()
            for dy, dx in steps:
                place = (y + dy, x + dx)
                if place in waiting:
                    waiting.remove(place)
                    region.add(place)
                    stack.append(place)
        regions.append(region)
    return regions


def count(copper: NDArray[np.bool_]) -> tuple[int, int, int]:
    """Components, holes and pixels of the smallest component, the slow and obvious way."""
    pieces = flood(copper, diagonal=True)
    holes = [
        region
        for region in flood(~copper, diagonal=False)
        if not any(y in (0, copper.shape[0] - 1) or x in (0, copper.shape[1] - 1) for y, x in region)
    ]
    return len(pieces), len(holes), min((len(piece) for piece in pieces), default=0)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return generate_pairs(per_class=12, size=64, seed=3)


def test_topology_agrees_with_flood_fill_on_random_masks() -> None:
    rng = np.random.default_rng(0)
    masks = rng.random((120, 11, 14)) < rng.random((120, 1, 1))
    masks[0], masks[1] = False, True
    topology = measure_topology(masks)
    for index, mask in enumerate(masks):
        assert count(mask) == (topology.components[index], topology.holes[index], topology.smallest[index])


def test_every_defect_changes_components_and_holes_as_its_name_says(pairs: Pairs) -> None:
    for tested, template, label in zip(pairs.tested, pairs.template, pairs.labels, strict=True):
        pieces, holes, _ = count(tested == 0)
        clean_pieces, clean_holes, _ = count(template == 0)
        assert (pieces - clean_pieces, holes - clean_holes) == CHANGES[CLASSES[label]], CLASSES[label]


def test_a_defect_is_one_visible_patch_away_from_the_border(pairs: Pairs) -> None:
    for tested, template, label in zip(pairs.tested, pairs.template, pairs.labels, strict=True):
        changed = tested != template
        if CLASSES[label] == "ok":
            assert not changed.any()
            continue
        sizes = sorted((len(region) for region in flood(changed, diagonal=True)), reverse=True)
        assert sizes[0] >= 9
        assert sum(sizes[1:]) <= 3, f"{CLASSES[label]}: crumbs of {sizes[1:]} pixels beside the defect"
        rows, columns = np.nonzero(changed)
        assert min(rows.mean(), columns.mean()) > 5
        assert max(rows.mean(), columns.mean()) < 58


@pytest.mark.parametrize(("name", "adds"), [("short", True), ("spur", True), ("copper", True), ("open", False)])
def test_a_defect_only_adds_or_only_removes_copper(pairs: Pairs, name: str, adds: bool) -> None:
    chosen = pairs.labels == CLASSES.index(name)
    tested, template = pairs.tested[chosen] == 0, pairs.template[chosen] == 0
    grown, shrunk = (tested & ~template).any(), (template & ~tested).any()
    assert (grown, shrunk) == (adds, not adds)


def test_values_shapes_and_balance() -> None:
    images, labels = generate(per_class=5, size=80, seed=0)
    assert images.shape == (35, 80, 80)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert set(np.unique(images)) == {0, 255}
    assert np.bincount(labels).tolist() == [5] * len(CLASSES)
    assert labels.tolist() != sorted(labels.tolist())


def test_equal_arguments_give_equal_bytes_and_other_seeds_other_images() -> None:
    first, labels = generate(per_class=8, size=64, seed=5)
    again, labels_again = generate(per_class=8, size=64, seed=5)
    other, _ = generate(per_class=8, size=64, seed=6)
    assert first.tobytes() == again.tobytes()
    assert labels.tobytes() == labels_again.tobytes()
    hashes = [{hashlib.sha256(image.tobytes()).digest() for image in images} for images in (first, other)]
    assert len(hashes[0]) == len(first)
    assert not hashes[0] & hashes[1]


def test_bytes_are_those_of_every_other_machine() -> None:
    images, labels = generate(per_class=2, size=64, seed=0)
    assert hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest() == DIGEST


@pytest.mark.parametrize(
    ("arguments", "key"),
    [({"per_class": 0}, "per_class"), ({"size": 16}, "size"), ({"seed": -1}, "seed")],
)
def test_bad_arguments_are_named(arguments: dict[str, int], key: str) -> None:
    settings = {"per_class": 1, "size": 64, "seed": 0} | arguments
    with pytest.raises(DataError, match=f"{key} is {settings[key]}; it must be at least"):
        generate(per_class=settings["per_class"], size=settings["size"], seed=settings["seed"])


def fit_linear(train: torch.Tensor, truth: torch.Tensor, classes: int) -> torch.nn.Linear:
    torch.manual_seed(0)
    linear = torch.nn.Linear(train.shape[1], classes)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=2e-3, weight_decay=0.1)
    for _ in range(12):
        for index in torch.randperm(len(train)).split(128):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(linear(train[index]), truth[index]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return linear


def test_no_linear_classifier_and_no_global_statistic_solves_it() -> None:
    images, labels = generate(per_class=400, size=64, seed=10)
    unseen, unseen_labels = generate(per_class=100, size=64, seed=11)
    truth, unseen_truth = torch.from_numpy(labels), torch.from_numpy(unseen_labels)

    def pixels(stack: NDArray[np.uint8]) -> torch.Tensor:
        return (torch.from_numpy(stack).float() / 127.5 - 1).flatten(1)

    def statistics(stack: NDArray[np.uint8]) -> torch.Tensor:
        copper = stack == 0
        topology = measure_topology(copper)
        edges = (copper[:, 1:] != copper[:, :-1]).sum((1, 2)) + (copper[:, :, 1:] != copper[:, :, :-1]).sum((1, 2))
        columns = [copper.mean((1, 2)), edges / 500, topology.components / 5, topology.holes / 2]
        return torch.from_numpy(np.stack(columns, axis=1)).float()

    for features in (pixels, statistics):
        linear = fit_linear(features(images), truth, len(CLASSES))
        with torch.inference_mode():
            accuracy = float((linear(features(unseen)).argmax(1) == unseen_truth).float().mean())
        assert accuracy < 0.6, features.__name__
