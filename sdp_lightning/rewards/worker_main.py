"""Where the process of a worker begins, with ``main(SOCKET_FD, PARENT_PID)``: as its keeper.

:class:`~sdp_lightning.rewards.worker_process.WorkerProcess` starts it. It becomes the subreaper of
all that the reward leaves running (Linux), so children that called ``setsid`` are found and ended
as well. It ends when the trainer's end of the socket closes, and when the thread that started it
ends (Linux).
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys

from sdp_lightning.rewards.worker_channel import number_tag, send
from sdp_lightning.rewards.worker_keeper import Keeper, RewardGoneError, TrainerGoneError

LOST_BETWEEN_CALLS = 75  # exit status: the reward process ended or wrote while it was not called

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 1, 4, 36


def main(descriptor: int, parent: int) -> None:
    """Serve the trainer until the worker ends. Never returns.

    Args:
        descriptor: file descriptor of the socket to the trainer.
        parent: process id of the trainer; 0 if it has no number here (in a sandbox).
    """
    notes: list[str] = []
    if sys.platform == "linux":
        notes = _prepare_linux(parent)
    else:
        notes.append("children of a reward that call setsid outlive it: only Linux finds them.")
    status = 0
    trainer = socket.socket(fileno=descriptor)
    trainer.set_inheritable(False)
    keeper = Keeper(trainer, parent)
    try:
        send(trainer, number_tag(0), json.dumps(notes).encode())
        keeper.serve()
    except RewardGoneError:
        status = LOST_BETWEEN_CALLS
    except (TrainerGoneError, ConnectionError):
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        keeper.end()
        os._exit(status)


def _prepare_linux(parent: int) -> list[str]:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if parent and os.getppid() != parent:
        os._exit(1)
    libc.prctl(_PR_SET_DUMPABLE, 0)  # other processes of the user may not open its files
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1) == 0:
        return []
    return ["children of a reward that call setsid outlive it: this kernel has no subreaper."]
