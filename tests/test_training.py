"""The one training loop: it learns, repeats itself bit for bit, keeps the best weights, and stops when it diverges."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from small_training import SPEC, TRAIN, VAL, network, run, split
from torch import nn

from compressor import training
from compressor.data import Split
from compressor.data.batches import Augment, to_input
from compressor.distillation import Distillation
from compressor.errors import TrainingError
from compressor.inference import evaluate, frozen_copy, reestimate_batchnorm
from compressor.training import (
    WeightAverage,
    finetune,
    loss_of,
    make_optimizer,
    schedule_factor,
)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
def test_learns_a_separable_problem(optimizer: str, schedule: str) -> None:
    module = network()
    result = run(module, optimizer=optimizer, schedule=schedule, epochs=6, learning_rate=2e-2)
    assert result.val_accuracy >= 0.95
    assert evaluate(module, VAL, SPEC) == pytest.approx((result.val_accuracy, result.val_loss), abs=1e-5)


def test_same_seed_gives_bit_equal_weights_and_another_seed_does_not() -> None:
    states = []
    for seed in (5, 5, 6):
        module = network()
        run(module, seed=seed, augment=Augment(flip=True, shift=2), ema=0.9)
        states.append(module.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])


def test_network_ends_with_its_best_epoch() -> None:
    module = network()
    result = run(module, epochs=8, learning_rate=0.3, clip_norm=None)
    best = max(result.history, key=lambda e: (e.val_accuracy, -e.val_loss))
    assert result.best_epoch == best.epoch
    assert evaluate(module, VAL, SPEC)[0] == pytest.approx(best.val_accuracy)


def test_steps_end_training_inside_an_epoch() -> None:
    result = run(network(), epochs=None, steps=8)
    assert (result.steps, result.images, len(result.history)) == (8, 8 * 16, 2)


def test_weights_that_training_only_spoils_are_kept() -> None:
    module = network()
    run(module, epochs=6, learning_rate=2e-2)
    before = copy.deepcopy(module.state_dict())
    result = run(module, epochs=1, learning_rate=5.0, optimizer="sgd", clip_norm=0.5)
    assert result.best_epoch == -1
    assert (result.val_accuracy, result.val_loss < result.history[0].val_loss) == (result.start_accuracy, True)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_divergence_within_the_first_epoch_is_seen() -> None:
    module = network()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(TrainingError, match=r"diverged: mean loss .* in epoch 1, .* at first"):
        run(module, epochs=1, learning_rate=1e4, optimizer="sgd", clip_norm=None)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_validation_loss_that_is_no_number_stops_and_keeps_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    module = network()
    before = copy.deepcopy(module.state_dict())
    figures = iter([(0.3, 1.0), (0.0, math.nan)])
    monkeypatch.setattr(training, "evaluate", lambda *_, **__: next(figures))
    with pytest.raises(TrainingError, match="the validation loss became nan after epoch 1"):
        run(module, epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_patience_stops_when_validation_no_longer_rises() -> None:
    result = run(network(), epochs=30, patience=2, learning_rate=1e-12)
    assert len(result.history) == 3


def test_not_finite_loss_stops_and_keeps_finite_weights() -> None:
    module = network()
    with pytest.raises(
        TrainingError, match=r"the loss became (nan|inf) at step \d+ of .*Lower learning_rate \(now 1e\+30\)"
    ):
        run(module, learning_rate=1e30, optimizer="sgd", clip_norm=None, warmup=0.0)
    assert all(bool(v.isfinite().all()) for v in module.state_dict().values())


def test_divergence_stops_and_keeps_the_best_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    module = network()
    calls: list[int] = []

    def growing(*args: torch.Tensor) -> torch.Tensor:  # finite, but far beyond the first epoch's from the third one on
        calls.append(1)
        return loss_of(*args) * (1 if len(calls) <= 12 else 1e4)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "loss_of", growing)
    best: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(training, "snapshot", lambda m: best.update(copy.deepcopy(m.state_dict())) or dict(best))
    with pytest.raises(
        TrainingError, match=r"diverged: mean loss .* in epoch 3, .* at first; the last good weights are"
    ):
        run(module, epochs=6)
    assert all(torch.equal(value, best[name]) for name, value in module.state_dict().items())


def test_accuracy_and_loss_weigh_images_not_batches() -> None:
    ragged = split(71, 2)  # evaluation batches of 64 and 7
    module = network().eval()
    accuracy, loss = evaluate(module, ragged, SPEC)
    with torch.no_grad():
        logits = torch.cat([module(to_input(ragged.images[i : i + 1], SPEC, "cpu")) for i in range(71)])
    labels = torch.from_numpy(ragged.labels)
    assert accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)


def test_bfloat16_trains_with_float32_weights() -> None:
    module = network()
    result = run(module, precision="bfloat16", epochs=6, learning_rate=2e-2)
    assert result.precision == "bfloat16"
    assert result.val_accuracy >= 0.9
    assert all(p.dtype is torch.float32 for p in module.parameters())


@given(
    weight=st.floats(0.05, 1.0),
    temperature=st.floats(0.5, 8.0),
    seed=st.integers(0, 1000),
)
def test_distillation_loss_is_the_textbook_sum(weight: float, temperature: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(5, 4, generator=generator) * 3 for _ in range(2))
    labels = torch.randint(0, 4, (5,), generator=generator)
    got = loss_of(student, labels, 0.1, teacher, Distillation(nn.Identity(), temperature, weight))
    p, q = (torch.softmax(x / temperature, 1) for x in (teacher, student))
    divergence = (p * (p / q).log()).sum(1).mean()
    expected = (1 - weight) * F.cross_entropy(
        student, labels, label_smoothing=0.1
    ) + weight * temperature**2 * divergence
    assert float(got) == pytest.approx(float(expected), rel=1e-3, abs=1e-5)


def test_student_equal_to_its_teacher_has_no_distillation_loss() -> None:
    logits = torch.randn(6, 3)
    loss = loss_of(logits, torch.zeros(6, dtype=torch.long), 0.0, logits.clone(), Distillation(nn.Identity(), 2.0, 1.0))
    assert float(loss) == pytest.approx(0.0, abs=1e-6)


def test_distilled_student_follows_the_teacher_not_the_labels() -> None:
    teacher = network()
    run(teacher, epochs=6, learning_rate=2e-2)
    wrong = Split(TRAIN.images, (TRAIN.labels + 1) % 3, TRAIN.names)
    student = network()
    finetune(
        student, train=wrong, val=VAL, spec=SPEC, epochs=6, batch_size=16, learning_rate=2e-2, precision="float32",
        distill=Distillation(frozen_copy(teacher), 2.0, 1.0),
    )  # fmt: skip
    assert evaluate(student, VAL, SPEC)[0] >= 0.9


@given(kind=st.sampled_from(["one_cycle", "cosine"]), warmup=st.floats(0, 0.9), done=st.floats(0, 1))
def test_learning_rate_stays_between_zero_and_its_peak(kind: str, warmup: float, done: float) -> None:
    assert 0 < schedule_factor(kind, warmup)(done) <= 1
    assert schedule_factor(kind, warmup)(warmup) == pytest.approx(1, abs=1e-3)
    assert schedule_factor(kind, warmup)(1.0) < 1e-3


def test_vectors_are_not_decayed() -> None:
    module = network()
    groups = make_optimizer(module, "adamw", 1e-3, 0.1).param_groups
    decayed = {id(p) for p in groups[0]["params"]}
    names = {name for name, p in module.named_parameters() if id(p) in decayed}
    assert names == {"0.weight", "5.weight"}
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]


def test_weight_average_of_a_constant_network_is_that_network() -> None:
    module = network()
    average = WeightAverage(module, 0.99)
    for _ in range(3):
        average.update(module)
    assert all(torch.equal(average.state[k], v) for k, v in module.state_dict().items())


def test_reestimated_statistics_are_those_of_the_data() -> None:
    module = network()
    norm = module[1]
    norm.running_mean.fill_(77.0)
    reestimate_batchnorm(module, TRAIN, SPEC, passes=3, seed=0, size=32)
    with torch.no_grad():
        activations = module[0](to_input(TRAIN.images, SPEC, "cpu"))
    assert torch.allclose(norm.running_mean, activations.mean((0, 2, 3)), atol=1e-5)
    assert norm.momentum == 0.1
    assert not math.isnan(float(norm.running_var.sum()))


def test_teacher_shares_nothing_and_cannot_learn() -> None:
    module = network()
    teacher = frozen_copy(module)
    with torch.no_grad():
        module[0].weight.zero_()
    assert float(teacher[0].weight.abs().sum()) > 0
    assert not any(p.requires_grad for p in teacher.parameters())


@given(seed=st.integers(0, 1000), smoothing=st.sampled_from([0.0, 0.1]))
def test_blended_labels_count_by_their_shares(seed: int, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(6, 4, generator=generator)
    labels = torch.randint(0, 4, (6,), generator=generator)
    partners, shares = torch.randperm(6, generator=generator), torch.rand(6, generator=generator)
    soft = shares[:, None] * F.one_hot(labels, 4) + (1 - shares)[:, None] * F.one_hot(labels[partners], 4)
    by_hand = F.cross_entropy(outputs, soft, label_smoothing=smoothing)
    got = loss_of(outputs, labels, smoothing, None, None, (labels[partners], shares))
    assert float(got) == pytest.approx(float(by_hand), rel=1e-4)
    alone = loss_of(outputs, labels, smoothing, None, None, (labels[partners], torch.ones(6)))
    assert float(alone) == pytest.approx(float(loss_of(outputs, labels, smoothing, None, None)), rel=1e-5)


def test_blending_is_learnt_from() -> None:
    module = network()
    result = run(module, epochs=8, learning_rate=2e-2, augment=Augment(flip=False, mixup=0.5))
    assert result.val_accuracy >= 0.9
