"""What chats, stop texts and row checks cost, as a share of a step of the demo.

    python recipes/benchmarks/speed/chats_and_rows.py [--steps 6] [--rounds 9]

It runs the demo (``recipes/arithmetic_cpu``) for some steps, and then groups of the demo's size,
rows and tokenizer in pairs, in turn: plain texts and chats on an engine without a model, and chats
without and with the stop text ``</answer>`` on the embedded engine with a tiny model. The
differences of their CPU times, for the groups of a step, are set against a step of the demo: its
seconds or its CPU time, whichever is less. A check of all rows of the demo, made once a run, is
charged to one step whole. At last, 100,000 rows are checked: first without what the cache holds of
them, then with it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import lightning as L
from transformers import AutoModelForCausalLM, AutoTokenizer

import sdp_lightning as sdp
from sdp_lightning.cli.quiet_logs import quiet_logs
from sdp_lightning.config.import_path import load_object
from sdp_lightning.engines.embedded import EmbeddedEngine
from sdp_lightning.errors import SDPError
from sdp_lightning.rollout.row_checks import RowChecks
from sdp_lightning.testing import FakeEngine, tiny_model

RECIPE, GOAL = "recipes/arithmetic_cpu", 0.03
GROUPS, SAMPLES, NEW_TOKENS = 8, 8, 4  # of a step of the demo
REPEATS = 4  # steps that are timed together
STOPS = ("</answer>", "\n")  # the second where only texts of one token are taken
WAIT_S, NUM_ROWS, LONGEST = 300.0, 100_000, 8192


class Steps(L.Callback):
    """Keeps the seconds and the CPU time of every step; stands after WeightSyncCallback."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self._last = (0.0, 0.0)

    def on_train_batch_end(self, *_: Any) -> None:
        now = time.perf_counter(), time.process_time()
        self.steps.append((now[0] - self._last[0], now[1] - self._last[1]))
        self._last = now


def step_of_demo(steps: int) -> tuple[float, float]:
    """Median seconds and CPU seconds of a step, without the first two."""
    timer = Steps()
    settings = {"max_steps": steps + 2, "callbacks": None, "logger": False}
    settings |= {"enable_progress_bar": False, "limit_val_batches": 0}
    overrides = {f"trainer.{name}": value for name, value in settings.items()}
    trainer, model, data = sdp.from_config(f"{RECIPE}/config.yaml", overrides)
    trainer.callbacks.append(timer)  # type: ignore[attr-defined]
    trainer.fit(model, data)
    wall, cpu = zip(*timer.steps[2:], strict=True)
    return statistics.median(wall), statistics.median(cpu)


class Rollouts:
    """Groups of the demo's prompts, and the CPU time that those of a step take.

    Args:
        folder: the tiny model's; empty: a fake engine, which computes nothing.
        tokenizer: the demo's.
        rows: the demo's.
        settings: of the workflow.
    """

    def __init__(self, folder: str, tokenizer: Any, rows: Sequence[Any], **settings: Any) -> None:
        workflow = sdp.RLVRWorkflow(
            lambda text, row: float(len(text)),
            group_size=SAMPLES,
            sampling=sdp.SamplingParams(max_new_tokens=NEW_TOKENS),
            **settings,
        )
        self._engine = EmbeddedEngine(folder, device="cpu") if folder else FakeEngine()
        self._model = AutoModelForCausalLM.from_pretrained(folder) if folder else None
        self._executor = sdp.create_workflow_executor(
            config=sdp.RolloutConfig(batch_size=GROUPS, max_head_lag=0, timeout_s=WAIT_S),
            engine=self._engine,
            workflow=workflow,
            prompts=rows,
            tokenizer=tokenizer,
        )
        self._engine.start()
        self._version = 0
        self._publish()

    def _publish(self) -> None:
        weights = [] if self._model is None else list(self._model.state_dict().items())
        self._executor.publish(weights, self._version, reset=self._version == 0)
        self._executor.resume()

    def step(self) -> float:
        """CPU seconds of the groups of one step, and of the publish that lets the next ones go."""
        start = time.process_time()
        for _ in range(REPEATS):
            self._executor.take(timeout_s=WAIT_S)
            self._version += 1
            self._publish()
        return (time.process_time() - start) / REPEATS

    def close(self) -> None:
        """End rollouts and engine."""
        self._executor.close()
        self._engine.close()


