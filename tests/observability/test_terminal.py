"""A run in a terminal that is ended: by Ctrl-C, by SIGTERM, by a second one; and then goes on."""

from __future__ import annotations

import csv
import getpass
import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

DEADLINE_S = 500.0
TWO = ("--trainer.devices=2", "--trainer.strategy=ddp")


def arguments(folder: Path, *flags: str) -> list[str]:
    script = Path(sys.executable).with_name("sdp-lightning")
    return [
        sys.executable,
        str(script),
        "fit",
        "--config=recipes/tiny_cpu/config.yaml",
        "--trainer.enable_checkpointing=true",
        f"--trainer.default_root_dir={folder}",
        f"--trainer.logger.init_args.save_dir={folder}",
        *flags,
    ]


def environment(folder: Path) -> dict[str, str]:
    """Whatever is made for a while is made in ``folder/tmp``."""
    (folder / "tmp").mkdir(exist_ok=True)
    return os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp")}


@dataclass
class Terminal:
    """A run whose controlling terminal this process holds."""

    folder: Path
    pid: int
    end: int
    words: str = ""

    @classmethod
    def open(cls, folder: Path, *flags: str) -> Terminal:
        pid, end = pty.fork()
        if pid == 0:
            os.chdir(ROOT)
            os.execve(sys.executable, arguments(folder, *flags), environment(folder))
        return cls(folder, pid, end)

    def read(self, until: str = "") -> None:
        """What it says, until it says ``until`` or has ended."""
        deadline = time.monotonic() + DEADLINE_S
        while not until or until not in self.words:
            assert time.monotonic() < deadline, self.words[-3000:]
            if select.select([self.end], [], [], 1.0)[0]:
                try:
                    data = os.read(self.end, 65536)
                except OSError:  # nobody holds the other end any more
                    return
                self.words += data.decode(errors="replace")

    def wait(self) -> int:
        self.read()
        os.close(self.end)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def in_session(session: int) -> list[str]:
    """Processes of it that have not ended."""
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, number = path.read_text().rpartition(")")[2].split()[:4]
            if int(number) == session and state != "Z":
                found.append((path.parent / "cmdline").read_text().replace("\0", " "))
    return found


def end(folder: Path, ways: tuple[str, ...], *flags: str) -> tuple[Terminal, int]:
    """Train until step 6, then end it."""
    run = Terminal.open(folder, *flags)
    run.read(" 6/120")
    for way in ways:
        if way == "ctrl-c":
            os.write(run.end, b"\x03")
        else:
            os.kill(run.pid, signal.SIGTERM)
            run.read("SIGTERM: the run ends after this step")
    status = run.wait()
    assert not in_session(run.pid)
    assert not [name for name in os.listdir("/dev/shm") if str(run.pid) in name]
    left = {path.name for path in (folder / "tmp").iterdir()}
    assert left <= {f"torchinductor_{getpass.getuser()}"}, "torch's cache"
    return run, status


@pytest.mark.parametrize(
    ("ways", "status", "flags"),
    [
        (("ctrl-c",), 1, ()),
        (("SIGTERM",), 128 + signal.SIGTERM, ()),
        (("ctrl-c",), 1, TWO),
    ],
    ids=["ctrl-c", "SIGTERM", "ctrl-c, two processes"],
)
def test_a_run_that_is_told_to_end_saves_leaves_nothing_and_goes_on(
    tmp_path: Path, ways: tuple[str, ...], status: int, flags: tuple[str, ...]
) -> None:
    run, found = end(tmp_path, ways, *flags)
    assert found == status, run.words[-3000:]
    assert "Traceback" not in run.words, run.words
    (saved,) = tmp_path.rglob("*.ckpt")
    step = int(saved.stem.removeprefix("last-stopped-step="))
    assert 6 <= step <= 12 and f"version {step // 2} is saved" in run.words
    again = arguments(tmp_path, "--ckpt_path=last", f"--trainer.max_steps={step + 4}", *flags)
    done = subprocess.run(
        again, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with (tmp_path / "tiny_cpu" / "version_1" / "metrics.csv").open() as file:
        versions = [row["rollout/version"] for row in csv.DictReader(file)]
    assert [float(v) for v in versions if v] == [step // 2 + 1, step // 2 + 2]


def test_a_second_signal_ends_a_run_at_once_and_saves_nothing(tmp_path: Path) -> None:
    run, status = end(tmp_path, ("SIGTERM", "SIGTERM"))
    assert status == 128 + signal.SIGTERM, run.words[-3000:]
    assert not list(tmp_path.rglob("*.ckpt"))
    assert "is saved:" not in run.words and "Traceback" not in run.words, run.words
