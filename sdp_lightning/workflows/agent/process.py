"""The processes of agents that are a command line: each in a session and a folder of its own.

Each runs under :mod:`sdp_lightning.distributed.process_guard`, which ends all that it started when
the sample ends, or the trainer.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import signal
import sys
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from sdp_lightning.distributed import process_guard
from sdp_lightning.errors import ConfigError, InfrastructureError, RolloutError
from sdp_lightning.rewards.timeouts import call_with_timeout
from sdp_lightning.types import Row
from sdp_lightning.workflows.agent.command import EXIT, CommandAgent, CommandLine, refuse_rows
from sdp_lightning.workflows.agent.folders import FILES_S, SampleFolders, end_of, read_reward
from sdp_lightning.workflows.agent.gateway import Endpoint
from sdp_lightning.workflows.agent.transcript import AgentProcess

logger = logging.getLogger(__name__)

_STOP_S = 3.0  # added to the grace
_SLACK_S = 60.0  # added to a wait for other processes, of what is not in their own time


class CommandFailedError(RolloutError):
    """An agent's command ended as it must not, or left no reward.

    Attributes:
        reward: what its sample has for it; None: as for an agent that raises.
    """

    reward: float | None = None


class CommandRunner:
    """Runs a command for each sample; keeps the folders of the last ones.

    Raises:
        ConfigError: if the command cannot be run.
    """

    def __init__(self, agent: CommandAgent) -> None:
        self.agent = agent
        self.line = CommandLine(agent.command, agent.environment.get("PATH"))
        if shown := sorted(self.line.fields.intersection(agent.hide)):
            raise ConfigError(f"hide has {shown[0]!r}, which the command itself has in its words.")
        self.folders = SampleFolders(agent)
        self._shown: set[str] = set()
        self._running: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Places] = (
            weakref.WeakKeyDictionary()
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return CommandRunner, (self.agent,)  # a copy has processes and folders of its own

    def check_rows(self, rows: Iterable[tuple[int, Row]]) -> None:
        """Raise ``RowsError`` if there are rows, with their indices, that no command can take."""
        refuse_rows(self.agent, self.line, rows)

    def sample(self, timeout_s: float) -> CommandSample:
        """A process that may run for ``timeout_s``, once it is entered: when there is room."""
        loop, most = asyncio.get_running_loop(), self.agent.max_processes
        return CommandSample(self, self._running.setdefault(loop, Places(most)), timeout_s)

    def show_once(self, cause: str, told: str) -> None:
        """Log what is told of the first sample of a cause; all are counted."""
        if cause not in self._shown:
            self._shown.add(cause)
            logger.warning("%s. %s", cause, told)


def runner_of(agent: object, *, has_reward: bool) -> CommandRunner | None:
    """The runner of a command, or of a list of its words; None for another agent.

    Args:
        agent: what a workflow was given.
        has_reward: whether it was given a reward, too.

    Raises:
        ConfigError: if the command cannot be run, or its samples have no reward or two.
    """
    if isinstance(agent, list | tuple):
        agent = CommandAgent(cast("Sequence[str]", agent))
    if not isinstance(agent, CommandAgent):
        return None
    if agent.reward_from and has_reward:
        raise ConfigError(
            f"reward= and reward_from={agent.reward_from!r} are both given: a sample has one."
        )
    if not agent.reward_from and not has_reward:
        raise ConfigError(
            "nothing says what a sample of the command is worth: give reward=, or a CommandAgent "
            f"reward_from={EXIT!r} or the name of a file that it writes."
        )
    return CommandRunner(agent)


class Places:
    """So many processes at once, in the order in which they asked; of one event loop."""

    def __init__(self, most: int) -> None:
        self._most, self._free, self._num_waiting = most, asyncio.Semaphore(most), 0
        self.release = self._free.release

    async def take(self, each_s: float) -> None:
        """Wait for a place; ``RolloutError`` when all before had the ``each_s`` that they may."""
        self._num_waiting += 1
        longest_s = (1 + self._num_waiting // self._most) * (each_s + _SLACK_S)
        try:
            async with asyncio.timeout(longest_s):
                await self._free.acquire()
        except TimeoutError:
            raise RolloutError(
                f"an agent waited {longest_s:g} s for one of {self._most} processes "
                f"(max_processes), though each may run for {each_s:g} s only (timeout_s)."
            ) from None
        finally:
            self._num_waiting -= 1


class CommandSample:
    """The process of one sample, and its folder, as an async context.

    Attributes:
        process: how the process ended; None before.
    """

    def __init__(self, runner: CommandRunner, places: Places, timeout_s: float) -> None:
        self._agent, self._runner, self._places = runner.agent, runner, places
        self._each_s = timeout_s + runner.agent.grace_s + _STOP_S
        self._has_place, self._folder = False, None
        self.process: AgentProcess | None = None

    async def __aenter__(self) -> CommandSample:
        await self._places.take(self._each_s)
        self._has_place = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()
        if self._folder is None:
            return
        self._runner.folders.keep(self._folder, is_failed=isinstance(error, Exception))
        if not isinstance(error, asyncio.CancelledError):  # else a later sample does it
            await self._runner.folders.remove_old()

    async def run(self, row: Row, endpoint: Endpoint) -> Any:
        """Run the command to its end; the reward that it gives, if it is to give one.

        Raises:
            CommandFailedError: if its exit status, or the file of its reward, is none that may be.
            InfrastructureError: if it was killed, or cannot be started.
        """
        words = self._runner.line.words(row)
        self._folder = folder = await call_with_timeout(
            self._runner.folders.make, row, timeout_s=FILES_S, what="making a folder for an agent"
        )
        status: int | None = None
        try:
            guard = await self._start(words, folder, endpoint)
            try:
                status = await guard.wait()
            finally:
                if status is None:
                    await self._stop(guard)
                if (guard.returncode or 0) < 0:
                    await call_with_timeout(
                        *(process_guard.kill_all_with, f"SDP_ROW={folder / 'work' / 'row.json'}"),
                        timeout_s=_SLACK_S,
                        what="ending what an agent left",
                    )
        finally:
            self._leave()
            told = end_of(folder / "output.log").replace(endpoint.api_key, "<its key>")
            self.process = AgentProcess(status, folder / "work", told)
        assert status is not None
        return await self._judge(folder, status)

    @property
    def told(self) -> str:
        """Exit status and end of the output, for a message."""
        if self._folder is None or self.process is None:
            return ""
        return (
            f"Its exit status was {self.process.status}. The end of "
            f"{self._folder / 'output.log'}:\n{self.process.output}"
        )

    def _leave(self) -> None:
        if self._has_place:
            self._has_place = False
            self._places.release()

    async def _start(
        self, words: list[str], folder: Path, endpoint: Endpoint
    ) -> asyncio.subprocess.Process:
        agent, output = self._agent, str(folder / "output.log")
        guard = [sys.executable, "-I", "-S", process_guard.__file__, str(agent.grace_s)]
        starting = asyncio.ensure_future(
            asyncio.create_subprocess_exec(
                *(*guard, output, str(agent.output_bytes), *words),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                cwd=folder / "work",
                env=agent.variables(endpoint, str(folder / "work" / "row.json")),
                start_new_session=True,
            )
        )
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            with contextlib.suppress(OSError):
                await self._stop(await starting)
            raise
        except OSError as error:
            if error.errno == errno.E2BIG:
                raise CommandFailedError(
                    "the words and variables of its command are longer than the system allows: let "
                    "the agent read the file $SDP_ROW."
                ) from error
            raise InfrastructureError("an agent's process could not be started") from error

    async def _stop(self, guard: asyncio.subprocess.Process) -> None:
        """Have the guard end all that the command started, and wait for it.

        A loop that closes cancels a sample that is being cancelled once more; the wait goes on.
        """
        if guard.stdin is not None:
            guard.stdin.write(b"end\n")  # a process that was forked meanwhile may hold it open
            guard.stdin.close()
        loop, again = asyncio.get_running_loop(), None
        end_by = loop.time() + self._agent.grace_s + _STOP_S
        while guard.returncode is None:
            try:
                async with asyncio.timeout_at(end_by):
                    await guard.wait()
            except asyncio.CancelledError as error:
                again = error
            except TimeoutError:
                logger.warning("the guard of an agent's process did not end, and is killed.")
                with contextlib.suppress(ProcessLookupError):
                    guard.kill()
                await guard.wait()
        if again is not None:
            raise again

    async def _judge(self, folder: Path, status: int) -> Any:
        if status < 0:
            raise InfrastructureError("the guard of an agent's process was killed")
        if 0 < status - 128 <= signal.SIGRTMAX:
            cause = f"an agent died of {_name(status - 128)}"
            self._runner.show_once(cause, self.told)
            raise InfrastructureError(cause)
        if status not in self._agent.statuses:
            error = CommandFailedError(self.told)
            error.reward = 0.0 if self._agent.reward_from == EXIT else None
            raise error
        if self._agent.reward_from == EXIT:
            return 1.0
        if not self._agent.reward_from:
            return None
        read = functools.partial(read_reward, folder / "work" / self._agent.reward_from)
        try:
            return await call_with_timeout(read, timeout_s=FILES_S, what="reading a reward")
        except (OSError, ValueError, RecursionError) as error:
            raise CommandFailedError(
                f"it left no reward in {self._agent.reward_from!r} (reward_from): {error}. "
                f"{self.told}"
            ) from error


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
