"""The one moment at which segments of the version before are scored, in every training step."""

from __future__ import annotations

from sdp_lightning.lightning.module import SegmentWisePPOModule
from sdp_lightning.lightning.phase_timer import PhaseTimer
from sdp_lightning.rollout.executor import WorkflowExecutor


class ScoreWindow:
    """Has the executor score under the weights of a step's version, once a step.

    The window opens when the batch is taken and the publish of the version has ended, so that all
    segments of the version before are there, and shuts when the first optimizer step of the batch
    moves the weights. A publish that is still under way when the step begins is waited for at the
    end of the window only, between backward pass and optimizer step.
    """

    def __init__(self) -> None:
        self._is_due = False

    def open(
        self, module: SegmentWisePPOModule, executor: WorkflowExecutor, timer: PhaseTimer
    ) -> None:
        """Begin a step: score now, unless that would wait for a publish."""
        self._is_due = module.loss.needs_segment_scores
        if not executor.publisher.is_under_way:
            self.shut(module, executor, timer)

    def shut(
        self, module: SegmentWisePPOModule, executor: WorkflowExecutor, timer: PhaseTimer
    ) -> None:
        """Score at the latest now: the weights are about to change. Else it does nothing."""
        if not self._is_due:
            return
        self._is_due = False
        if executor.scores_segments:
            timer.enter("publish")
            executor.publisher.finish()
        timer.enter("score")
        executor.recompute(module)
        timer.enter("train")
