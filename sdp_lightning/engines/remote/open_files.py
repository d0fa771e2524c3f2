"""How many connections this process may open: a limit of its own, and no server's fault."""

from __future__ import annotations

import errno
import logging
import os
import resource

from sdp_lightning.errors import EngineError

logger = logging.getLogger(__name__)

_MOST_RESERVED = 64  # files that a run opens beside its requests: weights, logs, pipes
_REMEDY = "Raise it before the run with `ulimit -n 65536`, or lower max_requests."


class OpenFilesError(EngineError):
    """This process, or this machine, has as many files open as it may."""


def connections_allowed(wanted: int) -> int:
    """How many of ``wanted`` connections this process may open beside its other files, at least 1.

    The soft limit is raised, up to the hard one, if that is needed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _num_open() + wanted + _MOST_RESERVED
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    highest = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if highest > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
        logger.info("ulimit -n of this process was raised from %d to %d.", soft, highest)
    if highest == needed:
        return wanted
    allowed = max(1, highest - _num_open() - min(_MOST_RESERVED, highest // 4))
    if allowed < wanted:
        logger.warning(
            "max_requests=%d needs as many connections, but this process may have no more than %d "
            "files open (ulimit -n): it sends %d requests at a time. %s",
            wanted,
            highest,
            allowed,
            _REMEDY,
        )
    return min(wanted, allowed)


def open_files_error(error: OSError) -> OpenFilesError | None:
    """What ``error``, of a connection that was not opened, is if this process opens no file now."""
    if error.errno not in (errno.EMFILE, errno.ENFILE):  # the resolver of names hides it
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as cause:
            error = cause
        else:
            return None
    if error.errno == errno.ENFILE:
        return OpenFilesError("this machine has as many files open as it may (fs.file-max).")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OpenFilesError(f"this process has {soft} files open, as many as it may. {_REMEDY}")


def _num_open() -> int:
    return len(os.listdir("/dev/fd")) - 1  # but for the folder itself
