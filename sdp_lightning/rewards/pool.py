"""A reward in worker processes: one call may hang, crash or eat memory, and costs one sample."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack

from sdp_lightning.config.import_path import load_object
from sdp_lightning.errors import ConfigError, InfrastructureError, RolloutError
from sdp_lightning.rewards.foreign_code import needs_workers
from sdp_lightning.rewards.reward_path import import_path_of
from sdp_lightning.rewards.sandbox import Sandbox, refuse_unusable
from sdp_lightning.rewards.timeouts import call_aside_if_long
from sdp_lightning.rewards.value import LostZero, Score
from sdp_lightning.rewards.worker_limits import MIB, WorkerLimits
from sdp_lightning.rewards.worker_process import CallOutcome, WorkerSettings
from sdp_lightning.rewards.worker_threads import Tally, WorkerThreads

logger = logging.getLogger(__name__)

Policy = Literal["leave_out", "zero", "reject", "raise"]
Row = Mapping[str, Any]

_LONGEST_S = 1e9
_POLICIES = ("leave_out", "zero", "reject", "raise")
_CAUSES = {"timed_out": "took too long", "out_of_memory": "ran out of memory"}
_SHOWN = 200  # characters of a row or a completion in a warning


class RewardRejected(RolloutError):
    """A reward is missing, and the pool's policy is to reject its group."""


@dataclass(frozen=True)
class RewardCounts:
    """How the calls of a pool ended.

    Attributes:
        value: calls that returned a number.
        raised: calls in which the reward raised, or returned no finite number.
        infrastructure: calls in which the reward raised an ``InfrastructureError``.
        timed_out: calls that were killed at the deadline.
        out_of_memory: calls that needed more than ``limits.memory_mb``.
        crashed: calls that ended their process: a segmentation fault, ``os._exit``.
        verifier_raised: calls of ``value`` in which a library's verifier raised on the completion,
            which counts as 0.
    """

    value: int = 0
    raised: int = 0
    infrastructure: int = 0
    timed_out: int = 0
    out_of_memory: int = 0
    crashed: int = 0
    verifier_raised: int = 0

    @property
    def killed(self) -> int:
        """Calls that cost their worker process."""
        return self.timed_out + self.out_of_memory + self.crashed


class MoreSettings(TypedDict, total=False):
    """Settings of a :class:`RewardPool` that are rarely changed, by their names.

    Attributes:
        max_killed_in_a_row: so many lost processes without an answer between them are an error;
            100.
        start_s: longest start of a process in seconds, with the imports of the reward; 120.
        memory_bytes: ``limits.memory_mb`` in bytes, as it was set before there were limits.
    """

    max_killed_in_a_row: int
    start_s: float
    memory_bytes: int | None


