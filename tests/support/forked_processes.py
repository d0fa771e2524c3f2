"""Runs scripts in processes forked from one that has the libraries loaded: to load them takes 7 s.

Each script runs as ``python -c`` would run it, as the first process of a session of its own. The
process that they are forked from runs no tensor operation, so a fork finds no thread that it would
have to go without.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO


@dataclass(frozen=True)
class Fork:
    """A script that runs. What it prints can be read while it does; its errors are in a file."""

    pid: int
    stdout: TextIO
    stderr: Path


@dataclass(frozen=True)
class Ended:
    """How a script has ended: ``returncode`` as that of a ``subprocess.Popen``."""

    returncode: int
    stdout: str
    stderr: str


class Forks:
    """Scripts that run at once, under their names."""

    def __init__(self, scripts: Mapping[str, str], folder: Path) -> None:
        ends = {name: os.pipe() for name in scripts}
        orders: list[dict[str, Any]] = [
            {"script": script, "stdout": ends[name][1], "stderr": str(folder / f"{number}.err")}
            for number, (name, script) in enumerate(scripts.items())
        ]
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(orders)],
            pass_fds=[writing for _, writing in ends.values()],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for _, writing in ends.values():
            os.close(writing)
        assert self._process.stdout is not None
        pids: list[int] = json.loads(self._process.stdout.readline())
        self.running = {
            name: Fork(pid, os.fdopen(ends[name][0]), Path(order["stderr"]))
            for name, pid, order in zip(scripts, pids, orders, strict=True)
        }

    def wait(self, timeout_s: float) -> dict[str, Ended]:
        """How all of them have ended."""
        words, _ = self._process.communicate(timeout=timeout_s)
        codes: list[int] = json.loads(words)
        return {
            name: Ended(code, fork.stdout.read(), fork.stderr.read_text())
            for (name, fork), code in zip(self.running.items(), codes, strict=True)
        }

    def close(self) -> None:
        """End those that still run."""
        if self._process.poll() is None:
            for fork in self.running.values():
                with suppress(ProcessLookupError):
                    os.kill(fork.pid, signal.SIGKILL)
        self._process.communicate()
        for fork in self.running.values():
            fork.stdout.close()


@contextmanager
def forked(scripts: Mapping[str, str], folder: Path) -> Iterator[Forks]:
    """Run ``scripts``; none of them is left at the end. Their errors are written to ``folder``."""
    forks = Forks(scripts, folder)
    try:
        yield forks
    finally:
        forks.close()


def begin(order: Mapping[str, Any], orders: Sequence[Mapping[str, Any]]) -> None:
    """Be a session's first process, with output of its own."""
    os.setsid()
    os.dup2(order["stdout"], 1)
    os.dup2(os.open(order["stderr"], os.O_WRONLY | os.O_CREAT), 2)
    for each in orders:
        os.close(each["stdout"])


if __name__ == "__main__":
    import transformers.models.llama.modeling_llama  # noqa: F401

    import support.trainers  # noqa: F401  (loaded here, once)

    given = json.loads(sys.argv[1])
    started: list[int] = []
    for one in given:
        if (pid := os.fork()) == 0:
            begin(one, given)
            break
        started.append(pid)
    else:
        print(json.dumps(started), flush=True)
        for one in given:
            os.close(one["stdout"])
        statuses = [os.waitpid(pid, 0)[1] for pid in started]
        print(json.dumps([os.waitstatus_to_exitcode(status) for status in statuses]))
        sys.exit()
    exec(compile(one["script"], "<script>", "exec"), {"__name__": "__main__"})
