"""How many groups run at once: chosen from the steps before, for ``max_concurrent="auto"``.

Pure: measurements in, a setting out; no clock, no threads. A *setting* is a number of groups at
once, its *speed* is trained tokens a second, which takes in all that it changes: how well the
engine batches, what sampling takes from a trainer on the same cores, and the tokens that go stale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SETTLE = 2  # steps after a change that are not measured: their groups began before it
MEASURED = 4  # steps of a measurement
WAIT_SHARE = 0.05  # a trainer that waits for less than this has groups enough
RISE = 0.02  # a smaller gain in speed is not worth more groups at once, which are staler
STEEP = 0.1  # a neighbor that is so much slower than the best may hide a better one between them
_TABLES = ("speeds", "waits")
PATIENCE = 4  # measurements before the first look at a neighbor of the chosen setting


@dataclass(frozen=True)
class StepMeasure:
    """One step: its duration, the part of it that the trainer waited, and its trained tokens."""

    step_s: float
    wait_s: float
    tokens: int


@dataclass
class _State:
    """What a checkpoint holds. ``speeds`` and ``waits`` are those of the settings tried so far."""

    setting: int
    reason: str
    chosen: int | None = None  # None: the search goes on
    on_ladder: bool = True  # False: it looks between the settings of the ladder
    to_skip: int = SETTLE
    steps: list[list[float]] = field(default_factory=list[list[float]])
    speeds: dict[int, float] = field(default_factory=dict[int, float])
    waits: dict[int, float] = field(default_factory=dict[int, float])
    patience: int = PATIENCE
    num_left: int = PATIENCE


class ConcurrencyTuner:
    """Searches the setting with the highest speed, and the smallest one within 2 % of it.

    It goes up while the trainer waits and the speed rises, down while groups wait for the trainer.
    Every setting is tried once; then the best is kept, and one neighbor is tried again after
    4, 8, 16, ... measurements, so the changes of a run grow with the logarithm of its length.

    Args:
        bound: largest setting, ``(max_head_lag + 1) * batch_size``: more cannot run. What the
            engine's memory allows shows in its speed.
        start: the first setting.
    """

    def __init__(self, *, bound: int, start: int) -> None:
        self.settings = _ladder(bound)
        first = max(setting for setting in self.settings if setting <= max(1, start))
        self._state = _State(first, "the first setting")

    @property
    def setting(self) -> int:
        """Groups at once from now on."""
        return self._state.setting

    @property
    def reason(self) -> str:
        """Why it is this setting, as a clause."""
        return self._state.reason

    @property
    def speeds(self) -> Mapping[int, float]:
        """Trained tokens a second of each setting that was measured, as last measured."""
        return dict(sorted(self._state.speeds.items()))

    def observe(self, measure: StepMeasure) -> int:
        """Take in a step that ran at ``setting``; returns the setting of the next one."""
        state = self._state
        if state.to_skip:
            state.to_skip -= 1
            return state.setting
        state.steps.append([measure.step_s, measure.wait_s, float(measure.tokens)])
        if len(state.steps) < MEASURED:
            return state.setting
        step_s, wait_s, tokens = (sum(column) for column in zip(*state.steps, strict=True))
        state.steps = []
        if step_s <= 0 or tokens <= 0:
            return state.setting
        state.waits[state.setting] = wait_s / step_s
        self._note_speed(tokens / step_s)
        if state.chosen is None:
            self._search()
        elif state.setting == state.chosen:
            self._wait()
        else:
            self._judge_neighbor()
        return state.setting

    def state_dict(self) -> dict[str, Any]:
        """Numbers, texts, lists and dicts, from which the same decisions follow."""
        state = asdict(self._state)
        return state | {name: [[*item] for item in state[name].items()] for name in _TABLES}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; begin anew if it tried settings beyond the bound of this run."""
        fields: dict[str, Any] = dict(state)
        fields |= {name: {int(key): float(value) for key, value in state[name]} for name in _TABLES}
        if max([fields["setting"], *fields["speeds"]]) <= self.settings[-1]:
            self._state = _State(**fields)

    def _note_speed(self, speed: float) -> None:
        state = self._state
        if state.setting == state.chosen:  # measured again and again: its noise averages out
            speed = (state.speeds[state.setting] + speed) / 2
        state.speeds[state.setting] = speed

    def _search(self) -> None:
        state = self._state
        if state.on_ladder and self._climb():
            return
        state.on_ladder = False
        best = max(state.speeds, key=lambda setting: state.speeds[setting])
        between = self._between(best)
        if between is not None:
            self._move(between, f"between {best}, the fastest so far, and a slower one")
            return
        enough = (1 - RISE) * state.speeds[best]
        state.chosen = min(setting for setting, speed in state.speeds.items() if speed >= enough)
        why = f"the fastest of {len(state.speeds)} that were tried, or within {RISE:.0%} of it"
        self._move(state.chosen, why)

    def _climb(self) -> bool:
        """Whether there is another setting of the ladder to try, which is now in force."""
        state, place = self._state, self.settings.index(self._state.setting)
        wait = state.waits[state.setting]
        if wait < WAIT_SHARE:
            lower = self.settings[max(0, place - 1)]
            if lower in state.speeds:
                return False
            self._move(lower, f"groups waited for the trainer at {state.setting}")
            return True
        above = self.settings[min(place + 1, len(self.settings) - 1)]
        if above in state.speeds or not self._rises(place):
            return False
        self._move(above, f"the trainer waited {wait:.0%} of the time at {state.setting}")
        return True

    def _between(self, best: int) -> int | None:
        """A setting that was not tried, half-way from ``best`` to a much slower one beside it."""
        tried = sorted(self._state.speeds)
        place = tried.index(best)
        for other in (*tried[place + 1 : place + 2], *reversed(tried[:place][-1:])):
            is_steep = self._state.speeds[other] < (1 - STEEP) * self._state.speeds[best]
            if is_steep and abs(other - best) > max(1, best // 8):
                return (best + other) // 2
        return None

    def _rises(self, place: int) -> bool:
        """Whether one of the two highest settings tried is faster than all below them."""
        speeds = [
            self._state.speeds[s] for s in self.settings[: place + 1] if s in self._state.speeds
        ]
        return len(speeds) < 3 or max(speeds[-2:]) > (1 + RISE) * max(speeds[:-2])

    def _wait(self) -> None:
        state = self._state
        state.num_left -= 1
        if state.num_left > 0:
            return
        state.patience *= 2
        state.num_left = state.patience
        all_settings = sorted({*self.settings, *state.speeds})
        waits = state.waits[state.setting] >= WAIT_SHARE
        neighbor = all_settings.index(state.setting) + (1 if waits else -1)
        if 0 <= neighbor < len(all_settings):
            self._move(all_settings[neighbor], f"tried beside {state.setting}")

    def _judge_neighbor(self) -> None:
        state, chosen = self._state, self._state.chosen
        assert chosen is not None
        gain = state.speeds[state.setting] / state.speeds[chosen] - 1
        if gain >= (RISE if state.setting > chosen else 0.0):
            state.chosen, state.reason = state.setting, f"{gain:.0%} faster than {chosen}"
        else:
            self._move(chosen, f"{state.setting} was not faster")

    def _move(self, setting: int, reason: str) -> None:
        state = self._state
        state.to_skip = SETTLE if setting != state.setting else 0
        state.setting, state.reason = setting, reason


def _ladder(bound: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... up to ``bound``, which is the last one."""
    steps = {factor * 2**power for factor in (2, 3) for power in range(bound.bit_length())}
    return sorted({1, bound} | {step for step in steps if step < bound})
