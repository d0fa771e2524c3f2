"""Helpers of the tests of reports: a page, read as a browser would, and runs to make one of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """What is on a page: values by key, ids, advice, samples; and whether it is well formed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.values: dict[str, float] = {}
        self.shown: dict[str, str] = {}
        self.ids: list[str] = []
        self.advice: list[str] = []
        self.samples: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self._key: str | None = None
        self.feed(text)
        self.close()
        assert self._open == [], f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        if tag not in VOID:
            self._open.append(tag)
        if "data-key" in found:
            self._key = found["data-key"]
            self.values[self._key] = float(found["data-value"])
        self.ids += [found["id"]] if "id" in found else []
        self.advice += [found["data-kind"]] if "data-kind" in found else []
        self.samples += [found["data-sample"]] if "data-sample" in found else []
        self.links += [found[name] for name in ("href", "src") if name in found]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1] == tag, f"</{tag}> in {self._open}"
        self._open.pop()
        self._key = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._key is not None:
            self.shown[self._key] = data


def write_run(
    folder: Path,
    steps: list[dict[str, float]],
    *,
    settings: Mapping[str, Any] | None = None,
    evaluations: list[dict[str, float]] | None = None,
    state: Mapping[str, Any] | None = None,
) -> Path:
    """The files of a run, as ``RunReport`` leaves them."""
    files = folder / "report"
    files.mkdir(parents=True)
    (files / "run.json").write_text(json.dumps(settings or {}))
    (files / "state.json").write_text(json.dumps(state or {}))
    for name, rows in (("steps", steps), ("evaluations", evaluations or [])):
        (files / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_step(version: int, **changes: float) -> dict[str, float]:
    """The metrics of a step that a page reads, with names written ``time__wait_s``."""
    row = {
        "rollout/version": float(version),
        "train/reward": version / 10,
        "time/step_s": 2.0,
        "time/wait_s": 0.5,
        "time/train_s": 1.0,
        "time/sampling_s": 1.5,
        "lag/mean": 0.5,
        **{f"lag/share_{lag}": share for lag, share in (("0", 0.5), ("1", 0.5))},
        **{f"lag/tokens_{lag}": 50.0 for lag in "01"},
        **{f"ess/token_{lag}": value for lag, value in (("0", 1.0), ("1", 0.9))},
        **{f"loss/clip_fraction_high_{lag}": 0.125 for lag in "01"},
        **{f"loss/clip_fraction_low_{lag}": 0.125 for lag in "01"},
        **{f"rollout/{name}": 3.0 for name in ("running", "pending")},
        **{f"rollout/{name}": 0.0 for name in ("dropped_stale", "dropped_overdue")},
        **{f"speed/{side}_tokens_per_s": 100.0 for side in ("generated", "train")},
    }
    return row | {name.replace("__", "/"): value for name, value in changes.items()}
