"""A report in a real browser: it draws, asks nobody for anything, and complains of nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from sdp_lightning.observability.report import write_report
from sdp_lightning.observability.report.learning import SIGNALS
from support.reports import Page, make_step, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--enable-logging=stderr", "--v=0"),
    "--host-resolver-rules=MAP * ~NOTFOUND",  # it would look for updates
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium: apt-get install chromium, or run .ci/setup-chromium"
    ),
]


def browse(profile: Path, path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Open ``path`` in a browser that has never been used."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browsed")
    signals = {signal.name: 0.5 for signal in SIGNALS} | {"train/reward/" + "a_name_" * 12: 1.0}
    steps = [make_step(version, lag__mean=version / 100) | signals for version in range(1, 41)]
    validated = [{"val/version": 20.0, "val/reward": 0.5}, {"val/version": 40.0, "val/reward": 0.6}]
    drawn = {"html": "<p>hi</p>", "row_id": "r", "version": 3, "reward": 1.0, "mean_reward": 0.5}
    drawn["row"] = {"answer": "42", "a field": "x" * 160}
    state = {"status": "finished", "samples": {"best": [drawn], "random": [drawn]}}
    return write_report(write_run(folder / "a run", steps, evaluations=validated, state=state))


def requests_in(net_log: Path) -> Sequence[str]:
    """Addresses that the page asked for, by the browser's log; it asks some of its own accord."""
    events = [event.get("params", {}) for event in json.loads(net_log.read_text())["events"]]
    asked = {p["url"] for p in events if p.get("initiator", "not an origin") != "not an origin"}
    return sorted(url for url in asked if not url.startswith(("file:", "data:")))


@pytest.fixture(scope="module")
def visit(
    report: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str, Path]]:
    """(the page as the browser has it, what it complained of, its log of the network)."""
    folder = tmp_path_factory.mktemp("visit")
    log = folder / "net.json"
    done = browse(folder / "profile", report, "--dump-dom", f"--log-net-log={log}")
    yield done.stdout, done.stderr, log


def test_the_page_loads_whole_and_its_numbers_are_the_metrics(
    visit: tuple[str, str, Path],
) -> None:
    page = Page(visit[0])
    assert page.values["steps"] == 40
    assert page.values["wait.share"] == pytest.approx(0.25)
    assert page.shown["wait.share"] == "25%"
    assert page.values["lag/mean"] == 0.4
    assert page.values["val.last"] == 0.6
    assert page.shown["phase.all"] == "100.0%"
    assert page.samples == ["best", "random"]
    assert page.ids == [
        *(
            "advice",
            "reward",
            "learning",
            "time",
            "floor",
            "lag",
            "rollouts",
            "trajectories",
            "all",
        ),
    ]


def test_nothing_is_asked_for_on_the_network(visit: tuple[str, str, Path]) -> None:
    assert requests_in(visit[2]) == []


def test_the_console_is_silent(visit: tuple[str, str, Path]) -> None:
    assert [line for line in visit[1].splitlines() if "CONSOLE" in line] == []


def test_the_browser_would_have_told_of_a_broken_page(tmp_path: Path) -> None:
    """The checks above see what they look for."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<!doctype html><img src="http://127.0.0.1:9/x.png"><script>console.error("oh")</script>'
    )
    log = tmp_path / "net.json"
    done = browse(tmp_path / "profile", bad, "--dump-dom", f"--log-net-log={log}")
    assert any("CONSOLE" in line and "oh" in line for line in done.stderr.splitlines())
    assert "http://127.0.0.1:9/x.png" in requests_in(log)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_drawn_in_the_light_and_in_the_dark(
    report: Path, tmp_path: Path, scheme: str
) -> None:
    from matplotlib.image import imread

    shot = tmp_path / "shot.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    size = ["--window-size=1200,1600", f"--screenshot={shot}"]
    browse(tmp_path / "profile", report, *size, *dark)
    pixels = imread(shot)[..., :3]
    background = pixels[5, 5].mean()
    assert background > 0.9 if scheme == "light" else background < 0.15
    assert pixels.std() > 0.05  # something is on it
    colors = {tuple(color) for color in (pixels[::7, ::7].reshape(-1, 3) * 8).astype(int).tolist()}
    assert len(colors) > 12  # charts, not text alone


@pytest.mark.parametrize("width", [1280, 500, 380], ids=["desk", "tablet", "phone"])
def test_nothing_is_wider_than_the_page_and_texts_keep_their_size(
    report: Path, tmp_path: Path, width: int
) -> None:
    """Measured by the browser in a frame of that width: a window is not made as narrow."""
    script = """<script>onload = () => {
        const size = getComputedStyle(document.querySelector(".chart")).fontSize;
        const axis = document.querySelector(".xs span").getBoundingClientRect().height;
        const fits = [...document.querySelectorAll(".chart")].every(c => c.clientWidth > 200);
        const wide = document.documentElement.scrollWidth;
        parent.postMessage([wide, size, axis, fits].join(" "), "*"); }</script></body>"""
    (tmp_path / "copy.html").write_text(report.read_text().replace("</body>", script))
    frame = tmp_path / "frame.html"
    frame.write_text(
        "<!doctype html><script>onmessage = e => document.title = e.data</script>"
        f'<iframe src="copy.html" style="border:0;width:{width}px;height:900px"></iframe>'
    )
    done = browse(tmp_path / "profile", frame, "--dump-dom")
    measured = re.search(r"<title>(.+)</title>", done.stdout)
    assert measured is not None and measured[1] == f"{width} 12px 16 true"
