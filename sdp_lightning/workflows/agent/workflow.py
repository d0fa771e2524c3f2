"""Rollouts of agents that exist: what they ask at the address they are given is trained."""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Unpack

from sdp_lightning.config.import_path import load_object
from sdp_lightning.errors import ConfigError, InfrastructureError, RolloutError
from sdp_lightning.rewards.timeouts import CallTimeout, call_with_timeout
from sdp_lightning.rewards.value import Score, as_score
from sdp_lightning.types import Row, SamplingParams, Trajectory
from sdp_lightning.workflows.agent.command import CommandAgent
from sdp_lightning.workflows.agent.gateway import Endpoint, gateway_at
from sdp_lightning.workflows.agent.process import CommandFailedError, CommandSample, runner_of
from sdp_lightning.workflows.agent.session import (
    AgentSession,
    ClientSampling,
    SessionSettings,
    SideRequest,
)
from sdp_lightning.workflows.agent.transcript import AgentTranscript, EndedBy, transcript_of
from sdp_lightning.workflows.agent.tree import TurnTree
from sdp_lightning.workflows.chat.turn_ends import unstopped_turn
from sdp_lightning.workflows.completion import TextSettings, chat_settings, check_settings
from sdp_lightning.workflows.episode import Episode
from sdp_lightning.workflows.group_play import play_group
from sdp_lightning.workflows.own_row import own_copy
from sdp_lightning.workflows.scoring import checked_weights
from sdp_lightning.workflows.stops import stop_texts, with_stops
from sdp_lightning.workflows.tool_format import check_format
from sdp_lightning.workflows.workflow import RolloutSession, RolloutWorkflow, Tokenizer

Agent = Callable[[Row, Endpoint], Any]


class AgentSettings(TextSettings, total=False):
    """Settings of an :class:`AgentWorkflow` that are given by name.

    Attributes:
        reward_weights: weight of each reward, if there are several by name. A resume may change
            them.
        stop: a text that ends an answer of the policy, or several.
        tool_call_format: how the policy writes calls of tools, as for ``ToolEnvironment``.
        client_sampling: what becomes of a temperature, top_p or other setting that an agent asks
            for and the run decides: ``"override"`` (counted, and said once) or ``"refuse"``.
        side_request: tells, from the body of a request, whether it is left out of training, such as
            one for a title; a function or its import path.
        error_reward: reward of a sample whose agent raises; None: its group fails.
        timeout_reward: reward of a sample that ran out of a budget, if there is no ``reward``.
        host: address that the gateway listens at; other machines reach only what is not loopback.
        port: its port; 0 is any that is free.
    """

    reward_weights: Mapping[str, float]
    stop: str | Sequence[str]
    tool_call_format: str | Mapping[str, Any]
    client_sampling: ClientSampling
    side_request: str | SideRequest
    error_reward: float | None
    timeout_reward: float
    host: str
    port: int


