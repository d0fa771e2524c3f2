"""``max_concurrent="auto"``: the tuner at work in a run, on the ledger of one process."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from sdp_lightning.config import RolloutConfig
from sdp_lightning.rollout.concurrency import ConcurrencyTuner, StepMeasure
from sdp_lightning.rollout.groups.registry import GroupRegistry

logger = logging.getLogger(__name__)


class AutoConcurrency:
    """Sets the ledger's ``max_concurrent`` after every step, if the config asks for it.

    Every process chooses for its own groups, by its own measurements. An on-policy run
    (``max_head_lag=0``) has one batch at a time: all of it runs at once, and nothing is tried.

    Attributes:
        tuner: chooses; None if the setting is fixed.
    """

    def __init__(self, registry: GroupRegistry, config: RolloutConfig) -> None:
        self._manager, self._telemetry = registry.manager, registry.telemetry
        self._num_trained = 0  # tokens so far
        self.tuner: ConcurrencyTuner | None = None
        if config.max_concurrent == "auto" and config.max_head_lag:
            self.tuner = ConcurrencyTuner(bound=config.concurrency, start=config.batch_size)
            self._manager.max_concurrent = self.tuner.setting

    def on_step(self, times: Mapping[str, float]) -> dict[str, float]:
        """Set the concurrency of the next step, given the times of the one before.

        Args:
            times: seconds of the step's phases, by the names that are logged.

        Returns:
            The metric of the setting that this step ran at; empty if it is fixed.
        """
        if (tuner := self.tuner) is None:
            return {}
        used, why = tuner.setting, tuner.reason
        before, self._num_trained = self._num_trained, self._telemetry.trained_tokens
        step_s = times["time/step_s"] - times["time/evaluate_s"]
        tokens = self._num_trained - before
        self._manager.max_concurrent = tuner.observe(
            StepMeasure(step_s, times["time/wait_s"], tokens)
        )
        if (tuner.setting, tuner.reason) != (used, why):
            logger.info("max_concurrent='auto': %d from now on: %s.", tuner.setting, tuner.reason)
        return {"rollout/concurrency": float(used)}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it: nothing if the setting is fixed."""
        return {} if self.tuner is None else {"concurrency": self.tuner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of an executor, where it holds any."""
        if self.tuner is not None and "concurrency" in state:
            self.tuner.load_state_dict(state["concurrency"])
            self._manager.max_concurrent = self.tuner.setting
