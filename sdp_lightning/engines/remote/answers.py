"""Reading what servers answer, as far as it is the same for all backends. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

from sdp_lightning.engines.remote.backend import Call
from sdp_lightning.engines.remote.responses import describe
from sdp_lightning.errors import EngineError
from sdp_lightning.types import FinishReason

PROBE_TOKENS = 5  # alternatives whose log-probs a probe asks for
FINISH_REASONS: Mapping[str | None, FinishReason | None] = {
    **{"stop": "stop", "length": "length", "abort": "abort"},
    None: None,
}
MAX_LENGTH = 2**31  # tokens of a sequence that a server may say it takes
MAX_WORKERS = 2**12  # processes that a server may say it has
METRICS = Call("GET", "/metrics", answer="text")  # SGLang has it with --enable-metrics
_SAMPLED = re.compile(r"^\w+:generation_tokens_total(?:\{.*\})? (\S+)", re.MULTILINE)
# Raised where JSON has another form than expected.
_MALFORMED = (KeyError, IndexError, TypeError, ValueError, OverflowError, AttributeError)


@contextmanager
def reading(server: str, path: str, expected: str, answer: Any) -> Generator[None]:
    """Context that reads ``answer``; raises ``EngineError`` if it lacks what is ``expected``."""
    try:
        yield
    except _MALFORMED as error:
        raise unexpected(server, path, f"{expected} ({describe(error)})", answer) from error


def unexpected(server: str, path: str, expected: str, answer: Any) -> EngineError:
    """The error for an answer that lacks what is ``expected``."""
    return EngineError(f"{server} answered {path} without {expected}: {describe(answer)}")


def check_done(server: str, path: str, answer: Any, field: str, value: object) -> None:
    """Refuse an answer whose ``field`` is not ``value``; None accepts any non-empty value."""
    with reading(server, path, field, answer):
        answered = answer[field]
    if answered != value if value is not None else not answered:
        raise unexpected(server, path, f"{field}: {value or 'one a worker'}", answer)


def check_temperature(
    at_one: Mapping[Any, float], at_half: Mapping[Any, float], *, remedy: str
) -> None:
    """Refuse a server whose log-probs are the same at temperatures 1 and 0.5.

    Args:
        at_one: log-probs of some tokens at temperature 1, nats.
        at_half: the same at temperature 0.5.
        remedy: how to start the server instead.
    """
    common = at_one.keys() & at_half.keys()
    if common and max(abs(at_one[token] - at_half[token]) for token in common) <= 1e-6:
        raise EngineError(
            "the server's log-probs ignore the temperature, so they are not those of the sampled "
            f"distribution. {remedy}"
        )


def read_edges(spans: Any) -> tuple[tuple[str, int, int], ...]:
    """``(version, start, end)`` of each span of tokens that one version sampled."""
    return tuple((text(s["version"]), integer(s["start"]), integer(s["end"])) for s in spans)


def read_sampled(metrics: Any) -> float:
    """Tokens sampled since the server started, from what Prometheus would read.

    >>> read_sampled('vllm:generation_tokens_total{engine="0"} 7.0')
    7.0
    """
    with reading("the server", METRICS.path, "generation_tokens_total", metrics):
        first, *others = map(float, _SAMPLED.findall(text(metrics)))
        return first + sum(others)  # one for each engine of the server


# Values of JSON: each raises ``TypeError`` or ``ValueError`` for one of another type or range. ----


def text(value: Any) -> str:
    """The string that ``value`` is."""
    if not isinstance(value, str):
        raise TypeError(f"{describe(value)} is no string")
    return value


def integer(value: Any, least: int = 0, most: int = MAX_LENGTH) -> int:
    """The integer that ``value`` is; true is none, nor is 3.0."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{describe(value)} is no integer from {least} to {most}")
    return value


def tokens(values: Any) -> tuple[int, ...]:
    """The token ids that ``values`` are; none if there are no values."""
    found = tuple(values or ())
    if not set(map(type, found)) <= {int}:
        raise TypeError("not all tokens are integers")
    return found


def numbers(values: Iterable[Any]) -> tuple[float, ...]:
    """The numbers that ``values`` are, as floats; true is none, nor is "3"."""
    found = tuple(values)
    if not set(map(type, found)) <= {int, float}:
        raise TypeError("not all log-probs are numbers")
    return tuple(map(float, found))
