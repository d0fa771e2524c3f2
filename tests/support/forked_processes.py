"""Scripts that run at once, each in a process of ``support/fork_server.py``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from support.fork_server import Forked, ForkServer


@dataclass(frozen=True)
class Fork:
    """A script that runs. What it prints can be read while it does; its errors are in a file."""

    process: Forked
    stdout: TextIO
    stderr: Path

    @property
    def pid(self) -> int:
        return self.process.pid


@dataclass(frozen=True)
class Ended:
    """How a script has ended: ``returncode`` as that of a ``subprocess.Popen``."""

    returncode: int
    stdout: str
    stderr: str


class Forks:
    """Scripts that run at once, under their names."""

    def __init__(self, server: ForkServer, scripts: Mapping[str, str], folder: Path) -> None:
        self.running: dict[str, Fork] = {}
        for number, (name, script) in enumerate(scripts.items()):
            reading, writing = os.pipe()
            path = folder / f"{number}.err"
            with path.open("w") as errors:
                process = server.start(script, stdout=writing, stderr=errors.fileno())
            os.close(writing)
            self.running[name] = Fork(process, os.fdopen(reading), path)

    def wait(self, timeout_s: float) -> dict[str, Ended]:
        """How all of them have ended."""
        return {
            name: Ended(fork.process.wait(timeout_s), fork.stdout.read(), fork.stderr.read_text())
            for name, fork in self.running.items()
        }

    def close(self) -> None:
        """End those that still run."""
        for fork in self.running.values():
            fork.process.kill()
            fork.stdout.close()


@contextmanager
def forked(server: ForkServer, scripts: Mapping[str, str], folder: Path) -> Iterator[Forks]:
    """Run ``scripts``; none of them is left at the end. Their errors are written to ``folder``."""
    forks = Forks(server, scripts, folder)
    try:
        yield forks
    finally:
        forks.close()
