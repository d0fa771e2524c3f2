"""Files of a run for its report: written as it goes on, and read again.

``report/steps.jsonl`` and ``report/evaluations.jsonl`` are appended to, one line a step.
``report/run.json`` holds settings, ``report/state.json`` samples of the run; both are replaced in
one step. A killed run leaves all but its last moment.
"""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sdp_lightning.config import LossConfig, RolloutConfig, UpdateConfig
from sdp_lightning.config.atomic_files import atomic_file
from sdp_lightning.config.validation import config_from
from sdp_lightning.errors import ConfigError

logger = logging.getLogger(__name__)

FOLDER = "report"
PAGE = "report.html"
VERSION = "rollout/version"


@dataclass(frozen=True)
class Run:
    """Data of a report page.

    Args:
        folder: the run's folder.
        settings: settings of the run, as far as they were kept.
        steps: metrics of every consumed batch, in order of versions.
        evaluations: metrics of every evaluation.
        state: slowest rollouts, reasons of rejections, sampled trajectories, status.
    """

    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    steps: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    evaluations: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    state: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class RunConfigs:
    """Settings that a run is judged by; None for those that were not kept.

    Args:
        rollout: staleness bound, concurrency and batch size.
        loss: the objective.
        update: optimizer steps of a batch.
    """

    rollout: RolloutConfig | None = None
    loss: LossConfig | None = None
    update: UpdateConfig | None = None

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> RunConfigs:
        """The configs whose fields ``settings`` holds under their names."""
        return cls(
            rollout=_config(RolloutConfig, settings.get("rollout")),
            loss=_config(LossConfig, settings.get("loss")),
            update=_config(UpdateConfig, settings.get("update")),
        )


T = TypeVar("T")


def _config(kind: type[T], settings: Mapping[str, Any] | None) -> T | None:
    """A config from what was kept of it; None if it is of a release that this one cannot read."""
    if settings is None:
        return None
    try:
        return config_from(kind, settings)
    except ConfigError:
        return None


class RunWriter:
    """Writes the files of one run, or continues those of the run that it resumes.

    A last line that a kill has torn is removed, or the next one would be lost with it.
    """

    def __init__(self, folder: Path) -> None:
        self.page = folder / PAGE
        self._folder = folder / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.glob("*.jsonl"):
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)

    def settings(self, settings: Mapping[str, Any]) -> None:
        """Replace the settings."""
        self._replace("run.json", settings)

    def state(self, state: Mapping[str, Any]) -> None:
        """Replace the sampled state."""
        self._replace("state.json", state)

    def step(self, row: Mapping[str, float]) -> None:
        """Add the metrics of a step."""
        self._append("steps.jsonl", row)

    def evaluation(self, row: Mapping[str, float]) -> None:
        """Add the metrics of an evaluation."""
        self._append("evaluations.jsonl", row)

    def _append(self, name: str, row: Mapping[str, float]) -> None:
        line = json.dumps({key: float(f"{value:.7g}") for key, value in row.items()})
        with (self._folder / name).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _replace(self, name: str, value: Mapping[str, Any]) -> None:
        with atomic_file(self._folder / name) as file:
            file.write(json.dumps(value).encode())


def read_run(folder: Path) -> Run:
    """Data that ``RunReport`` wrote, or else the metrics of a ``CSVLogger``.

    Raises:
        ConfigError: if there is neither.
    """
    folder = folder.resolve()
    files = folder / FOLDER
    if (files / "run.json").is_file():
        return Run(
            folder,
            settings=_read_json(files / "run.json"),
            steps=_latest(_read_lines(files / "steps.jsonl"), VERSION),
            evaluations=_latest(_read_lines(files / "evaluations.jsonl"), "val/version"),
            state=_read_json(files / "state.json"),
        )
    if (folder / "metrics.csv").is_file():
        return _read_csv(folder)
    near = [path.parent.parent for path in sorted(folder.glob(f"*/{FOLDER}/run.json"))]
    near += [path.parent for path in sorted(folder.glob("*/metrics.csv"))]
    hint = f" Did you mean {near[-1]}?" if near else ""
    raise ConfigError(
        f"{folder} has neither {FOLDER}/run.json nor metrics.csv, so there is no run to report: "
        f"put RunReport() among the Trainer's callbacks.{hint}"
    )


def _read_csv(folder: Path) -> Run:
    steps: list[dict[str, float]] = []
    evaluations: list[dict[str, float]] = []
    for line in csv.DictReader(_whole_lines(folder / "metrics.csv")):
        row = {name: number for name, text in line.items() if (number := _number(text)) is not None}
        if "val/version" in row:
            evaluations.append({k: v for k, v in row.items() if k.startswith("val/")})
        if VERSION in row:
            steps.append({k: v for k, v in row.items() if "/" in k and k[:4] != "val/"})
    return Run(folder, steps=_latest(steps, VERSION), evaluations=evaluations)


def _number(cell: Any) -> float | None:
    """The number in a cell of a table; None if there is none."""
    try:
        return float(cell)
    except (ValueError, TypeError):
        return None


def _latest(rows: list[dict[str, float]], key: str) -> list[dict[str, float]]:
    """Rows without those that a resumed run has done again."""
    kept: list[dict[str, float]] = []
    for row in rows:
        if key in row:
            while kept and kept[-1][key] >= row[key]:
                kept.pop()
            kept.append(row)
    return kept


def _whole_lines(path: Path) -> list[str]:
    """Lines of a file without the last one if a kill has torn it; empty without a file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        logger.warning("%s: its last line was written by half, and is left out.", path)
        lines.pop()
    return lines


def _read_lines(path: Path) -> list[dict[str, float]]:
    """Rows of all lines that hold one."""
    rows: list[dict[str, float]] = []
    for line in _whole_lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)  # pyright: ignore[reportUnknownArgumentType]
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    """What the file holds; empty, with a warning, if it was written by half."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8", errors="replace")))
    except (ValueError, TypeError):
        logger.warning("%s was written by half, and is left out.", path)
        return {}
