"""The error tree: ``except SDPError`` catches everything that this package raises on purpose."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path


class SDPError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(SDPError, ValueError):
    """A setting is out of range, or two settings contradict each other."""


class RowsError(ConfigError):
    """Rows of a data set cannot be trained on.

    Args:
        message: names the first of them.
        faults: index of each such row, and what is wrong with it.
    """

    def __init__(self, message: str, faults: Mapping[int, str]) -> None:
        super().__init__(message)
        self.faults = dict(faults)


class EngineError(SDPError):
    """An inference engine failed, or refuses a request."""


class RolloutError(SDPError):
    """A rollout (workflow, reward or the data they returned) failed."""


class InfrastructureError(RolloutError):
    """What a sample needs failed, through no fault of policy, code or data: a judge timed out.

    Raised by a reward, an environment, a tool or a workflow, it leaves one sample out of its group.

    Args:
        cause: one of a few texts, by which such errors are counted. Details belong to the error
            that it is raised from.
    """

    def __init__(self, cause: str = "unknown") -> None:
        super().__init__(cause)
        self.cause = str(cause) or "unknown"


class RolloutTimeout(SDPError, TimeoutError):
    """A wait for rollouts passed its deadline; nothing was lost."""


class VersionError(SDPError, ValueError):
    """A policy version is malformed, or is not the next one."""


class RankError(SDPError):
    """Another process of this training failed, is late, or is gone."""


class HangError(SDPError):
    """The trainer's thread showed no sign of life; the Watchdog raises it there."""


class CheckpointError(SDPError):
    """A checkpoint is torn, damaged, or could not be read or written."""


class RecordingError(SDPError):
    """A recording of rollouts is missing, damaged, or does not fit the model to train."""


_PACKAGE = Path(__file__).parent


_INSTALLED = ("site-packages", "dist-packages", "lib/python3", "<frozen", "<string>")


TRACEBACK = "SDP_TRACEBACK"  # environment variable: show the traceback instead


def error_text(error: BaseException) -> str:
    """The message of an error, after the name of its class unless it is one of ours.

    >>> error_text(KeyError("gold"))
    "KeyError: 'gold'"
    """
    text = message_of(error)
    return text if isinstance(error, SDPError) and text else f"{type(error).__name__}: {text}"


def message_of(error: BaseException) -> str:
    """``str(error)``, or that it cannot be made: an error may raise when it is printed."""
    try:
        return str(error)
    except BaseException as unprintable:
        return f"(its message cannot be made: {type(unprintable).__name__})"


def explain(error: BaseException) -> str:
    """A line for the terminal: the message, its notes, and the position in the user's code."""
    text = message_of(error) or type(error).__name__
    lines = [text, *vars(error).get("__notes__", [])]
    place = user_place(error)
    if place is not None:
        lines.append(f"It came from {place}.")
    return " ".join(line.strip() for part in lines for line in part.splitlines() if line.strip())


def user_place(error: BaseException) -> str | None:
    """File, line and function of the user's code closest to the cause; None if there is none.

    Code that this package called counts, not the script or notebook that called ``fit``.
    """
    frames = [frame for cause in _causes(error) for frame in _own_frames(cause)]
    return frames[-1] if frames else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, then its cause, and so on."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__


def _own_frames(error: BaseException) -> Iterator[str]:
    frames = traceback.extract_tb(error.__traceback__)
    inside = False  # whether the package has been entered: its callers are not the cause
    for frame in frames:
        path = Path(frame.filename)
        if path.is_relative_to(_PACKAGE):
            inside = True
        elif inside and not any(part in frame.filename for part in _INSTALLED):
            yield f"{path}:{frame.lineno}, in {frame.name}"
