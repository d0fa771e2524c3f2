"""``sdp-lightning simulate`` and ``plan``: no number is made up, and a run is shown beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdp_lightning.cli.main import main
from sdp_lightning.cli.measured_run import fit_decode, read_lengths, read_measured
from sdp_lightning.errors import ConfigError
from sdp_lightning.observability.report.files import RunWriter
from support.recordings import write
from support.reports import Page

SETTINGS = {"--batch-size": "2", "--max-head-lag": "1"}
LENGTHS = {"--median-tokens": "10", "--p95-tokens": "10", "--max-tokens": "20"}
SPEEDS = {"--train-token-s": "0.1", "--stage-s": "1", "--load-s": "0"}
GIVEN = SETTINGS | LENGTHS | SPEEDS | {"--group-size": "2", "--decode": "1:2 2:3"}


def run(command: str, options: dict[str, str], *more: str) -> int:
    words = [word for flag, value in options.items() for word in (flag, *value.split())]
    return main([command, *words, *more])


def test_a_simulated_run_is_printed_as_a_table_and_as_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Passes of 1 + 4 * 1 s, 10 of them: 50 s a step with two groups at once."""
    options = GIVEN | {"--steps": "10", "--max-concurrent": "2"}
    assert run("simulate", options) == 0
    table = capsys.readouterr().out
    assert "decode pass: 1 s + 1 s a row.\n7 steps on a virtual clock" in table
    assert "\nstep, median                50 s\n" in table
    assert run("simulate", options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["simulated"]["step_s"] == pytest.approx(50)
    assert found["simulated"]["tokens_per_s"] == pytest.approx(40 / 50)
    assert found["inputs"]["pass_s"] == pytest.approx(1) and found["inputs"]["batch_size"] == 2


def test_a_plan_marks_one_line_and_names_its_settings(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = GIVEN | {"--steps": "6", "--gpus": "3", "--html": str(tmp_path / "plan.html")}
    assert run("plan", options) == 0
    out = capsys.readouterr().out
    assert out.count("\n* ") == 2 and "of 3 GPUs sample, max_concurrent=" in out
    assert run("plan", options, "--json") == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    best = next(plan for plan in plans if plan["is_best"])
    page = Page((tmp_path / "plan.html").read_text())
    assert "Plans for 3 GPUs" in page.text and "GPUs that sample" in page.text
    assert all(f"{plan['max_concurrent']} groups at once" in page.text for plan in plans)
    assert (
        f"* {best['sample_gpus']} of 3 GPUs sample, max_concurrent={best['max_concurrent']}" in out
    )


@pytest.mark.parametrize("flag", GIVEN)
@pytest.mark.parametrize("command", ["simulate", "plan"])
def test_what_is_not_given_is_not_made_up(
    command: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {name: value for name, value in GIVEN.items() if name != flag}
    more = ["--gpus", "4"] if command == "plan" else []
    assert run(command, options, *more) == 2
    error = capsys.readouterr().err
    assert f"{flag} " in error and "is not given" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("plan", {"--decode": "4:2", "--gpus": "4"}, "at two numbers of rows at least"),
        ("plan", {"--gpus": "1"}, "1 GPUs hold no replica of 1 beside 1"),
        ("simulate", {"--decode": "0:2"}, "numbers above 0, got [(0.0, 2.0)]"),
        ("simulate", {"--decode": "inf:2 1:1"}, "numbers above 0, got [(inf, 2.0)"),
        ("simulate", {"--reward-s": "nan"}, "reward_s must be a number of 0 or more, got nan"),
        ("simulate", {"--max-tokens": "9" * 30}, "from the median to 2**31 - 1"),
        ("simulate", {"--max-head-lag": "0", "--max-concurrent": "0"}, "max_concurrent"),
        ("simulate", {"--steps": "3"}, "warmup=3 leaves none of 3 steps"),
        ("simulate", {"--replicas": "0"}, "num_replicas must be an integer of at least 1, got 0"),
        ("simulate", {"--recording": "there"}, "--recording has the lengths already"),
        ("simulate", {"--run": "there"}, "no run to report"),
        ("simulate", {"--prefill-token-s": "0 --recompute-kv"}, "recompute_kv has no effect"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(
    command: str, options: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, GIVEN | options) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "said"),
    [(("--decode", "12"), "'12' is not ROWS:SECONDS"), (("--max-concurrent", "all"), "nor auto")],
)
def test_an_option_that_cannot_be_read_says_its_form(
    option: tuple[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["simulate", *option])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_the_line_of_a_decode_pass_is_fitted_and_never_falls_below_zero() -> None:
    assert fit_decode([(1, 3.0), (4, 9.0), (2, 5.0)]) == pytest.approx((1.0, 2.0))
    assert fit_decode([(8, 2.0), (8, 4.0)]) == (3.0, 0.0)  # one number of rows: no slope
    assert fit_decode([(1, 4.0), (9, 2.0)]) == (3.0, 0.0)  # noise: more rows are not faster
    assert fit_decode([(1, 1.0), (2, 4.0)]) == pytest.approx((0.0, 9 / 5))  # through 0


# Runs ---------------------------------------------------------------------------------------------

STEP = {
    "time/step_s": 10.0,
    "time/wait_s": 2.0,
    "time/train_s": 4.0,
    "time/score_s": 1.0,
    "time/publish_s": 2.0,
    "time/evaluate_s": 0.0,
    "time/paused_s": 0.5,
    "time/sampling_s": 8.0,
    "rollout_time/sample_s": 16.0,
    "rollout_time/tool_s": 0.25,
    "rollout_time/reward_s": 0.5,
    "speed/train_tokens_per_s": 20.0,
    "speed/generated_tokens_per_s": 30.0,
    "train/length": 40.0,
    "lag/mean": 0.75,
    "lag/tokens_0": 50.0,
    "lag/tokens_1": 150.0,
    "rollout/pending": 3.0,
}


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    writer = RunWriter(tmp_path)
    rollout: dict[str, Any] = {"batch_size": 4, "max_head_lag": 1, "max_concurrent": 3}
    writer.settings({"rollout": rollout})
    for version in range(1, 9):
        slow = {"time/step_s": 99.0} if version == 1 else {}  # its pipeline fills
        dropped = {"rollout/dropped_stale": float(version), "rollout/dropped_length": 100.0}
        writer.step(STEP | slow | dropped | {"rollout/version": float(version)})
    return tmp_path


def test_the_speeds_of_a_run_are_read_from_its_metrics(finished: Path) -> None:
    """Six steps of 10 s. 16 s for 40 tokens are 0.4 s a token, of which 0.5 s in 8 are paused. 300
    tokens a step take 120 s of rows, in 8 s: 15 rows.
    """
    run = read_measured(str(finished))
    assert (run.rollout.batch_size, run.rollout.max_concurrent) == (4, 3)
    assert run.decode == pytest.approx((15.0, 0.4 * (1 - 0.5 / 8)))
    assert run.trainer.token_s == pytest.approx(5 / 200)  # training and scoring
    assert run.trainer.step_s == pytest.approx(1.0)  # what is in no phase
    assert (run.trainer.stage_s, run.trainer.load_s) == pytest.approx((1.5, 0.5))
    assert run.reward_s == 0.75
    summary = run.summary
    assert (summary.steps, summary.step_s, summary.tokens_per_s) == (6, 10.0, 20.0)
    assert summary.lag_shares == {0: 0.25, 1: 0.75} and summary.mean_lag == 0.75
    assert summary.dropped_groups == 5 and summary.dropped_share == pytest.approx(500 / 1700)
    assert (summary.wait_share, summary.publish_share) == (0.2, 0.2)
    assert summary.max_pending == 7 and summary.engine_idle_share is None


def test_a_run_is_shown_beside_its_simulation(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = LENGTHS | {"--group-size": "5", "--run": str(finished), "--steps": "8"}
    assert run("simulate", options) == 0
    out = capsys.readouterr().out
    assert "simulated" in out and "measured" in out and "It was measured at 15 rows only" in out
    line = next(line for line in out.splitlines() if line.startswith("lags"))
    assert line.endswith("0: 25%, 1: 75%")
    assert run("simulate", options | {"--batch-size": "2", "--load-s": "3"}, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["measured"]["engine_idle_share"] is None
    inputs = found["inputs"]
    assert (inputs["batch_size"], inputs["load_s"], inputs["stage_s"]) == (2, 3.0, 1.5)


def test_the_lengths_of_a_recording_are_those_of_its_groups(tmp_path: Path) -> None:
    """Three trajectories of 2 + 2 sampled tokens; a prompt of 2 and a tool's output of 1 token."""
    write(tmp_path, [0, 1])
    lengths = read_lengths(str(tmp_path), prompt_tokens=None, seed=0)
    assert lengths.of(5) == (4, 4, 4) and lengths.prompt_tokens == 3
    assert read_lengths(str(tmp_path), prompt_tokens=7, seed=0).prompt_tokens == 7


def test_what_has_no_effect_is_said_or_refused(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"batch_size": 4, "max_head_lag": 1, "missing_proximal": "drop"}
    RunWriter(finished).settings({"rollout": settings | {"num_epochs": 1}})
    options = LENGTHS | {"--group-size": "5", "--run": str(finished), "--steps": "8"}
    assert run("simulate", options | {"--prompt-tokens": "9"}) == 0
    out = capsys.readouterr().out
    assert "--prompt-tokens has no effect: --prefill-token-s is 0.\n" in out
    assert "missing_proximal='drop' of the run is left out" in out
    twice = ["--run", str(finished), "--decode", "1:1", "8:2"]
    assert run("simulate", options, *twice) == 2
    assert "a second --run tells the speed of decoding only" in capsys.readouterr().err


def test_a_run_of_too_few_steps_is_refused(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.settings({})
    writer.step(STEP | {"rollout/version": 1.0})
    with pytest.raises(ConfigError, match="has 1 steps"):
        read_measured(str(tmp_path))
