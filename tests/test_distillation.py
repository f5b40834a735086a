"""Law: training on a teacher's remembered answers is training on its live ones, and it is asked once an orientation."""

import pytest
import torch
from small_training import TRAIN, network, run
from torch import nn

from compressor import distillation
from compressor.data.batches import Augment
from compressor.distillation import Distillation
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


@pytest.mark.parametrize("augment", [STILL, FLIPS, TURNS, None], ids=["still", "flips", "turns", "none"])
def test_remembered_answers_train_as_live_ones(augment: Augment | None, monkeypatch: pytest.MonkeyPatch) -> None:
    students = []
    for most_bytes in (1 << 20, 0):
        monkeypatch.setattr(distillation, "MOST_BYTES", most_bytes)
        teacher, student = frozen_copy(Counted()), network()
        result = run(student, epochs=6, augment=augment, distill=Distillation(teacher, 2.0, 0.7))
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
