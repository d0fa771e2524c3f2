"""The tuner on modelled engines and trainers: it ends near the best setting, and it ends."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from sdp_lightning.rollout.concurrency import ConcurrencyTuner, StepMeasure

TOKENS = 4096  # of a batch


@dataclass(frozen=True)
class Machine:
    """Tokens a second by setting, and what training takes, which sampling may slow down."""

    rate: Callable[[int], float]
    train_s: Callable[[int], float]
    bound: int = 48
    start: int = 16

    def step(self, setting: int, noise: float = 1.0) -> StepMeasure:
        """Sampling and training overlap; noise multiplies the time of both."""
        train_s = self.train_s(setting) * noise
        step_s = max(TOKENS / self.rate(setting) * noise, train_s)
        return StepMeasure(step_s, step_s - train_s, TOKENS)

    def speed(self, setting: int) -> float:
        return TOKENS / self.step(setting).step_s

    @property
    def best(self) -> float:
        return max(self.speed(setting) for setting in range(1, self.bound + 1))


MACHINES = {
    "a saturating engine limits": Machine(lambda c: 3000 * c / (c + 6), lambda c: 0.1),
    "an engine that batches poorly": Machine(lambda c: 900.0, lambda c: 1.0),
    "a slow trainer limits": Machine(lambda c: 9000 * c / (c + 3), lambda c: 2.0),
    "training slows down beside sampling": Machine(
        lambda c: 4000 * c / (c + 2), lambda c: 1.2 * (1 + c / 20)
    ),
    "an engine that runs out of memory": Machine(
        lambda c: 200.0 * min(c, 20) / (1 + max(0, c - 20)), lambda c: 0.1
    ),
    "the best is the bound": Machine(lambda c: 50.0 * c, lambda c: 0.1, bound=24, start=8),
    "one group at once": Machine(lambda c: 50.0 * c, lambda c: 0.1, bound=1, start=1),
}


def run(machine: Machine, num_steps: int, *, seed: int | None = None) -> list[int]:
    """The setting of each step."""
    tuner, noise = ConcurrencyTuner(bound=machine.bound, start=machine.start), random.Random(seed)
    used: list[int] = []
    for _ in range(num_steps):
        used.append(tuner.setting)
        factor = 1.0 if seed is None else noise.lognormvariate(0, 0.05)
        tuner.observe(machine.step(tuner.setting, factor))
    return used


@pytest.mark.parametrize("name", MACHINES)
def test_it_ends_within_five_percent_of_the_best_fixed_setting(name: str) -> None:
    machine = MACHINES[name]
    used = run(machine, 300)
    assert machine.speed(used[-1]) >= 0.95 * machine.best, used[-1]
    shares: list[float] = []
    for seed in range(20):
        used = run(machine, 300, seed=seed)
        assert set(used) <= set(range(1, machine.bound + 1))
        shares.append(sum(machine.speed(each) for each in used[200:]) / 100 / machine.best)
    assert sum(shares) / len(shares) >= 0.95, "in the mean of 20 noisy runs"
    assert min(shares) >= 0.9


@pytest.mark.parametrize("name", MACHINES)
def test_it_does_not_oscillate_without_end(name: str) -> None:
    for seed in range(5):
        used = run(MACHINES[name], 4000, seed=seed)
        changes = [i for i in range(1, 4000) if used[i] != used[i - 1]]
        assert len(changes) <= 30
        assert len([i for i in changes if i >= 2000]) <= 2, "one look at a neighbor, and back"


def test_more_groups_at_the_same_speed_are_left_alone() -> None:
    """The trainer limits from 3 groups on: 3 are fresher than 16."""
    assert run(MACHINES["a slow trainer limits"], 300)[-1] <= 3
    assert run(MACHINES["an engine that batches poorly"], 300)[-1] <= 16


def test_its_first_moves_say_why() -> None:
    machine = MACHINES["a saturating engine limits"]
    tuner = ConcurrencyTuner(bound=48, start=20)
    assert (tuner.setting, tuner.reason) == (16, "the first setting")
    while tuner.setting == 16:
        tuner.observe(machine.step(16))
    assert tuner.setting == 24
    assert tuner.reason == "the trainer waited 95% of the time at 16"
    assert tuner.speeds == {16: pytest.approx(3000 * 16 / 22)}


@pytest.mark.parametrize("cut", [1, 7, 40, 90])
def test_a_resumed_tuner_decides_as_the_one_that_went_on(cut: int) -> None:
    machine, noise = MACHINES["training slows down beside sampling"], random.Random(3)
    factors = [noise.lognormvariate(0, 0.05) for _ in range(300)]
    whole = ConcurrencyTuner(bound=48, start=16)
    for factor in factors[:cut]:
        whole.observe(machine.step(whole.setting, factor))
    resumed = ConcurrencyTuner(bound=48, start=16)
    resumed.load_state_dict(whole.state_dict())
    for factor in factors[cut:]:
        assert resumed.setting == whole.setting
        for tuner in (whole, resumed):
            tuner.observe(machine.step(tuner.setting, factor))
    other = ConcurrencyTuner(bound=2, start=2)
    other.load_state_dict(whole.state_dict() | {"setting": 48})
    assert other.setting == 2, "a setting of another bound is not gone on with"


def test_a_step_without_tokens_decides_nothing() -> None:
    tuner = ConcurrencyTuner(bound=48, start=16)
    for _ in range(50):
        tuner.observe(StepMeasure(1.0, 1.0, 0))
    assert tuner.setting == 16 and tuner.speeds == {}
