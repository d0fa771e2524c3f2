"""``kill -9`` of the whole training at any moment: each row is accounted for exactly once.

What happened is read from a journal that outlives the process (``kill_resume_run.py``). Steps after
the last checkpoint are done again; what counts is the surviving lineage, so for each version the
last step that the journal has of it.
"""

from __future__ import annotations

import json
import os
import queue
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.fork_server import ForkServer
from support.kill_journal import NUM_ROWS, STEPS, expected_length, make_rows

DEADLINE_S = 200
AT_ONCE = 3
ROWS = {row["id"]: row for row in make_rows()}
LOST = {row["id"] for row in ROWS.values() if row["n"] % 13 == 5 or row["n"] % 9 == 4}
KINDS = [
    *("any time", "publish half", "any time", "write", "score", "any time", "write placed"),
    *("publish", "any time", "step", "start"),
]


class Forks:
    """Orders runs from ``kill_resume_run.py``, and hears of their ends."""

    def __init__(self, server: ForkServer, tmp: Path) -> None:
        orders, writing = os.pipe()
        reading, answers = os.pipe()
        with (tmp / "stderr").open("w") as stderr:
            self._process = server.start(
                "from support import kill_resume_run; kill_resume_run.serve()",
                stdin=orders,
                stdout=answers,
                stderr=stderr.fileno(),
                env={"TMPDIR": str(tmp)},
            )
        for end in (orders, answers):
            os.close(end)
        self._orders, self._words = os.fdopen(writing, "w"), os.fdopen(reading)
        self._answers: dict[int, queue.Queue[dict[str, int]]] = {}
        self._lock = threading.Lock()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def begin(self, seed: int, **order: Any) -> list[int]:
        """Start a run; its process id."""
        with self._lock:
            self._answers[seed] = queue.Queue()
            self._orders.write(json.dumps({"seed": seed, **order}) + "\n")
            self._orders.flush()
        return self._answers[seed].get(timeout=DEADLINE_S)["pids"]

    def has_ended(self, seed: int) -> bool:
        return not self._answers[seed].empty()

    def wait(self, seed: int) -> list[int]:
        return self._answers[seed].get(timeout=DEADLINE_S)["codes"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait(DEADLINE_S)
        self._listener.join()
        self._orders.close()
        self._words.close()

    def _listen(self) -> None:
        for line in self._words:
            answer = json.loads(line)
            if "seed" in answer:
                self._answers[answer["seed"]].put(answer)


@pytest.fixture(scope="module")
def forks(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    forks = Forks(fork_server, tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@dataclass
class Survivor:
    """One seed: killed once or twice, then resumed to the end."""

    seed: int
    folder: Path
    order: dict[str, Any]
    kills: list[str]

    def entries(self, kind: str | None = None, rank: int = 0) -> list[dict[str, Any]]:
        path = self.folder / f"journal.{rank}"
        whole, _, _ = (path.read_text() if path.exists() else "").rpartition("\n")
        return [e for e in map(json.loads, whole.splitlines()) if kind in (None, e["kind"])]


def survive(forks: Forks, seed: int, folder: Path, model: str, size: int = 1) -> Survivor:
    folder.mkdir()
    dice, kind = random.Random(seed), KINDS[seed % len(KINDS)]
    order = {
        "folder": str(folder),
        "model": model,
        "updates_in_flight": bool(dice.randrange(2)),
        "max_head_lag": 3 if kind == "score" else dice.randrange(4),
        "on_overdue": dice.choice(["drop", "wait", "mask"]),
        "size": size,
    }
    run = Survivor(seed, folder, order, [])
    kinds = [kind] if seed % 3 else [kind, "any time"]
    for kind in kinds:
        at = dice.randrange(1, STEPS) if kind != "score" else dice.randrange(1, STEPS // 2)
        before = len(run.entries())
        rank = 0 if kind.startswith("write") else dice.randrange(size)
        aimed = None if kind == "any time" else {"kind": kind, "at": at, "rank": rank}
        pids = forks.begin(seed, kill=aimed, **order)
        if kind == "any time":
            enough = before + dice.randrange(2 * STEPS)
            deadline = time.monotonic() + DEADLINE_S
            while len(run.entries()) < enough and not forks.has_ended(seed):
                assert time.monotonic() < deadline
                time.sleep(0.005)
            time.sleep(dice.random() * 0.1)
            if not forks.has_ended(seed):
                have_met = len(run.entries()) > before  # else others wait half an hour in torch
                for pid in dice.choice([pids, pids[:1], pids[-1:]]) if have_met else pids:
                    with suppress(ProcessLookupError):  # the others end with it
                        os.kill(pid, signal.SIGKILL)
        if -signal.SIGKILL in forks.wait(seed):
            run.kills.append(kind)
    forks.begin(seed, kill=None, **order)
    assert set(forks.wait(seed)) == {0}, (
        f"seed {seed}, {order}: {(folder / 'log').read_text()[-3000:]}"
    )
    return run


def check(run: Survivor) -> None:
    """Every row once, the right tokens, the bound kept, no step but the last one done again."""
    ranks = range(run.order["size"])
    steps = [entry for rank in ranks for entry in run.entries("step", rank)]
    end = run.entries("saving")[-1]
    assert end["version"] == end["step"] == STEPS
    assert not any(entry["diverged"] for entry in run.entries("saving"))
    lineages = [{entry["version"]: entry for entry in run.entries("step", r)} for r in ranks]
    assert all(sorted(lineage) == list(range(STEPS)) for lineage in lineages)
    for entry in steps:  # also those that did not survive
        assert entry["is_right"] and entry["is_conserved"]
        assert entry["lag"] <= run.order["max_head_lag"]
        for row_id, lengths in entry["length"].items():
            assert lengths == [expected_length(ROWS[row_id])] * 2
    trained = [row for line in lineages for entry in line.values() for row in entry["rows"]]
    ended = Counter(trained + end["live"])
    assert len(trained) == 2 * STEPS * len(ranks) and ended.most_common(1)[0][1] == 1, (
        "trained or there twice"
    )
    assert not LOST & set(trained)
    # A row that would have failed may be dropped before it does: the counts go together.
    assert len(set(ROWS) - set(ended)) == num_lost(run.entries()), "lost without a trace"
    done = -1
    for entry in run.entries():
        if entry["kind"] == "start":
            assert entry["version"] in (max(done, 0), done + 1), "more than one step was done again"
        done = entry["version"] if entry["kind"] == "step" else done


def num_lost(entries: list[dict[str, Any]]) -> int:
    """On the surviving lineage; each start begins to count anew, from what was saved."""
    before, saved = 0, {0: 0}
    for entry in entries:
        if entry["kind"] == "start":
            before = saved[entry["version"]]
        elif entry["kind"] == "saving":
            saved[entry["version"]] = before + entry["lost"]
    return saved[STEPS]


def survive_all(
    seeds: range,
    forks: Forks,
    tmp: Path,
    model: str,
    tell: Callable[[str], None],
    size: int = 1,
) -> list[Survivor]:
    begin = time.monotonic()

    def one(seed: int) -> Survivor:
        return survive(forks, seed, tmp / str(seed), model, size)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        runs = list(pool.map(one, seeds))
    for run in runs:
        try:
            check(run)
        except AssertionError as error:
            journal = "\n".join(map(str, run.entries()))
            raise AssertionError(f"seed {run.seed}, {run.order}\n{journal}") from error
    kills = Counter(kind for run in runs for kind in run.kills)
    starts = [e for run in runs for rank in range(size) for e in run.entries("start", rank)]
    again, halves = (sum(entry[key] for entry in starts) for key in ("saved", "halves"))
    tell(
        f"{len(runs)} runs on {size} ranks, killed {kills.total()} times {dict(kills)}, resumed to "
        f"the end: each of {NUM_ROWS} rows accounted for once; {again} segments of unfinished "
        f"rollouts came back, {halves} in the middle of a call; {time.monotonic() - begin:.0f} s"
    )
    assert kills.total() >= len(runs)
    if len(runs) > 10:  # of a few, none may have been in the middle of a call
        assert again >= halves > 0
    return runs


@pytest.mark.timeout(300)
@pytest.mark.fault("process killed", "publish")
@pytest.mark.fault("process killed", "checkpoint")
@pytest.mark.fault("process killed", "score")
@pytest.mark.fault("process killed", "resume")
def test_a_few_kills_lose_nothing_and_repeat_nothing(
    forks: Forks, tmp_path: Path, model_folder: str, tell: Callable[[str], None]
) -> None:
    survive_all(range(1, 6), forks, tmp_path, model_folder, tell)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.fault("process killed", "publish")
@pytest.mark.fault("process killed", "checkpoint")
@pytest.mark.fault("process killed", "score")
@pytest.mark.fault("process killed", "train step")
@pytest.mark.fault("process killed", "resume")
def test_kills_at_fifty_moments_lose_nothing_and_repeat_nothing(
    forks: Forks, tmp_path: Path, model_folder: str, tell: Callable[[str], None]
) -> None:
    runs = survive_all(range(100, 155), forks, tmp_path, model_folder, tell)
    assert {kind for run in runs for kind in run.kills} == set(KINDS)


@pytest.mark.timeout(300)
@pytest.mark.fault("process killed", "gather")
def test_ranks_that_are_killed_lose_nothing_and_repeat_nothing(
    forks: Forks, tmp_path: Path, model_folder: str, tell: Callable[[str], None]
) -> None:
    survive_all(range(200, 203), forks, tmp_path, model_folder, tell, size=2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.fault("process killed", "gather")
def test_ranks_that_are_killed_at_every_kind_of_moment_lose_nothing_and_repeat_nothing(
    forks: Forks, tmp_path: Path, model_folder: str, tell: Callable[[str], None]
) -> None:
    runs = survive_all(range(300, 311), forks, tmp_path, model_folder, tell, size=2)
    assert {kind for run in runs for kind in run.kills} == set(KINDS)
