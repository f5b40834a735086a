"""Law: training on a teacher's remembered answers is training on its live ones, and it is asked once an orientation.

And of features: who takes in what the teacher does is not asked for anything, who does not comes closer.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from small_training import SPEC, TRAIN, network, run
from torch import nn

from compressor import distillation
from compressor.data.batches import Augment, to_input
from compressor.distillation import Distillation, Mimicry, linear_map, mimicking
from compressor.errors import UnsupportedModelError
from compressor.inference import frozen_copy

STILL, FLIPS, CROPS = Augment(flip=False), Augment(), Augment(crop=0.8)
TURNS = Augment(vertical_flip=True, rotate90=True)


class Counted(nn.Module):
    """A teacher that knows how many images it has seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.body, self.seen = nn.Sequential(nn.Flatten(), nn.Linear(432, 3)), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return self.body(x)


class Narrow(nn.Module):
    """A student whose classifier takes in `width` numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.body = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(108, width), nn.Tanh())
        self.fc = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x))


@contextmanager
def mimicry_of(student: nn.Module, teacher: nn.Module, weight: float = 1.0) -> Iterator[Mimicry]:
    with mimicking(
        student, teacher, weight=weight, train=TRAIN, spec=SPEC, shown=None, dtype=torch.float32, device="cpu", seed=0
    ) as mimicry:
        yield mimicry


@torch.no_grad()
def error_of(mimicry: Mimicry, student: nn.Module, teacher: nn.Module) -> float:
    x = to_input(TRAIN.images, SPEC, "cpu")
    teacher(x), student.eval()(x)
    return float(mimicry.loss(mimicry.teacher.value))


def test_who_takes_in_what_the_teacher_does_is_not_asked_for_anything() -> None:
    teacher = frozen_copy(Narrow(6))
    with mimicry_of(student := Narrow(6), teacher) as mimicry:
        assert error_of(mimicry, student, teacher) == 0.0
        with torch.no_grad():
            student.body[2].bias += 1.0
        x = to_input(TRAIN.images, SPEC, "cpu")
        expected = (student.body(x) - teacher.body(x)).square().mean() / teacher.body(x).var(0).mean()
        assert error_of(mimicry, student, teacher) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert not teacher.fc._forward_pre_hooks
    assert not student.fc._forward_pre_hooks


def test_the_map_between_widths_begins_as_the_least_squares_one() -> None:
    torch.manual_seed(2)
    taken, truth = torch.randn(500, 4), nn.Linear(4, 7)
    with torch.no_grad():
        torch.testing.assert_close(linear_map(taken, truth(taken))(taken), truth(taken), rtol=0, atol=0.05)
        few = linear_map(taken[:2], truth(taken[:2]))  # fewer images than numbers: held back, and finite
        assert bool(few.weight.isfinite().all())
        assert float(few.weight.abs().max()) < 3


def test_a_narrower_student_comes_closer_to_what_its_teacher_takes_in() -> None:
    """The teacher's answers say nothing here, so that whatever is learnt is learnt from its features."""
    silent = Narrow(6)
    nn.init.zeros_(silent.fc.weight)
    nn.init.zeros_(silent.fc.bias)
    teacher, left = frozen_copy(silent), {}
    for features in (False, True):
        with mimicry_of(student := Narrow(3), teacher) as mimicry:
            left["before"] = error_of(mimicry, student, teacher)
            told = Distillation(teacher, 2.0, 1.0, mimicry=mimicry if features else None)
            run(student, epochs=20, augment=STILL, distill=told)
        with mimicry_of(student, teacher) as judge:  # with the best map there is from this student
            left[f"features {features}"] = error_of(judge, student, teacher)
    assert left["features True"] < 0.7 * min(left["before"], left["features False"]), left


def test_a_network_without_a_classifier_to_look_in_front_of_is_refused() -> None:
    bare = nn.Sequential(nn.AvgPool2d(3), nn.Flatten())
    message = r"distill\.features: no linear layer .* 48 outputs of the network"
    with pytest.raises(UnsupportedModelError, match=message), mimicry_of(bare, frozen_copy(Narrow(6))):
        pass


@pytest.mark.parametrize("features", [False, True], ids=["answers", "features"])
@pytest.mark.parametrize("augment", [STILL, FLIPS, TURNS, None], ids=["still", "flips", "turns", "none"])
def test_remembered_answers_train_as_live_ones(
    augment: Augment | None, features: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    students = []
    for most_bytes in (1 << 20, 0):
        monkeypatch.setattr(distillation, "MOST_BYTES", most_bytes)
        teacher, student = frozen_copy(Counted()), network()
        with mimicry_of(student, teacher) as mimicry:
            teacher.seen = 0
            told = Distillation(teacher, 2.0, 0.7, mimicry=mimicry if features else None)
            result = run(student, epochs=6, augment=augment, distill=told)
        assert result.teacher_images == teacher.seen
        orientations = len(augment.orientations() or ()) if augment else 1
        shown = 6 * len(TRAIN.labels)
        assert teacher.seen <= len(TRAIN.labels) * orientations if most_bytes else teacher.seen == shown
        students.append(student)
    for mine, live in zip(*(student.state_dict().values() for student in students), strict=True):
        torch.testing.assert_close(mine, live, rtol=1e-4, atol=1e-5)


def test_an_image_cut_anew_each_time_is_asked_about_each_time() -> None:
    result = run(network(), epochs=3, augment=CROPS, distill=Distillation(frozen_copy(Counted()), 2.0, 0.5))
    assert result.teacher_images == 3 * len(TRAIN.labels)


def test_same_seed_gives_the_same_weights_to_the_bit() -> None:
    first, second = network(), network()
    for student in (first, second):
        run(student, augment=TURNS, distill=Distillation(frozen_copy(Counted()), 2.0, 0.5))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
