"""The hook ``on_rollouts`` of callbacks, and completions as a table in the Trainer's loggers."""

from __future__ import annotations

import csv
import html
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger

from sdp_lightning.config.storable_text import storable
from sdp_lightning.lightning.observer import ROLLOUT_HOOK, Observer
from sdp_lightning.rollout.groups.in_flight import InFlightGroup
from sdp_lightning.types import Row, Trajectory, TrajectoryGroup
from sdp_lightning.workflows.workflow import Tokenizer

logger = logging.getLogger(__name__)

KEY = "completions"
Cells = Mapping[str, Any]


def tell_rollouts(
    trainer: L.Trainer, pl_module: L.LightningModule, taken: Sequence[InFlightGroup]
) -> None:
    """Call ``on_rollouts`` of every callback that has it, with the batch that was taken.

    Its arguments are ``(groups, rows)``, or ``(trainer, pl_module, groups, rows)``.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    groups = [group.finished for group in taken if group.finished is not None]
    rows = [group.row.data for group in taken if group.finished is not None]
    for callback in callbacks:
        hook: Any = getattr(callback, ROLLOUT_HOOK, None)  # foreign: Lightning has no such hook
        if hook is not None and _takes(hook, groups, rows):
            hook(groups, rows)
        elif hook is not None:
            hook(trainer, pl_module, groups, rows)


def _takes(hook: Callable[..., Any], *arguments: Any) -> bool:
    try:
        inspect.signature(hook).bind(*arguments)
    except TypeError:
        return False
    return True


def texts_of(trajectory: Trajectory, tokenizer: Tokenizer) -> tuple[str, str]:
    """The text of the first context, and of all that follows without special tokens."""
    first, *rest = trajectory.parts
    later = [int(token) for part in rest for token in part.token_ids]
    prompt = tokenizer.decode(first.token_ids.tolist(), skip_special_tokens=False)
    return prompt, tokenizer.decode(later, skip_special_tokens=True) if later else ""


class CompletionTables(Observer):
    """Logs completions of every batch as a table named ``completions``.

    W&B, and any logger with ``log_table``, gets a table; TensorBoard a text; MLflow the artifact
    ``completions.json``; a CSVLogger the file ``completions.csv``. ``log_completions`` of the
    ``RolloutConfig`` adds one.

    Args:
        num: the first so many trajectories of a batch, of rank 0.
    """

    lost = "tables of completions, from this step on"

    def __init__(self, num: int) -> None:
        self._num = num

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for each in trainer.loggers:
            if _writer(each) is None:
                logger.warning("log_completions: %s has no tables.", type(each).__name__)

    def on_rollouts(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        groups: Sequence[TrajectoryGroup],
        rows: Sequence[Row],
    ) -> None:
        if not trainer.is_global_zero:
            return
        tokenizer: Any = pl_module.tokenizer
        loop: Any = trainer.fit_loop.epoch_loop
        step: int = loop._batches_that_stepped  # the axis of all that Lightning logs
        members = [(group, each) for group in groups for each in group.trajectories]
        table = [_cells(step, g, each, tokenizer) for g, each in members[: self._num]]
        for each in trainer.loggers:
            if (write := _writer(each)) is not None:
                write(each, table, step)

    def let_go(self) -> None:
        """It holds nothing."""


def add_tables(trainer: L.Trainer, num: int) -> None:
    """Let the fit of ``trainer`` log ``num`` completions a batch; 0 logs none."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks[:] = [c for c in callbacks if not isinstance(c, _AddedTables)]
    if num:
        callbacks.insert(0, _AddedTables(num))


class _AddedTables(CompletionTables):
    """Tables that the setting asked for."""


def _cells(step: int, group: TrajectoryGroup, each: Trajectory, tokenizer: Tokenizer) -> Cells:
    prompt, completion = texts_of(each, tokenizer)
    return {
        "step": step,
        "row_id": storable(group.row_id),
        "prompt": storable(prompt),
        "completion": storable(completion),
        "reward": each.reward,
        **{f"reward/{name}": value for name, value in each.rewards.items()},
        "finish_reason": each.finish_reason,
    }


def _writer(target: Any) -> Callable[[Any, Sequence[Cells], int], None] | None:
    if callable(getattr(target, "log_table", None)):  # foreign: W&B's, and those like it
        return _to_table
    if isinstance(target, TensorBoardLogger):
        return _to_tensorboard
    if isinstance(target, MLFlowLogger):
        return _to_mlflow
    if isinstance(target, CSVLogger) and "://" not in str(target.log_dir):
        return _to_csv
    return None


def _to_table(target: Any, table: Sequence[Cells], step: int) -> None:
    data = [[*cells.values()] for cells in table]
    target.log_table(key=KEY, columns=[*table[0]] if table else [], data=data, step=step)


def _to_tensorboard(target: Any, table: Sequence[Cells], step: int) -> None:
    def row(cells: Sequence[object]) -> str:
        texts = (html.escape(str(cell)).replace("|", "&#124;") for cell in cells)
        return "|" + "|".join("<br>".join(text.splitlines()) for text in texts) + "|"

    lines = [row([*table[0]]), row(["---"] * len(table[0]))] if table else []
    text = "\n".join([*lines, *(row([*cells.values()]) for cells in table)])
    target.experiment.add_text(KEY, text, step)


def _to_mlflow(target: Any, table: Sequence[Cells], step: int) -> None:
    columns = {name: [cells[name] for cells in table] for name in (table[0] if table else ())}
    target.experiment.log_table(target.run_id, data=columns, artifact_file=f"{KEY}.json")


def _to_csv(target: Any, table: Sequence[Cells], step: int) -> None:
    path = Path(target.log_dir) / f"{KEY}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if table and file.tell() == 0:
            writer.writerow(table[0])
        writer.writerows(cells.values() for cells in table)
