"""The rows of a run: given as they are or by name, loaded and checked in its setup."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdp_lightning.config import RolloutConfig
from sdp_lightning.distributed.rank_group import RankGroup
from sdp_lightning.lightning.module import SegmentWisePPOModule
from sdp_lightning.lightning.prompt_epochs import overfitted
from sdp_lightning.lightning.startup import say_unstopped
from sdp_lightning.prompts.iterable_rows import IterableRows
from sdp_lightning.prompts.sources import (
    NUM_CHECKED,
    Prompts,
    first_rows,
    load_rows,
    name_of,
    read_rows,
)
from sdp_lightning.rollout.row_checks import RowChecks
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

    @property
    def has_val(self) -> bool:
        """Whether there are rows to evaluate."""
        return self._val_prompts is not None

    @property
    def names(self) -> dict[str, str | None]:
        """What a run's settings say of the rows."""
        return {PROMPTS: name_of(self._prompts), VAL_PROMPTS: name_of(self._val_prompts)}

    def load(
        self, stage: str, trainer: Any, rollout: RolloutConfig, num_batches: int | None
    ) -> None:
        """Load the rows that ``stage`` needs; of a ``predict``, those of ``num_batches``."""
        assert self._prompts is not None
        if stage == "predict":
            most = None if num_batches is None else num_batches * rollout.batch_size
            self.used = {PROMPTS: read_rows(self._prompts, most)}
            return
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
            self._checks[what] = RowChecks(
                first_rows(rows, NUM_CHECKED) if isinstance(rows, IterableRows) else rows,
                workflow,
                module.tokenizer,
                mode=rollout.prompts_check,
                ranks=ranks,
                what=what,
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
                self.used[what] = check.kept()
