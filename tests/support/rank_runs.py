"""Runs on several ranks: how tests start them and read what they wrote."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from support.fork_server import ForkServer

Results = list[dict[str, Any]]


class Launcher:
    """Runs cases on ranks; see ``many_ranks_run.py``."""

    def __init__(self, server: ForkServer, folder: str, out: Path) -> None:
        self._folder, self._out, self._numbers = folder, out, itertools.count()
        orders, writing = os.pipe()
        reading, answers = os.pipe()
        source = "from support import many_ranks_run; many_ranks_run.main()"
        self._process = server.start(source, stdin=orders, stdout=answers, stderr=2)
        for end in (orders, answers):
            os.close(end)
        self._orders, self._answers = os.fdopen(writing, "w"), os.fdopen(reading)
        assert self._say(None) == "ready\n"

    def _say(self, order: Mapping[str, Any] | None) -> str:
        if order is not None:
            self._orders.write(json.dumps(order) + "\n")
            self._orders.flush()
        return self._answers.readline()

    def launch(self, size: int, cases: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], Path]:
        """How the ranks ended, what they printed, and where their results are."""
        out = self._out / str(next(self._numbers))
        out.mkdir()
        order = {
            "folder": self._folder,
            "out": str(out),
            "size": size,
            "limit_s": LIMIT_S,
            "cases": list(cases.items()),
        }
        answer = json.loads(self._say(order))
        return answer, [(out / f"{rank}.log").read_text() for rank in range(size)], out

    def run(self, size: int, cases: Mapping[str, Any]) -> Results:
        """What each rank saw of each case."""
        answer, logs, out = self.launch(size, cases)
        assert answer["codes"] == [0] * size, "\n".join(logs)[-6000:]
        assert not any("sync_dist" in log for log in logs), "Lightning takes values for one rank's"
        return [torch.load(out / f"{rank}.pt") for rank in range(size)]

    def close(self) -> None:
        self._process.kill()
        self._process.wait(30.0)
        self._orders.close()
        self._answers.close()


def assert_same_weights(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, atol=1e-5, rtol=0, msg=name)


def running_in_group(group: int) -> list[str]:
    """Processes, but for those that have ended and that nobody has waited for."""
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, number = path.read_text().rpartition(")")[2].split()[:3]
            if int(number) == group and state != "Z":
                found.append(path.parent.name)
    return found


LIMIT_S = 200.0