class AgentWorkflow(RolloutWorkflow):
    """Runs an agent ``group_size`` times for a row, and trains on what it asked of the policy.

    Each sample has an endpoint of its own: an address that speaks OpenAI's API, and a key. All that
    is asked with the key is sampled as in any rollout, over weight updates, and is trained on token
    for token: where a request goes on with an earlier answer it has that answer's tokens, and where
    its history was edited a branch begins, in which earlier answers are context.

    Args:
        agent: ``agent(row, endpoint)``, plain or async, or its import path. ``endpoint`` has
            ``base_url``, ``api_key`` and ``model``. It may return the reward of its sample: a
            number, or numbers by name. A plain function runs in one of 256 threads. Or a
            :class:`CommandAgent`, or the words of its command.
        reward: ``reward(row, transcript)``, plain or async, or its import path, of an
            :class:`AgentTranscript`; None: what the agent returns is the reward.
        group_size: number of samples for each row.
        sampling: sampling settings of one answer; an agent may ask for fewer tokens and for stops.
        max_turns: most answers of a sample; a request beyond it gets an error.
        max_total_tokens: length of a conversation, its answer included; None is the limit of the
            engine, which fails the group.
        timeout_s: seconds after which a sample is ended: as its policy's failure if it was answered
            once, and else as an infrastructure error.
        more: those of :class:`AgentSettings`.

    Raises:
        ConfigError: if a setting is out of range, or agent or reward is no function.
    """

    def __init__(
        self,
        agent: str | Agent | CommandAgent | Sequence[str],
        *,
        reward: str | Callable[..., Any] | None = None,
        group_size: int = 8,
        sampling: SamplingParams | None = None,
        max_turns: int = 64,
        max_total_tokens: int | None = None,
        timeout_s: float = 600.0,
        **more: Unpack[AgentSettings],
    ) -> None:
        check_settings(self, more, AgentSettings)
        for name, count in (("group_size", group_size), ("max_turns", max_turns)):
            if count < 1:
                raise ConfigError(f"{name} must be at least 1, got {count}.")
        if max_total_tokens is not None and max_total_tokens < 2:
            raise ConfigError(f"max_total_tokens must be at least 2, got {max_total_tokens}.")
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s must be positive, got {timeout_s}.")
        if not 0 <= more.get("port", 0) <= 65535:
            raise ConfigError(f"port must be in [0, 65535], got {more.get('port')}.")
        self.client_sampling: ClientSampling = more.get("client_sampling", "override")
        if self.client_sampling not in ("override", "refuse"):
            raise ConfigError(
                f"client_sampling must be 'override' or 'refuse', got {self.client_sampling!r}."
            )
        self._reward = None if reward is None else _function(reward, "reward")
        self._commands = runner_of(agent, has_reward=reward is not None)
        self._agent: Any = None if self._commands is not None else _function(agent, "agent")
        side = more.get("side_request")
        self._is_side = None if side is None else _function(side, "side_request")
        self.group_size, self.max_turns, self.timeout_s = group_size, max_turns, timeout_s
        self.max_total_tokens = max_total_tokens
        self._sampling = sampling if sampling is not None else SamplingParams()
        self.stop = stop_texts(more.get("stop", ()))
        self.chat = chat_settings(more, self.stop)
        self._weights = checked_weights(more.get("reward_weights"))
        self.tool_call_format = more.get("tool_call_format", "auto")
        check_format(self.tool_call_format)
        self._more = more
        self._counts = Counter[str]()

    @property
    def sampling(self) -> SamplingParams:
        return self._sampling

    @property
    def reward_weights(self) -> Mapping[str, float]:
        return dict(self._weights)

    @property
    def counts(self) -> Mapping[str, int]:
        return {f"agent_{name}": self._counts[name] for name in _COUNTED}

    def unstopped(self, row: Row, tokenizer: Tokenizer, eos_token_ids: Sequence[int]) -> str:
        params = with_stops(self._sampling, tokenizer, self.stop, eos_token_ids)
        return unstopped_turn(tokenizer, self.chat, params)

    def check_rows(self, rows: Iterable[tuple[int, Row]]) -> None:
        if self._commands is not None:
            self._commands.check_rows(rows)

    async def run(self, row: Row, session: RolloutSession) -> Sequence[Trajectory] | None:
        samples = await play_group(
            session, self.group_size, functools.partial(self._play, row, session)
        )
        self._counts["diverged"] += session.forget()
        if samples is None:
            return None
        return [trajectory for sample in samples for trajectory in sample]

    async def _play(self, row: Row, session: RolloutSession, episode: Episode) -> list[Trajectory]:
        async with AsyncExitStack() as stack:
            command = None
            if self._commands is not None:
                command = await stack.enter_async_context(self._commands.sample(self.timeout_s))
            return await self._play_with(command, row, session, episode)

    async def _play_with(
        self, command: CommandSample | None, row: Row, session: RolloutSession, episode: Episode
    ) -> list[Trajectory]:
        index = session.episodes.index(episode)

        def open_episode(number: int, is_like: Any) -> Episode:
            if number == 0:
                return episode
            return session.open_like(index + number * self.group_size, is_like)

        tree = TurnTree(open_episode)
        served = AgentSession(tree, session.tokenizer, self._settings(session))
        gateway = gateway_at(self._more.get("host", "127.0.0.1"), self._more.get("port", 0))
        endpoint = await gateway.open(served)
        agent = self._agent if command is None else command.run
        try:
            returned, ended_by = await self._run_agent(agent, row, endpoint, served)
        finally:
            await gateway.close(endpoint)
            self._count(served)
        if not served.answers:
            hint = _BY_ARGUMENT if command is None else f"{_BY_VARIABLE} {command.told}"
            raise RolloutError(f"{self._name} ended without an answer of the policy: {hint}")
        process = None if command is None else command.process
        reward = await self._score(row, transcript_of(served, returned, ended_by, process))
        trajectories = tree.trajectories(
            reward, self._weights, sample=index, truncated=ended_by not in ("agent", "error")
        )
        if not trajectories:
            raise RolloutError(
                f"all {tree.num_turns} requests of {self._name} were side requests: nothing is "
                "left to train on. Let side_request be true for fewer."
            )
        return trajectories

    async def _run_agent(
        self, agent: Agent, row: Row, endpoint: Endpoint, served: AgentSession
    ) -> tuple[Any, EndedBy]:
        """What the agent returned, and what ended it. The sample's own failure goes on."""
        call = call_with_timeout(
            agent,
            await own_copy(row),
            endpoint,
            timeout_s=self.timeout_s,
            what=self._name,
            setting=" (timeout_s)",
        )
        running = asyncio.ensure_future(call)
        try:
            await asyncio.wait([running, served.failed], return_when=asyncio.FIRST_COMPLETED)
            if served.failed.done():
                served.failed.result()
            return running.result(), "agent"
        except CallTimeout as error:
            if not served.answers:
                raise InfrastructureError("an agent timed out before its first answer") from error
            self._counts["timed_out"] += 1
            return None, "timeout_s"
        except InfrastructureError:
            raise
        except Exception as error:
            if served.failed.done():
                raise
            if served.over_budget:
                self._counts["over_budget"] += 1
                return None, served.over_budget
            if isinstance(error, CommandFailedError) and error.reward is not None:
                return error.reward, "agent"
            if self._more.get("error_reward") is None or not served.answers:
                text = str(error) if isinstance(error, CommandFailedError) else repr(error)
                shown = text.replace(endpoint.api_key, "<its key>")  # of a client's headers
                cause = error if shown == text else None
                raise RolloutError(f"{self._name} failed: {shown}") from cause
            self._counts["raised"] += 1
            return None, "error"
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def _score(self, row: Row, transcript: AgentTranscript) -> Score:
        if transcript.ended_by == "error":
            value: Any = self._more.get("error_reward")
        elif self._reward is not None:
            # foreign: a callable may have no name
            what = f"reward {getattr(self._reward, '__name__', self._reward)!s}"
            own = await own_copy(row)
            value = await call_with_timeout(
                *(self._reward, own, transcript), timeout_s=self.timeout_s, what=what
            )
        elif transcript.ended_by != "agent":
            value = self._more.get("timeout_reward", 0.0)
        else:
            value = transcript.returned
        if value is None:
            raise RolloutError(
                f"{self._name} returned no reward, and there is no reward=: return one, or give "
                "the workflow a reward(row, transcript)."
            )
        score = as_score(value, self._name)
        if self._weights and not isinstance(score, dict) and transcript.ended_by != "agent":
            score = dict.fromkeys(self._weights, float(score))
        if isinstance(score, dict) != bool(self._weights) or (
            isinstance(score, dict) and score.keys() != self._weights.keys()
        ):
            raise RolloutError(
                f"the reward of a sample is {score}, and reward_weights has {sorted(self._weights)}"
                ": name all rewards that a sample has by reward_weights={...}."
            )
        return score

    def _settings(self, session: RolloutSession) -> SessionSettings:
        return SessionSettings(
            params=with_stops(self._sampling, session.tokenizer, self.stop, session.eos_token_ids),
            chat=self.chat,
            max_turns=self.max_turns,
            max_total_tokens=self.max_total_tokens,
            tool_call_format=self.tool_call_format,
            client_sampling=self.client_sampling,
            is_side=self._is_side,
        )

    def _count(self, served: AgentSession) -> None:
        self._counts.update(
            turns=len(served.answers),
            unfinished=served.tree.num_unfinished,
            diverged=served.tree.num_diverged,
            retried=served.counts.retried,
            refused=served.counts.refused,
            overridden=served.counts.overridden,
        )

    @property
    def _name(self) -> str:
        if self._commands is not None:
            return f"agent {self._commands.line.program!r}"
        # foreign: a callable may have no name
        return f"agent {getattr(self._agent, '__name__', type(self._agent).__name__)!r}"


_COUNTED = (
    *("turns", "unfinished", "diverged", "retried", "refused", "overridden"),
    *("over_budget", "timed_out", "raised"),
)


_BY_ARGUMENT = "give its client base_url=endpoint.base_url and api_key=endpoint.api_key."
_BY_VARIABLE = (
    "its client must take address and key from OPENAI_BASE_URL and OPENAI_API_KEY, or from "
    "ANTHROPIC_BASE_URL and ANTHROPIC_API_KEY, of its environment."
)


def _function(given: Any, name: str) -> Callable[..., Any]:
    function: Any = load_object(given) if isinstance(given, str) else given
    if not callable(function):
        raise ConfigError(f"{name} must be a function, or its import path, got {given!r}.")
    return function
