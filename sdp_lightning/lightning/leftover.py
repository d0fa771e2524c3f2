"""Rollouts of a fit that has ended: for a checkpoint made after it, or for another fit."""

from __future__ import annotations

import weakref
from typing import Any

from sdp_lightning.lightning.module import SegmentWisePPOModule
from sdp_lightning.rollout.executor import WorkflowExecutor


class Leftover:
    """What a closed executor leaves behind.

    Attributes:
        checkpoint: state for a checkpoint that is saved after the fit. Empty if several ranks
            trained, since they can no longer gather it.
    """

    def __init__(self) -> None:
        self.checkpoint: dict[str, Any] = {}
        self._rollouts: dict[str, Any] = {}
        self._version = 0
        self._module: weakref.ReferenceType[SegmentWisePPOModule] | None = None

    @property
    def is_resumable(self) -> bool:
        """Whether another fit may go on with these rollouts."""
        return self._module is not None

    def keep(
        self,
        executor: WorkflowExecutor,
        module: SegmentWisePPOModule,
        *,
        num_ranks: int,
        is_resumable: bool,
        epoch_left: int | None,
    ) -> None:
        """Keep the state of ``executor``; another fit of ``module`` may resume a resumable one."""
        state = executor.state_dict()
        if num_ranks == 1:
            self.checkpoint = {"ranks": [state], "epoch_left": epoch_left}
        if is_resumable:
            self._rollouts, self._version = state, executor.version
            self._module = weakref.ref(module)

    def resume(
        self, executor: WorkflowExecutor, module: SegmentWisePPOModule, version: int
    ) -> None:
        """Load the rollouts if they belong to ``module`` at ``version``. They are used up."""
        if self._module is not None and self._module() is module and self._version == version:
            executor.load_state_dict(self._rollouts)
        self.discard()

    def discard(self) -> None:
        """No fit resumes from these rollouts any more."""
        self._rollouts, self._module = {}, None
