"""Self-contained HTML page about a run: no scripts, no fonts, no network."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from sdp_lightning.config.atomic_files import atomic_file
from sdp_lightning.observability.report import learning, sections
from sdp_lightning.observability.report.advice import Advice, advice_on
from sdp_lightning.observability.report.charts import number
from sdp_lightning.observability.report.files import PAGE, Run, RunConfigs, read_run
from sdp_lightning.observability.report.markup import card, duration, escape, section, table, value
from sdp_lightning.observability.report.rollouts import rollouts
from sdp_lightning.observability.report.time_breakdown import time_breakdown
from sdp_lightning.training.metrics.names import (
    FAMILIES,
    NAMED_REWARD,
    OTHERS,
    reward_names,
)

logger = logging.getLogger(__name__)

RUNNING = "running"  # the status until the run ends
WHY = "still running, or killed, or without its RunReport, which was set aside"
ICONS = {"bad": "Change", "hint": "Consider", "good": "Good"}
KINDS = {
    "mixed": "Most versions in one",
    "best": "Highest reward",
    "worst": "Lowest reward",
    "random": "Random",
}


def write_report(folder: str | Path) -> Path:
    """Write the page of the run in ``folder`` into that folder; returns its path.

    A run that has not ended is named in a warning, with the number of steps that are there.

    Raises:
        ConfigError: if there is no run.
    """
    run = read_run(Path(folder))
    if run.state.get("status") == RUNNING:
        logger.warning(
            "%s is not whole: it has %d steps. The run is %s.", folder, len(run.steps), WHY
        )
    path = run.folder / PAGE
    document = page(run)
    with atomic_file(path) as file:
        file.write(document.encode("utf-8", "backslashreplace"))
    return path


def page(run: Run) -> str:
    """The document."""
    breakdown = time_breakdown(run.steps)
    name = escape(f"{run.folder.parent.name}/{run.folder.name}")
    body = [
        f"<header><h1>{name}</h1><p>{_headline(run)}</p></header>",
        sections.cards(run, breakdown),
        section(
            "advice",
            "What to change",
            _advice(advice_on(run.steps, RunConfigs.read(run.settings))),
            "Judged by the later half of the steps; the numbers above are of all of them.",
        ),
        learning.rewards(run),
        learning.signals(run),
        sections.times(run, breakdown),
        sections.lags(run),
        rollouts(run),
        _samples(run.state),
        section("all", "Everything", _settings(run.settings) + _metrics(run.steps)),
        f"<footer>{_footer(run)}</footer>",
    ]
    return document(f"{name}: run report", "".join(body), run.state.get("style", ""))


def document(title: str, body: str, style: str = "") -> str:
    """A self-contained page in the style of a report.

    Args:
        title: title, as HTML.
        body: content, as HTML.
        style: further style elements.
    """
    css = (files("sdp_lightning.observability.report") / "style.css").read_text("utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{title}</title><style>\n{css}</style>{style}</head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _headline(run: Run) -> str:
    words = [f"{value('steps', len(run.steps), f'{len(run.steps):,}')} batches"]
    if (breakdown := time_breakdown(run.steps)) is not None:
        words.append(f"in {duration(breakdown.total_s)}")
    for key, label in (("model", "of"), ("engine", "with engine"), ("started", "started")):
        if key in run.settings:
            words.append(f"{label} {escape(run.settings[key])}")
    status = run.state.get("status", "")
    if status == RUNNING:
        status = WHY
    return " ".join(words) + (f" &middot; {escape(status)}" if status else "")


def _advice(advices: Sequence[Advice]) -> str:
    items = "".join(
        f'<li class="{advice.tone}" data-kind="{advice.kind}"><b>{ICONS[advice.tone]}</b>'
        f"{escape(advice.text)}</li>"
        for advice in advices
    )
    return (
        f'<ul class="advice">{items}</ul>' if items else '<p class="empty">Nothing stands out.</p>'
    )


def _samples(state: Mapping[str, Any]) -> str:
    parts: list[str] = []
    for kind, title in KINDS.items():
        for sample in state.get("samples", {}).get(kind, ()):
            facts = (
                f"row {sample['row_id']}, trained at version {sample['version']}; reward "
                f"{number(sample['reward'])}, mean of its group {number(sample['mean_reward'])}"
            )
            for name, reward in sample.get("rewards", {}).items():
                facts += f"; {name} {number(reward)}"
            box = f'<div class="sample" data-sample="{kind}"><p class="sub">'
            row = "".join(
                f"<div><dt>{escape(name)}</dt> <dd>{escape(text)}</dd></div> "
                for name, text in (sample.get("row") or {}).items()
            )
            row = f'<dl class="row">{row}</dl>' if row else ""
            parts.append(f"{box}<b>{title}</b>: {escape(facts)}</p>{row}{sample['html']}</div>")
    note = "Tokens are colored by the policy version that sampled them; hover for their numbers."
    return section("trajectories", "Trajectories", "".join(parts), note)


def _settings(settings: Mapping[str, Any]) -> str:
    rows = [
        [("", f"<code>{escape(name)}</code>"), ("", f"<code>{escape(setting)}</code>")]
        for part, inner in settings.items()
        for name, setting in (
            {f"{part}.{key}": v for key, v in inner.items()}
            if isinstance(inner, dict)
            else {part: inner}
        ).items()
    ]
    if not rows:
        return ""
    return f"<details><summary>Settings</summary>{card('', table(['', ''], rows))}</details>"


def _metrics(steps: Sequence[Mapping[str, float]]) -> str:
    meanings = {entry.name: entry.meaning for entries in OTHERS.values() for entry in entries}
    for family in FAMILIES:
        for name in family.names:
            lag = name.removeprefix(family.name).lstrip("_").replace("plus", "+")
            meanings[name] = family.meaning + (f", lag {lag}" if lag else "")
    for name in reward_names(steps):
        meanings[NAMED_REWARD + name] = meanings[f"{NAMED_REWARD}<name>"]
    rows = [
        [
            ("", f"<code>{escape(name)}</code>"),
            ("n", value(name, last, number(last))),
            ("", escape(meanings.get(name, ""))),
        ]
        for name, last in sorted((steps[-1] if steps else {}).items())
    ]
    body = card("", table(["metric", "#last batch", ""], rows))
    return f"<details><summary>All metrics of the last batch</summary>{body}</details>"


def _footer(run: Run) -> str:
    own = run.state.get("own_share")
    cost = "" if own is None else f" Keeping its data took {own:.2%} of the run's time."
    return f"Made by sdp-lightning report {escape(run.folder)}.{cost}"