def cost(without: Rollouts, having: Rollouts, rounds: int) -> float:
    """CPU seconds that ``having`` takes for a step beyond those of ``without``; closes both."""
    try:
        for each in (without, having):
            each.step()  # the first has what is done once
        pairs = [(without.step(), having.step()) for _ in range(rounds)]
        return statistics.median(b - a for a, b in pairs)
    finally:
        without.close()
        having.close()


def cost_of_stop(tokenizer: Any, rows: Sequence[Any], rounds: int) -> tuple[float, str]:
    """CPU seconds that a stop text adds to a step, and that text."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(vocab_size=len(tokenizer)).save_pretrained(folder)
        for stop in STOPS:
            pair = [
                Rollouts(folder, tokenizer, rows, use_chat_template=True, stop=stops)
                for stops in ((), (stop,))
            ]
            try:
                return cost(pair[0], pair[1], rounds), stop
            except SDPError as error:
                print(f"{stop!r} is refused: {str(error)[:100]}")
    sys.exit("no stop text was taken")


def seconds_of_check(rows: Sequence[Any], tokenizer: Any, *, chat: bool) -> float:
    """Seconds of a check of ``rows``."""
    workflow = sdp.RLVRWorkflow(
        "sdp_lightning.rewards.text:exact_match",
        use_chat_template=chat,
        sampling=sdp.SamplingParams(max_new_tokens=NEW_TOKENS),
    )
    start = time.perf_counter()
    checks = RowChecks(rows, workflow, tokenizer)
    checks.max_length = LONGEST
    assert len(checks.kept()) == len(rows)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    quiet_logs()
    rows: Any = load_object(f"{RECIPE}/task.py:rows")
    make_path: Any = load_object(f"{RECIPE}/model.py:model_path")
    model_path = make_path()  # in the user's cache folder
    with tempfile.TemporaryDirectory() as cache:
        tokenizer: Any = AutoTokenizer.from_pretrained(model_path)
        wall, cpu = step_of_demo(options.steps)
        step = min(wall, cpu)
        print(f"a step of the demo: {wall:.2f} s, {cpu:.2f} s of CPU")
        plain, chats = (
            Rollouts("", tokenizer, rows, use_chat_template=chat) for chat in (False, True)
        )
        rendering = cost(plain, chats, options.rounds)
        print(f"chats: {1e3 * rendering:.1f} ms of CPU a step, {rendering / step:.2%}")
        stopping, stop = cost_of_stop(tokenizer, rows, options.rounds)
        print(f"stop text {stop!r}: {1e3 * stopping:.1f} ms of CPU a step, {stopping / step:.2%}")
        os.environ["XDG_CACHE_HOME"] = cache
        checks = seconds_of_check(rows, tokenizer, chat=True)
        print(f"check of the demo's {len(rows)} rows: {1e3 * checks:.1f} ms, {checks / step:.2%}")
        total = (max(rendering, 0.0) + max(stopping, 0.0) + checks) / step
        print(f"together {total:.2%} of a step (goal: under {GOAL:.0%})")
        for chat in (False, True):
            many = [
                {"id": str(n), "prompt": f"{rows[n % len(rows)]['prompt']} {n}", "answer": "1"}
                for n in range(NUM_ROWS)
            ]
            first, again = (seconds_of_check(many, tokenizer, chat=chat) for _ in range(2))
            kind = "chats" if chat else "texts"
            print(f"{NUM_ROWS:,} {kind} checked in {first:.1f} s, in {again:.1f} s when cached")
    sys.exit(int(total >= GOAL))


if __name__ == "__main__":
    main()