class RewardPool:
    """``await pool(completion, row)``, in one of ``num_workers`` workers with a hard deadline.

    A worker whose call hangs, crashes or runs out of memory is killed with its children, and
    replaced at the next call. Workers start at the first call, import the reward once, and fork a
    process for each call, which runs it on its main thread, so it may use signals. They share
    neither memory nor CUDA context with the trainer. They end with ``close``, with the pool, and
    with the trainer however it ends (on Linux also in the middle of a call). Any number of event
    loops may share a pool; a copy and a forked process start workers of their own.

    Args:
        reward: ``"package.module:name"``, ``"path/to/file.py:name"`` or a function at the top level
            of a module; plain or async.
        num_workers: number of workers, which is the number of calls at once.
        timeout_s: longest call in seconds, without the wait for a worker.
        on_kill: fate of a sample whose call costs its worker: ``"leave_out"`` of its group, by an
            ``InfrastructureError``; ``"zero"``: its reward is 0; both with a warning that names the
            row. ``"reject"`` its group; or ``"raise"``. None is ``"zero"`` for a reward that is
            ``workers_only``, which a bad answer can hang or crash, and else ``"leave_out"``.
        on_error: the same for a reward that raises, or returns no number.
        limits: memory, processes and files that a worker may have.
        sandbox: tool that workers run under: ``"bwrap"`` or ``"nsjail"`` (Linux). No network,
            files read-only, ``/tmp`` and processes of their own; it is tried at once.
        fork_calls: whether each call runs in a forked process, so that nothing it changes (a cache,
            a module, the reward itself) is seen by later calls. A reward that starts threads or
            CUDA while it is loaded cannot be forked, which is warned of. False runs all calls of a
            worker in one process.
        more: ``max_killed_in_a_row``, ``start_s`` and ``memory_bytes``.

    Raises:
        ConfigError: if a setting is out of range, the reward cannot be imported elsewhere, or the
            sandbox does not work here.
    """

    def __init__(
        self,
        reward: str | Callable[..., Any],
        *,
        num_workers: int = 2,
        timeout_s: float = 10.0,
        on_kill: Policy | None = None,
        on_error: Policy = "raise",
        limits: WorkerLimits | None = None,
        sandbox: Sandbox | None = None,
        fork_calls: bool = True,
        **more: Unpack[MoreSettings],
    ) -> None:
        if unknown := set(more) - set(MoreSettings.__annotations__):
            raise TypeError(f"RewardPool has no setting {sorted(unknown)}.")
        max_killed_in_a_row = more.get("max_killed_in_a_row", 100)
        start_s = more.get("start_s", 120.0)
        _check_counts(num_workers=num_workers, max_killed_in_a_row=max_killed_in_a_row)
        for name, seconds in (("timeout_s", timeout_s), ("start_s", start_s)):
            if not 0 < seconds <= _LONGEST_S:
                raise ConfigError(f"{name} must be positive, and at most 1e9; got {seconds}.")
        for name, policy in (("on_kill", on_kill or "zero"), ("on_error", on_error)):
            if policy not in _POLICIES:
                raise ConfigError(f"{name} must be one of {_POLICIES}; got {policy!r}.")
        spec = import_path_of(reward)
        if on_kill is None:
            on_kill = "zero" if needs_workers(load_object(spec)) else "leave_out"
        refuse_unusable(sandbox)
        self._worker = WorkerSettings(
            spec,
            name=spec.rpartition(":")[2],
            limits=_limits(limits, more),
            start_s=start_s,
            sandbox=sandbox,
            fork_calls=fork_calls,
        )
        self.num_workers, self.timeout_s = num_workers, timeout_s
        self.on_kill: Policy = on_kill
        self.on_error: Policy = on_error
        self.max_killed_in_a_row = max_killed_in_a_row
        self.fork_calls, self.sandbox = fork_calls, sandbox
        self._reset()

    @property
    def reward(self) -> object:
        """The reward, as this process imports it."""
        return load_object(self._worker.spec)

    @property
    def counts(self) -> RewardCounts:
        """How all calls ended so far."""
        self._leave_parent()
        return RewardCounts(**self._tally.snapshot())

    async def __call__(self, completion: str, row: Row, **asked: Any) -> Score:
        """The reward of ``completion``, or its rewards by name.

        Args:
            completion: sampled text.
            row: row of the dataset.
            asked: what the reward asks for by the names of its parameters.

        Raises:
            InfrastructureError: if the reward raised one; under the policy ``"leave_out"``.
            RolloutError: if the reward raised, cannot be loaded, or the pool is closed meanwhile;
                under the policy ``"raise"`` also if its process was killed.
            RewardRejected: under the policy ``"reject"``.
        """
        outcome = await self._call(completion, row, asked)
        return outcome.value if outcome.kind == "value" else self._settle(outcome, completion, row)

    async def score_group(self, completions: Sequence[str], row: Row, **asked: Any) -> list[Score]:
        """The rewards of a group, by a reward that scores all ``completions`` at once.

        Raises:
            RolloutError: also if it answered with another number of rewards.
        """
        texts, size = list(completions), len(completions)
        outcome = await self._call(texts, row, asked)
        if outcome.kind != "value":
            return [self._settle(outcome, texts[0], row)] * size
        if len(outcome.values) != size:
            raise RolloutError(f"reward {self._worker.name!r} answered in another form.")
        return list(outcome.values)

    async def _call(
        self, completion: str | list[str], row: Row, asked: Mapping[str, Any]
    ) -> CallOutcome:
        sent = (completion, dict(row), dict(asked)) if asked else (completion, dict(row))
        try:
            arguments = await call_aside_if_long("pickling a row", sent, pickle.dumps, sent)
        except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as error:
            raise RolloutError(
                f"row {_shown(row.get('id', row))} cannot be sent to a worker process: {error}. "
                "Keep plain values in the rows."
            ) from error
        outcome = await asyncio.wrap_future(self._open().submit(arguments))
        if outcome.kind == "value" and outcome.detail:
            self._name_once(outcome.detail, completion, row)
        return outcome

    def close(self) -> None:
        """End all processes, within seconds. The next call starts new ones."""
        self._leave_parent()
        with self._lock:
            end, self._threads, self._end = self._end, None, None
        if end is not None:
            end()

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_threads", "_end", "_tally", "_lock", "_notes")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _reset(self) -> None:
        self._tally, self._lock = Tally(), threading.Lock()
        self._notes: set[str] = set()  # said already
        self._threads: WorkerThreads | None = None
        self._end: weakref.finalize[[], RewardPool] | None = None
        self._process_id = os.getpid()

    def _open(self) -> WorkerThreads:
        self._leave_parent()
        with self._lock:
            if self._threads is None:
                self._threads = WorkerThreads(
                    self._worker,
                    num_workers=self.num_workers,
                    timeout_s=self.timeout_s,
                    tally=self._tally,
                )
                self._end = weakref.finalize(self, self._threads.close)  # dropped, or at exit
            return self._threads

    def _name_once(self, note: str, completion: str | list[str], row: Row) -> None:
        with self._lock:
            is_new = note not in self._notes
            self._notes.add(note)
        if is_new:
            logger.warning(
                "%s on row %s, completion %s; such an answer is wrong: 0. Further ones are only "
                "counted, as verifier_raised",
                note,
                _shown(row.get("id", row)),
                _shown(completion),
            )

    def _settle(self, outcome: CallOutcome, completion: str, row: Row) -> LostZero:
        if outcome.kind == "infrastructure":
            raise InfrastructureError(outcome.detail)
        message = f"reward {self._worker.name!r} {outcome.detail}"
        policy = self.on_error if outcome.kind == "raised" else self.on_kill
        if self._tally.num_killed_in_a_row >= self.max_killed_in_a_row:
            raise RolloutError(
                f"{self._tally.num_killed_in_a_row} worker processes in a row were lost; in the "
                f"last one {message}. Try the reward by hand, or raise timeout_s or limits."
            )
        if policy == "raise":
            error = RolloutError(f"{message}.")
            if outcome.traceback:
                error.add_note(outcome.traceback)
            raise error
        message = f"{message} on row {_shown(row.get('id', row))}, completion {_shown(completion)}"
        if policy == "reject":
            raise RewardRejected(message)
        if policy == "leave_out":
            logger.warning("%s; the sample is left out of its group", message)
            raise InfrastructureError(f"a reward {_CAUSES.get(outcome.kind, outcome.kind)}")
        logger.warning("%s; it counts as 0", message)
        return LostZero()

    def _leave_parent(self) -> None:
        """In a forked child: start over, with processes of its own."""
        if os.getpid() != self._process_id:
            end = self._end
            self._reset()
            if end is not None:
                end()


def _limits(limits: WorkerLimits | None, more: MoreSettings) -> WorkerLimits:
    if "memory_bytes" not in more:
        return limits or WorkerLimits()
    if limits is not None:
        raise ConfigError("set limits.memory_mb, and leave out memory_bytes, its former name.")
    memory_bytes = more["memory_bytes"]
    if memory_bytes is None:
        return WorkerLimits(memory_mb=None)
    _check_counts(memory_bytes=memory_bytes)
    return WorkerLimits(memory_mb=memory_bytes / MIB)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(f"{name} must be an integer of at least 1, got {count!r}.")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
