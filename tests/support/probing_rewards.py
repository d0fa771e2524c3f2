"""Rewards that try what limits and sandboxes forbid, and the ways of ``misbehaving_rewards``."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.misbehaving_rewards import WAYS, loop


def reward(completion: str, row: Mapping[str, Any]) -> Any:
    return (PROBES | WAYS)[completion](row)


def num_interfaces(row: Any) -> float:
    return float(len(socket.if_nameindex()))


def may_write(row: Any) -> float:
    with contextlib.suppress(OSError):
        Path(row["file"]).write_text("x")
        return 1.0
    return 0.0


def may_read(row: Any) -> float:
    return float(Path(row["file"]).exists())


def num_processes(row: Any) -> float:
    return float(len(list(Path("/proc").glob("[0-9]*"))))


def hang_as(row: Any) -> float:
    """Hangs, and so does a program in a session of its own that has a name."""
    text = "import time; time.sleep(3600)"
    subprocess.Popen([sys.executable, "-c", text, row["name"]], start_new_session=True)
    return loop(row)


def open_files(row: Any) -> float:
    """Opens ``row["num"]`` files: how many it can."""
    files: list[Any] = []
    with contextlib.suppress(OSError):
        while len(files) < row["num"]:
            files.append(open(os.devnull))  # noqa: SIM115 # all at once
    return float(len(files))


def open_files_of_a_child(row: Any) -> float:
    text = (
        "files = []\n"
        "try:\n"
        f"    while len(files) < {row['num']}: files.append(open('/dev/null'))\n"
        "except OSError: pass\n"
        "print(len(files))\n"
    )
    return float(subprocess.check_output([sys.executable, "-c", text]))


def write_bytes(row: Any) -> float:
    return float(Path(row["file"]).write_bytes(bytes(row["num"])))


PROBES = {
    function.__name__: function
    for function in list(globals().values())
    if callable(function) and getattr(function, "__module__", None) == __name__
}
