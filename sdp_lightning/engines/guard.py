"""Runs a command and ends its whole process group when standard input closes.

``python -m sdp_lightning.engines.guard COMMAND...``. The other end of standard input is held by the
process that started this one, so it closes also when that one is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

GRACE_S = 10.0


def main(command: list[str]) -> int:
    """Run ``command``; returns its exit status."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it goes to the group, which this one leads
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_default_signals)

    def end_with_parent() -> None:
        while sys.stdin.buffer.read(4096):
            pass
        os.killpg(0, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(0, signal.SIGKILL)  # itself included: nobody of the group is left

    threading.Thread(target=end_with_parent, daemon=True).start()
    status = child.wait()
    if status != 0:
        os.killpg(0, signal.SIGTERM)  # what the child has left behind
    return status


def _default_signals() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
