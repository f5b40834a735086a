"""Normalisation equals the IR's; augmentation equals plain torch, one image at a time."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from compressor.data.batches import Augment, to_input
from compressor.preprocess import InputSpec


def batch(n: int = 6, side: int = 9) -> Tensor:
    return (
        torch.arange(n * 3 * side * side, dtype=torch.float32)
        .view(n, 3, side, side)
        .contiguous(memory_format=torch.channels_last)
    )


def changed(augment: Augment, x: Tensor, generator: torch.Generator) -> Tensor:
    return augment.apply(x, augment.draw(len(x), generator))


def symmetries(image: Tensor) -> list[Tensor]:
    turned = [torch.rot90(image, k, (1, 2)) for k in range(4)]
    return [*turned, *(t.flip(2) for t in turned)]


def test_to_input_normalises_in_channels_last_without_touching_the_source() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    before = images.copy()
    spec = InputSpec(4, 6, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    x = to_input(images, spec, "cpu")
    assert x.shape == (5, 3, 4, 6)
    assert x.is_contiguous(memory_format=torch.channels_last)
    expected = ((images / 255 - spec.mean) / spec.std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(x.numpy(), expected, atol=2e-6)
    assert np.array_equal(images, before)
    assert to_input(images, spec, "cpu", torch.bfloat16).dtype == torch.bfloat16


def test_to_input_takes_a_read_only_slice() -> None:
    images = np.zeros((5, 4, 6, 3), np.uint8)
    images.flags.writeable = False
    assert to_input(images[:2], InputSpec(4, 6), "cpu").shape == (2, 3, 4, 6)


def test_to_input_refuses_another_size() -> None:
    with pytest.raises(ValueError, match=r"uint8 \(2, 4, 6, 3\) found; uint8 \(N, 6, 6, 3\) is needed"):
        to_input(np.zeros((2, 4, 6, 3), np.uint8), InputSpec(6, 6), "cpu")


@pytest.mark.parametrize(
    ("augment", "allowed"),
    [
        (Augment(flip=True), (0, 4)),
        (Augment(flip=False, vertical_flip=True), (0, 6)),
        (Augment(flip=True, vertical_flip=True), (0, 2, 4, 6)),
        (Augment(flip=False, rotate90=True), (0, 1, 2, 3)),
        (Augment(flip=True, rotate90=True), tuple(range(8))),
    ],
)
def test_each_image_becomes_one_of_the_allowed_symmetries_and_each_occurs(
    augment: Augment, allowed: tuple[int, ...]
) -> None:
    x = batch(300, 4)
    y = changed(augment, x, torch.Generator().manual_seed(0))
    assert y.is_contiguous(memory_format=torch.channels_last)
    seen = [0] * 8
    for image, turned in zip(x, y, strict=True):
        match = [k for k, s in enumerate(symmetries(image)) if torch.equal(s, turned)]
        assert len(match) == 1
        seen[match[0]] += 1
    assert {k for k, count in enumerate(seen) if count} == set(allowed)
    assert min(seen[k] for k in allowed) > 300 / len(allowed) * 0.6


@pytest.mark.parametrize(
    ("augment", "numbers"),
    [
        (Augment(flip=False), (0,)),
        (Augment(), (0, 1)),
        (Augment(vertical_flip=True), (0, 1, 2, 3)),
        (Augment(flip=False, rotate90=True), (0, 3, 5, 6)),
        (Augment(rotate90=True), tuple(range(8))),
        (Augment(shift=1), None),
        (Augment(crop=0.9), None),
    ],
)
def test_orientations_are_numbered_and_one_number_is_one_orientation(
    augment: Augment, numbers: tuple[int, ...] | None
) -> None:
    assert augment.orientations() == numbers
    if numbers is None:
        return
    image = batch(1, 4)
    draw = augment.draw(300, torch.Generator().manual_seed(0))
    images = augment.apply(image.expand(300, 3, 4, 4), draw)
    assert set(draw.orientations.tolist()) == set(numbers)
    of_number = [images[draw.orientations == number].unique(dim=0) for number in numbers]
    assert all(len(found) == 1 for found in of_number)
    assert len(torch.cat(of_number).unique(dim=0)) == len(numbers)


def test_shift_is_a_crop_of_the_reflection_padded_image() -> None:
    x, shift = batch(50), 3
    y = changed(Augment(flip=False, shift=shift), x, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, (shift,) * 4, mode="reflect")
    found = set()
    for i in range(len(x)):
        crops = {(r, c): padded[i, :, r : r + 9, c : c + 9] for r in range(7) for c in range(7)}
        places = [place for place, crop in crops.items() if torch.equal(crop, y[i])]
        assert len(places) == 1
        found.add(places[0])
    assert len(found) > 20


def test_shift_beyond_the_image_is_defined() -> None:
    y = changed(Augment(flip=False, shift=40), batch(20, 3), torch.Generator().manual_seed(0))
    assert set(y.unique().tolist()) <= set(batch(20, 3).unique().tolist())
    one = torch.ones(2, 3, 1, 1)
    assert torch.equal(changed(Augment(shift=5), one, torch.Generator()), one)


def test_crop_stretches_a_rectangle_of_the_allowed_size_that_lies_inside() -> None:
    n, height, width, smallest = 200, 24, 36, 0.6
    rows = torch.arange(height).float()[:, None].expand(height, width)
    columns = torch.arange(width).float()[None].expand(height, width)
    x = torch.stack([rows, columns, torch.ones(height, width)]).expand(n, 3, height, width).contiguous()
    y = changed(Augment(flip=False, crop=smallest), x, torch.Generator().manual_seed(0))
    assert y.shape == x.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    # A coordinate image shows where each pixel came from: evenly spaced, one side's share apart, within the image.
    steps_down, steps_right = y[:, 0, 1:-1].diff(dim=1), y[:, 1, :, 1:-1].diff(dim=2)
    for steps in (steps_down[:, :, :1].flatten(1), steps_right[:, :1].flatten(1)):
        share = steps[:, steps.shape[1] // 2]
        assert torch.allclose(steps, share[:, None].expand_as(steps), atol=1e-4)
        assert smallest - 1e-4 <= share.min() < smallest + 0.05
        assert 0.95 < share.max() <= 1 + 1e-4
    assert y[:, 0].min() >= 0
    assert y[:, 0].max() <= height - 1
    assert y[:, 1].max() <= width - 1
    reach = y[:, 1].flatten(1)
    assert reach.min() < 1
    assert reach.max() > width - 2
    assert torch.allclose(y[:, 2], torch.ones(()))


def test_crop_comes_after_the_moves_and_keeps_the_dtype() -> None:
    x, generator = batch(), torch.Generator().manual_seed(3)
    moved = changed(Augment(shift=2), x, generator)
    assert torch.equal(
        changed(Augment(shift=2, crop=0.5), x, torch.Generator().manual_seed(3)),
        changed(Augment(flip=False, crop=0.5), moved, generator),
    )
    assert changed(Augment(crop=0.5), x.to(torch.bfloat16), generator).dtype == torch.bfloat16


def test_generator_decides() -> None:
    augment = Augment(flip=True, vertical_flip=True, shift=2, rotate90=True, crop=0.8)
    x = batch()
    first, again = (changed(augment, x, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, changed(augment, x, torch.Generator().manual_seed(2)))


def test_input_is_left_alone_and_bytes_work() -> None:
    x = batch().to(torch.uint8)
    before = x.clone()
    assert changed(Augment(flip=True, shift=2), x, torch.Generator().manual_seed(1)).dtype == torch.uint8
    assert torch.equal(x, before)
    assert changed(Augment(flip=False), x, torch.Generator()) is x


def test_rotation_needs_square_images() -> None:
    with pytest.raises(ValueError, match="square images; 4 x 6 found"):
        changed(Augment(rotate90=True), torch.zeros(1, 3, 4, 6), torch.Generator())


def test_mixup_blends_pairs_of_moved_images_by_their_shares() -> None:
    x, augment = batch(64), Augment(flip=True, mixup=0.75)
    draw = augment.draw(64, torch.Generator().manual_seed(3))
    assert draw.blend is not None
    partners, shares = draw.blend
    assert sorted(partners.tolist()) == list(range(64))
    assert 0.6 < float((shares < 1).float().mean()) < 0.9
    moved = Augment(flip=True).apply(x, dataclasses.replace(draw, blend=None))
    own = shares[:, None, None, None]
    torch.testing.assert_close(augment.apply(x, draw), own * moved + (1 - own) * moved[partners])
    assert augment.orientations() is None
    assert Augment(flip=True).draw(64, torch.Generator().manual_seed(3)).blend is None


def test_mixup_draws_after_all_else_so_that_the_rest_stays_the_same() -> None:
    settings = {"flip": True, "shift": 2, "crop": 0.5}
    with_it, without = (
        Augment(**settings, mixup=mixup).draw(8, torch.Generator().manual_seed(5)) for mixup in (0.5, 0.0)
    )
    assert torch.equal(with_it.orientations, without.orientations)
    assert torch.equal(with_it.shifts, without.shifts)
    assert all(torch.equal(a, b) for a, b in zip(with_it.windows, without.windows, strict=True))
