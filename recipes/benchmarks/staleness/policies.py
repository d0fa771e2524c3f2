"""What the runs of one model and task share, and a correction that is tempered batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from staleness.layers import Layout
from staleness.net import TinyLlama
from staleness.rollouts import Rollouts
from staleness.task import Task
from staleness.trunk import Trunk

from sdp_lightning.objective.effective_sample_size import effective_share
from sdp_lightning.training.batch import Batch

MOST_DRIFT = 5.0  # of a token that the default keeps


class Nets:
    """Policies over one model, which share its frozen layers.

    Args:
        model: where they start.
        task: how long prompts and answers are, and how many layers are frozen.
        num_answers: of a group.
    """

    def __init__(self, model: Any, task: Task, num_answers: int) -> None:
        self._model = model
        self.layout = Layout(num_answers, task.prompt_length, task.max_new_tokens)
        alone = Layout(1, task.prompt_length, task.max_new_tokens)
        self._alone, self._trunks = alone, dict[Layout, Trunk]()
        if task.num_frozen:
            self._trunks[self.layout] = Trunk(model, self.layout, task.num_frozen)
            self._trunks[alone] = Trunk(model, alone, task.num_frozen)

    def policy(self) -> TinyLlama:
        """One that samples and learns groups."""
        return TinyLlama(self._model, self.layout, self._trunks.get(self.layout))

    def tester(self) -> TinyLlama:
        """One whose groups have one answer."""
        return TinyLlama(self._model, self._alone, self._trunks.get(self._alone))


class Shared:
    """What the runs of one model and task need only once.

    The first batches of all methods are of the first weights: who has the same seed and lags has
    the same samples.

    Args:
        model: where policies start.
        task: what is learned.
        num_answers: of a group.
    """

    def __init__(self, model: Any, task: Task, num_answers: int) -> None:
        self.nets = Nets(model, task, num_answers)
        self._rollouts: dict[tuple[Any, ...], Rollouts] = {}

    def rollouts(self, key: tuple[Any, ...], draw: Callable[[], Rollouts]) -> Rollouts:
        """The samples of ``key``; drawn unless an earlier run did."""
        if key not in self._rollouts:
            while len(self._rollouts) >= 64:
                self._rollouts.pop(next(iter(self._rollouts)))
            self._rollouts[key] = draw()
        return self._rollouts[key]


def tempered_exponent(batch: Batch, least_share: float) -> float:
    """The largest exponent of the bridge, of 0, .02, ... 1, that leaves enough of the sample.

    The weight is ``exp(q - b + exponent * (x - q))``, of tokens whose drift is kept.

    Args:
        batch: prepared, with x.
        least_share: least effective sample size, as a share of the tokens.
    """
    assert batch.proximal_logprobs is not None
    x, b = batch.proximal_logprobs, batch.behavior_logprobs
    kept = batch.loss_mask & ((x - b).exp() <= MOST_DRIFT)
    q = batch.segment_logprobs
    first, bridge = (q - b)[kept].double(), (x - q)[kept].double()
    for step in range(50, 0, -1):
        weight = (first + step / 50 * bridge).exp()
        count = weight.new_tensor(float(weight.numel()))
        if float(effective_share(count, weight.sum(), weight.square().sum())) >= least_share:
            return step / 50
    return 0.0
