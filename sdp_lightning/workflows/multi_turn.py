"""Rollouts of several turns: policy and environment take turns."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Unpack

from sdp_lightning.config.import_path import load_object
from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.rewards.foreign_code import refuse_factory_without_workers
from sdp_lightning.types import Row, SamplingParams, Trajectory
from sdp_lightning.workflows.chat_template import (
    PLACEHOLDER,
    encode_aside,
    encode_opening,
    encode_turn,
    with_stops,
)
from sdp_lightning.workflows.completion import TextSettings, check_settings, completion_text
from sdp_lightning.workflows.environment import BoundedEnvironment, Environment
from sdp_lightning.workflows.episode import Episode
from sdp_lightning.workflows.group_play import play_group
from sdp_lightning.workflows.prompt_lengths import PromptLength, PromptMeter
from sdp_lightning.workflows.tools import ToolEnvironment
from sdp_lightning.workflows.workflow import (
    RolloutSession,
    RolloutWorkflow,
    Tokenizer,
)


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
        sampling: sampling settings of one turn; the tokenizer's end of text and the tokens of
            ``stop`` are added to its ``stop_token_ids``.
        max_turns: number of turns of the policy.
        max_total_tokens: length of a whole trajectory, prompt and observations included; None is
            the limit of the engine, which fails the group.
        stop: texts of one token each that end a turn, such as a newline.
        turn_format: text between two turns, with ``{observation}`` in it; prompts are then plain
            text, too. None: the tokenizer's chat template, for prompts and turns.
        step_timeout_s: seconds after which ``reset`` or ``step`` of an environment fails its group,
            with an error naming row and step.
        more: ``keep_special_tokens``, in the text that ``step`` reads.

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
        stop: Sequence[str] = (),
        turn_format: str | None = None,
        step_timeout_s: float = 30.0,
        **more: Unpack[TextSettings],
    ) -> None:
        check_settings(self, more)
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
        self.stop = tuple(stop)
        self.turn_format = turn_format
        self.step_timeout_s = step_timeout_s
        self.keep_special_tokens = more.get("keep_special_tokens", False)

    @property
    def sampling(self) -> SamplingParams:
        return self._sampling

    def prompt_lengths(
        self, rows: Sequence[Row], meter: PromptMeter
    ) -> Sequence[PromptLength | None]:
        """Those of :class:`ToolEnvironment`; another's ``reset`` may do much, and is not called."""
        environment: object = self._make_environment()
        lengths: Sequence[PromptLength | None] = [None] * len(rows)
        if not isinstance(environment, Environment):
            return lengths
        if type(environment).reset is ToolEnvironment.reset:
            uses_template = self.turn_format is None
            lengths = meter.of_rows(rows, environment.reset, use_chat_template=uses_template)
        world = BoundedEnvironment(environment, timeout_s=self.step_timeout_s)
        with ThreadPoolExecutor(1) as thread:  # a notebook's own has an event loop that runs
            thread.submit(asyncio.run, world.close()).result()
        return lengths

    def longest_prompt(self, max_length: int | None) -> int | None:
        total, turn = self.max_total_tokens, self._sampling.max_new_tokens
        if max_length is None or (total is not None and total <= max_length):
            return None if total is None else total - 1
        return max_length - turn if total is None else min(total - 1, max_length - turn)

    async def run(self, row: Row, session: RolloutSession) -> Sequence[Trajectory] | None:
        params = with_stops(self._sampling, session.tokenizer, self.stop)

        async def play(episode: Episode) -> Trajectory:
            return await self._play(row, session.tokenizer, episode, params)

        return await play_group(session, self.group_size, play)

    async def _play(
        self, row: Row, tokenizer: Tokenizer, episode: Episode, params: SamplingParams
    ) -> Trajectory:
        environment: object = self._make_environment()
        if not isinstance(environment, Environment):
            raise ConfigError(
                f"environment must make a sdp_lightning.Environment; it made {environment!r}."
            )
        world = BoundedEnvironment(environment, timeout_s=self.step_timeout_s)
        try:
            opening = await world.reset(row)
            uses_template = self.turn_format is None
            tokens = await encode_aside(
                opening,
                lambda: encode_opening(opening, tokenizer, use_chat_template=uses_template),
            )
            if self._room(len(tokens)) < 1:
                raise RolloutError(
                    f"the prompt has {len(tokens)} tokens, which leaves none of "
                    f"max_total_tokens={self.max_total_tokens} to sample: shorten it."
                )
            episode.add_context(tokens)
            return await self._take_turns(world, tokenizer, episode, params)
        finally:
            await world.close()

    async def _take_turns(
        self,
        world: BoundedEnvironment,
        tokenizer: Tokenizer,
        episode: Episode,
        params: SamplingParams,
    ) -> Trajectory:
        reward = 0.0
        for turn in range(self.max_turns):
            start = episode.token_ids.size
            budget = min(params.max_new_tokens, self._room(start))
            await episode.generate(replace(params, max_new_tokens=budget))
            sampled: list[int] = episode.token_ids[start:].tolist()
            said = completion_text(
                *(sampled, tokenizer),
                stop_token_ids=params.stop_token_ids,
                keep_special_tokens=self.keep_special_tokens,
            )
            result = await world.step(said)
            reward += result.reward
            if result.done:
                return episode.finish(reward)
            if turn + 1 < self.max_turns:
                last = sampled[-1]
                encode = functools.partial(
                    encode_turn,
                    result.observation,
                    tokenizer,
                    turn_format=self.turn_format,
                    stopped_by=last if last in params.stop_token_ids else None,
                )
                between = await encode_aside(result.observation, encode)
                if self._room(episode.token_ids.size + between.size) < 1:
                    break
                if between.size:
                    episode.add_context(between)
        return episode.finish(reward, truncated=True)

    def _room(self, num_tokens: int) -> int:
        """Number of tokens that may follow a history of ``num_tokens``."""
        if self.max_total_tokens is None:
            return self._sampling.max_new_tokens
        return self.max_total_tokens - num_tokens
