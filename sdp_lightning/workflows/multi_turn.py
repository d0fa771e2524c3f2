"""Rollouts of several turns: policy and environment take turns."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Unpack

from sdp_lightning.config.import_path import load_object
from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.rewards.foreign_code import refuse_factory_without_workers
from sdp_lightning.types import Row, SamplingParams, Trajectory
from sdp_lightning.workflows.chat.messages import Message
from sdp_lightning.workflows.chat.rendering import Tools
from sdp_lightning.workflows.chat.row_kinds import refuse_unwritable_openings
from sdp_lightning.workflows.chat.turn_ends import unstopped_turn
from sdp_lightning.workflows.chat_template import (
    PLACEHOLDER,
    encode_aside,
    encode_opening,
    encode_turn,
    outline,
)
from sdp_lightning.workflows.completion import (
    TextSettings,
    chat_settings,
    check_settings,
    completion_text,
)
from sdp_lightning.workflows.environment import BoundedEnvironment, Environment, Transcript
from sdp_lightning.workflows.episode import Episode
from sdp_lightning.workflows.group_play import play_group
from sdp_lightning.workflows.own_row import own_copy
from sdp_lightning.workflows.prompt_lengths import Opening, PromptLength, PromptMeter
from sdp_lightning.workflows.scoring import TurnRewards, checked_weights
from sdp_lightning.workflows.stops import stop_texts, with_stops
from sdp_lightning.workflows.tools import ToolEnvironment
from sdp_lightning.workflows.workflow import (
    RolloutSession,
    RolloutWorkflow,
    Tokenizer,
)


class MultiTurnSettings(TextSettings, total=False):
    """Settings of a :class:`MultiTurnWorkflow` that are given by name.

    Attributes:
        reward_weights: weight of each reward, if a step returns several by name: all that a
            conversation may have. A resume may change them.
    """

    reward_weights: Mapping[str, float]


class MultiTurnWorkflow(RolloutWorkflow):
    """Plays ``group_size`` conversations between the policy and environments of one row.

    Tokens in, tokens out: the tokens sampled in one turn are the history of the next, token for
    token, and only they are trained on. The text between two turns is added as context: the
    observation, in the format of the chat template or of ``turn_format``.

    A rollout ends when its environment is done. It is truncated after ``max_turns``, or when the
    next turn does not fit ``max_total_tokens``. Its reward is the sum over its turns.

    Args:
        environment: a class or function that makes an :class:`Environment` for each sample, or its
            import path: ``"package.module:name"`` or ``"path/to/file.py:name"``.
        group_size: number of conversations for each row.
        sampling: sampling settings of one turn; the tokenizer's end of text, those that the model's
            folder names, and ``stop`` are added to its stops.
        max_turns: number of turns of the policy.
        max_total_tokens: length of a whole trajectory, prompt and observations included; None is
            the limit of the engine, which fails the group.
        stop: a text of any length that ends a turn, such as ``"</tool_call>"``, or several.
        turn_format: text between two turns, with ``{observation}`` in it; prompts are then plain
            text, too. None: the tokenizer's chat template, for prompts and turns.
        step_timeout_s: seconds after which ``reset`` or ``step`` of an environment fails its group,
            with an error naming row and step.
        more: those of :class:`MultiTurnSettings`: ``reward_weights``, ``chat_template_kwargs``,
            ``add_special_tokens``, and ``keep_special_tokens``, ``include_stop_text`` of the text
            that ``step`` reads.

    Raises:
        ConfigError: if a setting is out of range, or the environment, as far as its code tells,
            uses a reward that runs in worker processes only.
    """

    def __init__(
        self,
        environment: str | Callable[[], Environment],
        *,
        group_size: int = 8,
        sampling: SamplingParams | None = None,
        max_turns: int = 8,
        max_total_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        turn_format: str | None = None,
        step_timeout_s: float = 30.0,
        **more: Unpack[MultiTurnSettings],
    ) -> None:
        check_settings(self, more, MultiTurnSettings)
        if group_size < 1 or max_turns < 1:
            raise ConfigError(
                f"group_size and max_turns must be at least 1, got {group_size} and {max_turns}."
            )
        if max_total_tokens is not None and max_total_tokens < 2:
            raise ConfigError(f"max_total_tokens must be at least 2, got {max_total_tokens}.")
        if not step_timeout_s > 0:
            raise ConfigError(f"step_timeout_s must be positive, got {step_timeout_s}.")
        if turn_format is not None and PLACEHOLDER not in turn_format:
            raise ConfigError(f"turn_format must have {PLACEHOLDER} in it, got {turn_format!r}.")
        factory: Any = load_object(environment) if isinstance(environment, str) else environment
        if not callable(factory):
            raise ConfigError(
                f"environment must be a class or a function that makes one, got {factory!r}."
            )
        refuse_factory_without_workers(factory, "give the environment a RewardPool of it")
        self._make_environment: Any = factory
        self._sampling = sampling if sampling is not None else SamplingParams()
        self.group_size, self.max_turns = group_size, max_turns
        self.max_total_tokens = max_total_tokens
        self.stop = stop_texts(stop)
        self.chat = chat_settings(more, self.stop)
        self.turn_format = turn_format
        self.step_timeout_s = step_timeout_s
        self.keep_special_tokens = more.get("keep_special_tokens", False)
        self.include_stop_text = more.get("include_stop_text", True)
        self._weights = checked_weights(more.get("reward_weights"))

    @property
    def reward_weights(self) -> Mapping[str, float]:
        return dict(self._weights)

    @property
    def sampling(self) -> SamplingParams:
        return self._sampling

    def check_prompts(self, rows: Iterable[tuple[int, Row]], tokenizer: Tokenizer) -> None:
        async def reset(row: Row) -> tuple[Any, Tools]:
            world = self._make_world(self._transcript(tokenizer))
            try:
                return await world.reset(await own_copy(row)), world.tools
            finally:
                await world.close()

        def write(made: tuple[Any, Tools]) -> None:
            opening, tools = made
            self._encode(opening, tokenizer, tools)
            self._encode_turn([], tokenizer, tools=tools)

        refuse_unwritable_openings(rows, reset, write)

    def unstopped(self, row: Row, tokenizer: Tokenizer, eos_token_ids: Sequence[int]) -> str:
        params = with_stops(self._sampling, tokenizer, self.stop, eos_token_ids)
        return "" if self.turn_format else unstopped_turn(tokenizer, self.chat, params)

    def prompt_lengths(
        self, rows: Sequence[Row], meter: PromptMeter
    ) -> Sequence[PromptLength | None]:
        """Those of :class:`ToolEnvironment`; another's ``reset`` may do much, and is not called."""
        environment: object = self._make_environment()
        lengths: Sequence[PromptLength | None] = [None] * len(rows)
        if not isinstance(environment, Environment):
            return lengths
        world = environment
        if isinstance(world, ToolEnvironment) and type(world).reset is ToolEnvironment.reset:
            world.begin(self._transcript(meter.tokenizer))
            lengths = meter.of_rows(
                rows,
                lambda row: Opening(world.reset(row), world.tools),
                use_chat_template=self.turn_format is None,
                settings=self.chat,
            )
        bounded = BoundedEnvironment(environment, timeout_s=self.step_timeout_s)
        with ThreadPoolExecutor(1) as thread:  # a notebook's own has an event loop that runs
            thread.submit(asyncio.run, bounded.close()).result()
        return lengths

    def longest_prompt(self, max_length: int | None) -> int | None:
        total, turn = self.max_total_tokens, self._sampling.max_new_tokens
        if max_length is None or (total is not None and total <= max_length):
            return None if total is None else total - 1
        return max_length - turn if total is None else min(total - 1, max_length - turn)

    async def run(self, row: Row, session: RolloutSession) -> Sequence[Trajectory] | None:
        stops = self.stop, session.eos_token_ids
        params = with_stops(self._sampling, session.tokenizer, *stops)

        async def play(episode: Episode) -> Trajectory:
            return await self._play(row, session.tokenizer, episode, params)

        return await play_group(session, self.group_size, play)

    async def _play(
        self, row: Row, tokenizer: Tokenizer, episode: Episode, params: SamplingParams
    ) -> Trajectory:
        world = self._make_world(self._transcript(tokenizer, params))
        try:
            opening = await world.reset(await own_copy(row))
            tokens = await encode_aside(
                opening, lambda: self._encode(opening, tokenizer, world.tools)
            )
            if self._room(len(tokens)) < 1:
                raise RolloutError(
                    f"the prompt has {len(tokens)} tokens, which leaves none of "
                    f"max_total_tokens={self.max_total_tokens} to sample: shorten it."
                )
            episode.add_context(tokens)
            earlier = outline(opening) if self.turn_format is None else []
            return await self._take_turns(world, tokenizer, episode, params, earlier)
        finally:
            await world.close()

    def _transcript(self, tokenizer: Tokenizer, params: SamplingParams | None = None) -> Transcript:
        ends = SamplingParams() if params is None else params
        is_chat = self.turn_format is None
        return Transcript(tokenizer, ends.stop_token_ids, ends.stop_texts, is_chat=is_chat)

    def _make_world(self, transcript: Transcript) -> BoundedEnvironment:
        environment: object = self._make_environment()
        if not isinstance(environment, Environment):
            raise ConfigError(
                f"environment must make a sdp_lightning.Environment; it made {environment!r}."
            )
        return BoundedEnvironment(environment, timeout_s=self.step_timeout_s, transcript=transcript)

    def _encode(self, opening: Any, tokenizer: Tokenizer, tools: Tools) -> list[int]:
        return encode_opening(
            *(opening, tokenizer),
            use_chat_template=self.turn_format is None,
            tools=tools,
            settings=self.chat,
        )

    def _encode_turn(
        self, observation: Any, tokenizer: Tokenizer, stopped_by: int | None = None, **more: Any
    ) -> list[int]:
        return encode_turn(
            *(observation, tokenizer),
            turn_format=self.turn_format,
            stopped_by=stopped_by,
            settings=self.chat,
            **more,
        )

    async def _take_turns(
        self,
        world: BoundedEnvironment,
        tokenizer: Tokenizer,
        episode: Episode,
        params: SamplingParams,
        earlier: list[Message],
    ) -> Trajectory:
        rewards = TurnRewards(self._weights)
        for turn in range(self.max_turns):
            start = episode.token_ids.size
            budget = min(params.max_new_tokens, self._room(start))
            await episode.generate(replace(params, max_new_tokens=budget))
            tokens: list[int] = episode.token_ids.tolist()
            before, sampled = tokens[:start], tokens[start:]
            said = completion_text(
                *(sampled, tokenizer),
                stop_token_ids=params.stop_token_ids,
                stop_texts=params.stop_texts,
                keep_special_tokens=self.keep_special_tokens,
                include_stop_text=self.include_stop_text,
            )
            result = await world.step(said, sampled, before)
            rewards.add(result.reward)
            if result.done:
                return self._finish(episode, rewards, truncated=world.is_truncated)
            if turn + 1 < self.max_turns:
                last = sampled[-1]
                encode = functools.partial(
                    self._encode_turn,
                    result.observation,
                    tokenizer,
                    sampled=sampled,
                    stopped_by=last if last in params.stop_token_ids else None,
                    history=earlier,
                    tools=world.tools,
                )
                between = await encode_aside(result.observation, encode)
                if self.turn_format is None:
                    earlier += outline(result.observation, follows_turn=True)
                if self._room(episode.token_ids.size + between.size) < 1:
                    break
                if between.size:
                    episode.add_context(between)
        return self._finish(episode, rewards, truncated=True)

    def _finish(self, episode: Episode, rewards: TurnRewards, *, truncated: bool) -> Trajectory:
        return episode.finish(rewards.total, weights=self._weights, truncated=truncated)

    def _room(self, num_tokens: int) -> int:
        """Number of tokens that may follow a history of ``num_tokens``."""
        if self.max_total_tokens is None:
            return self._sampling.max_new_tokens
        return self.max_total_tokens - num_tokens
