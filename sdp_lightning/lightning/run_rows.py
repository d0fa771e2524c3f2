"""The rows of a run: given as they are or by name, loaded and checked in its setup."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from sdp_lightning.config import RolloutConfig
from sdp_lightning.distributed.rank_group import RankGroup
from sdp_lightning.lightning.module import SegmentWisePPOModule
from sdp_lightning.lightning.prompt_epochs import overfitted
from sdp_lightning.lightning.startup import say_unstopped
from sdp_lightning.prompts.iterable_rows import IterableRows
from sdp_lightning.prompts.sources import (
    MOST_AT_ONCE,
    NUM_CHECKED,
    Prompts,
    first_rows,
    load_rows,
    name_of,
    read_rows,
)
from sdp_lightning.rollout.row_checks import RowChecks
from sdp_lightning.types import Row
from sdp_lightning.workflows.workflow import RolloutWorkflow

PROMPTS, VAL_PROMPTS = "prompts", "val_prompts"


class RunRows:
    """Rows to train on and rows to evaluate.

    Args:
        prompts: rows, or what they are loaded from in every setup.
        val_prompts: the same; None is no evaluation.

    Attributes:
        used: rows of the present run, by setting.
    """

    def __init__(self, prompts: Prompts, val_prompts: Prompts | None) -> None:
        # A generator can be wrapped, and read, only once.
        self._prompts, self._val_prompts = (
            rows if rows is None or isinstance(rows, str) else load_rows(rows)
            for rows in (prompts, val_prompts)
        )
        self.used: dict[str, Any] = {}
        self._checks: dict[str, RowChecks] = {}
        self._check: dict[str, Callable[[Sequence[Row]], RowChecks]] = {}
        self._stream: IterableRows | None = None  # what a predict reads,
        self._wanted = 0  # until so many rows are good

    @property
    def has_val(self) -> bool:
        """Whether there are rows to evaluate."""
        return self._val_prompts is not None

    @property
    def names(self) -> dict[str, str | None]:
        """What a run's settings say of the rows."""
        return {PROMPTS: name_of(self._prompts), VAL_PROMPTS: name_of(self._val_prompts)}

    def load(self, stage: str, trainer: Any, rollout: RolloutConfig, predicted: int | None) -> None:
        """Load the rows that ``stage`` needs; of a stream, a ``predict`` reads ``predicted``."""
        assert self._prompts is not None
        if stage == "predict":
            rows = load_rows(self._prompts)
            self.used = {PROMPTS: read_rows(rows, predicted)}
            self._stream = rows if isinstance(rows, IterableRows) and predicted else None
            self._wanted = predicted or 0
            return
        self._stream = None
        self.used = {PROMPTS: overfitted(load_rows(self._prompts), trainer, rollout)}
        if self._val_prompts is not None:
            self.used[VAL_PROMPTS] = read_rows(self._val_prompts)

    def check(
        self,
        workflows: Mapping[str, RolloutWorkflow],
        module: SegmentWisePPOModule,
        rollout: RolloutConfig,
        ranks: RankGroup,
    ) -> None:
        """Check the rows that ``workflows`` roll out, all ranks together.

        Of rows that are read one after another, the first few are checked here, and each of the
        others when it comes.

        Args:
            workflows: by setting; others are not rolled out.
            module: gives the tokenizer.
            rollout: says what becomes of rows with a fault.
            ranks: the ranks that train together.

        Raises:
            ConfigError: if rows have faults, unless they are dropped.
        """
        self._checks = {}
        chosen = {what: flow for what, flow in workflows.items() if what in self.used}
        for what, workflow in chosen.items():
            rows = self.used[what]
            self._check[what] = partial(
                RowChecks,
                workflow=workflow,
                tokenizer=module.tokenizer,
                mode=rollout.prompts_check,
                ranks=ranks,
                what=what,
            )
            self._checks[what] = self._check[what](
                first_rows(rows, NUM_CHECKED) if isinstance(rows, IterableRows) else rows
            )
        for what, check in self._checks.items():
            check.refuse()
            share = check.good_rows(ranks.rank, ranks.size)
            chosen[what].check_prompts(share, module.tokenizer)
            if ranks.rank == 0:
                say_unstopped(module, chosen[what], check.good_rows())

    def keep(self, max_length: int | None) -> None:
        """Keep the rows that fit into ``max_length`` tokens of the engine, if that is known."""
        for what, check in self._checks.items():
            check.max_length = max_length
            if isinstance(self.used[what], IterableRows):
                check.refuse()
            else:
                self.used[what] = self._with_enough(what, check).kept()

    def _with_enough(self, what: str, check: RowChecks) -> RowChecks:
        """``check``, or that of more rows of a stream, if too few of those are good to predict."""
        number, max_length = len(self.used[what]), check.max_length
        while self._stream and check.num_good < self._wanted and number < MOST_AT_ONCE:
            rows = self._stream.head(2 * number)
            if len(rows) == number:
                break  # it has no more
            check, number = self._check[what](rows), len(rows)
            check.max_length = max_length
        return check
