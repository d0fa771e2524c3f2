"""Reward workers under bubblewrap or nsjail, two well-kept sandboxes of Linux.

A worker there has no network, sees the files of the machine and may write none of them, and has a
``/tmp``, ``/run`` and processes of its own. It still reads what its user may read, and has the
environment variables of the trainer. GPUs are not to be had.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from sdp_lightning.errors import ConfigError

Sandbox = Literal["bwrap", "nsjail"]
SANDBOXES: tuple[Sandbox, ...] = get_args(Sandbox)
REMEDIES = {
    "bwrap": "install bubblewrap 0.7 or later (apt install bubblewrap)",
    "nsjail": "install nsjail (https://github.com/google/nsjail)",
}
_HIDDEN = ("/tmp", "/run")  # others' files, and the sockets of services
_TMP_BYTES = 2**30  # memory that files in a worker's /tmp may take
_RUN_BYTES = 2**20
_TRIAL_S = 30.0


def in_sandbox(
    sandbox: Sandbox, command: Sequence[str], *, files: Iterable[str] = (), descriptor: int = -1
) -> list[str]:
    """``command`` as a command line that runs it in a sandbox.

    Args:
        sandbox: name of the tool.
        command: the command and its arguments.
        files: files and folders that stay visible, read-only, also below ``/tmp`` and ``/run``.
        descriptor: open file that the command inherits.
    """
    here = os.getcwd()
    visible = _below_hidden((*files, here, sys.prefix, sys.base_prefix, *sys.path))
    if sandbox == "bwrap":
        mounts = [part for path in visible for part in ("--ro-bind", path, path)]
        return [
            *("bwrap", "--unshare-all", "--die-with-parent", "--new-session"),
            *("--cap-drop", "ALL", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev"),
            *("--size", str(_TMP_BYTES), "--tmpfs", "/dev/shm"),
            *("--size", str(_TMP_BYTES), "--tmpfs", "/tmp"),
            *("--size", str(_RUN_BYTES), "--tmpfs", "/run"),
            *(*mounts, "--chdir", here, "--", *command),
        ]
    mounts = [part for path in visible for part in ("--bindmount_ro", path)]
    passed = ["--pass_fd", str(descriptor)] if descriptor >= 0 else []
    return [
        *("nsjail", "--mode", "o", "--really_quiet", "--chroot", "/", "--cwd", here),
        *("--keep_env", "--disable_rlimits", "--time_limit", "0", *passed),
        *("--mount", f"none:/dev/shm:tmpfs:mode=1777,size={_TMP_BYTES}"),
        *("--mount", f"none:/tmp:tmpfs:mode=1777,size={_TMP_BYTES}"),
        *("--mount", f"none:/run:tmpfs:size={_RUN_BYTES}"),
        *(*mounts, "--", *command),
    ]


def why_unusable(sandbox: Sandbox) -> str:
    """Why no worker can run in ``sandbox`` here, with the remedy; empty if a trial of it runs."""
    if sys.platform != "linux":
        return f"{sandbox} runs on Linux only: leave out the sandbox."
    if shutil.which(sandbox) is None:
        return f"{sandbox} is not installed: {REMEDIES[sandbox]}."
    trial = in_sandbox(sandbox, [sys.executable, "-I", "-S", "-c", "print('in a sandbox')"])
    try:
        ended = subprocess.run(trial, capture_output=True, timeout=_TRIAL_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{sandbox} is installed, and does not work: {error}."
    if ended.stdout.strip() == b"in a sandbox":
        return ""
    said = ended.stderr.decode(errors="replace").strip() or "it says nothing"
    return (
        f"{sandbox} is installed, and a trial of it ended with exit status {ended.returncode}: "
        f"{said[-500:]}. It needs user namespaces, which containers and "
        "kernel.apparmor_restrict_unprivileged_userns=1 forbid: allow them, or leave out the "
        "sandbox."
    )


def refuse_unusable(sandbox: str | None) -> None:
    """Raise ``ConfigError`` unless ``sandbox`` is None, or one that works here."""
    if sandbox is None:
        return
    if sandbox not in SANDBOXES:
        raise ConfigError(f"sandbox must be bwrap, nsjail or None; got {sandbox!r}.")
    if reason := why_unusable(sandbox):
        raise ConfigError(f"sandbox={sandbox!r}: {reason}")


def _below_hidden(paths: Iterable[str]) -> list[str]:
    """Those of ``paths`` that exist and would be hidden, parents first."""
    known = {form for path in paths for form in (os.path.abspath(path), os.path.realpath(path))}
    return sorted(
        path
        for path in known
        if any(path.startswith(f"{folder}/") for folder in _HIDDEN) and os.path.exists(path)
    )
