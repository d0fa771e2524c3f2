"""RL with verifiable rewards: one prompt, n samples, one reward each."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Unpack

from sdp_lightning.config.import_path import load_object
from sdp_lightning.errors import ConfigError
from sdp_lightning.rewards.asked import asked_by
from sdp_lightning.rewards.foreign_code import refuse_without_workers
from sdp_lightning.rewards.pool import RewardPool
from sdp_lightning.rewards.row_checks import refuse_unreadable_rows
from sdp_lightning.rewards.timeouts import call_reward
from sdp_lightning.types import IntArray, Row, SamplingParams, Trajectory
from sdp_lightning.workflows.chat_template import encode_aside, encode_prompt, prompt_of, with_stops
from sdp_lightning.workflows.completion import (
    Completion,
    TextSettings,
    check_settings,
    completion_text,
)
from sdp_lightning.workflows.episode import Episode
from sdp_lightning.workflows.group_play import play_group, score_together
from sdp_lightning.workflows.prompt_lengths import PromptLength, PromptMeter
from sdp_lightning.workflows.workflow import (
    RolloutSession,
    RolloutWorkflow,
)

Reward = Callable[..., float | Sequence[float] | Awaitable[float] | Awaitable[Sequence[float]]]


class RLVRWorkflow(RolloutWorkflow):
    """Samples ``group_size`` completions of one prompt and scores each.

    Args:
        reward: ``reward(completion, row) -> float``, plain or async, or its import path:
            ``"package.module:name"`` or ``"path/to/file.py:name"``. Further parameters named
            ``prompt``, ``messages``, ``token_ids``, ``finish_reason`` or ``group_index`` are given
            as well; one whose first parameter is named ``completions`` scores a group at once. A
            plain function runs in one of 256 threads that rewards and environments share, so it may
            block. A ``RewardPool`` runs it in a process that can be killed; one that is
            ``workers_only`` (reasoning-gym's, math-verify's) runs nowhere else.
        group_size: number of samples for each prompt.
        sampling: sampling settings; the tokenizer's end of text and the tokens of ``stop`` are
            added to its ``stop_token_ids``.
        prompt_key: key of the prompt in a row: text, or a list of ``{"role", "content"}`` messages.
        use_chat_template: whether a text prompt becomes a user message; message lists always use
            the template.
        stop: texts of one token each that end a completion, such as a newline.
        reward_timeout_s: seconds after which a reward fails its group, with an error naming the
            row; with ``reward_workers`` it is killed and its sample left out of its group (0 if the
            reward is ``workers_only``), with a warning naming the row.
        reward_workers: number of processes of a ``RewardPool``, for a reward that may hang, crash
            or exhaust memory; 0 calls it in this process. For more settings pass a ``RewardPool``
            as ``reward``.
        more: ``keep_special_tokens``.

    Raises:
        ConfigError: if a setting is out of range, worker processes cannot import the reward, it
            runs in worker processes only and there are none, or it needs what no reward is given.
    """

    def __init__(
        self,
        reward: str | Reward,
        *,
        group_size: int = 8,
        sampling: SamplingParams | None = None,
        prompt_key: str = "prompt",
        use_chat_template: bool = False,
        stop: Sequence[str] = (),
        reward_timeout_s: float = 30.0,
        reward_workers: int = 0,
        **more: Unpack[TextSettings],
    ) -> None:
        check_settings(self, more)
        if group_size < 1:
            raise ConfigError(f"group_size must be at least 1, got {group_size}.")
        if not reward_timeout_s > 0:
            raise ConfigError(f"reward_timeout_s must be positive, got {reward_timeout_s}.")
        self._reward: Any = load_object(reward) if isinstance(reward, str) else reward
        if not callable(self._reward):
            raise ConfigError(f"reward must be a function, got {self._reward!r}.")
        self._pool = _make_pool(reward, self._reward, reward_workers, reward_timeout_s)
        self._asked = asked_by(self._reward if self._pool is None else self._pool.reward)
        self.keep_special_tokens = more.get("keep_special_tokens", False)
        self._sampling = sampling if sampling is not None else SamplingParams()
        self.group_size = group_size
        self.prompt_key = prompt_key
        self.use_chat_template = use_chat_template
        self.stop = tuple(stop)
        self.reward_timeout_s = reward_timeout_s

    @property
    def sampling(self) -> SamplingParams:
        return self._sampling

    @property
    def reward_pool(self) -> RewardPool | None:
        """Pool that calls and counts the rewards; None if they are called in this process."""
        return self._pool

    @property
    def counts(self) -> Mapping[str, int]:
        if self._pool is None:
            return {}
        counts = self._pool.counts
        return {
            "reward_raised": counts.raised,
            "reward_timed_out": counts.timed_out,
            "reward_out_of_memory": counts.out_of_memory,
            "reward_crashed": counts.crashed,
            "verifier_raised": counts.verifier_raised,
        }

    def check_rows(self, rows: Iterable[tuple[int, Row]]) -> None:
        refuse_unreadable_rows(self._reward, rows)

    def prompt_lengths(self, rows: Sequence[Row], meter: PromptMeter) -> Sequence[PromptLength]:
        key, use_chat_template = self.prompt_key, self.use_chat_template
        return meter.of_rows(
            rows, lambda row: prompt_of(row, key), use_chat_template=use_chat_template
        )

    def longest_prompt(self, max_length: int | None) -> int | None:
        return None if max_length is None else max_length - self._sampling.max_new_tokens

    def close(self) -> None:
        """End the worker processes, if there are any. The next rollout starts new ones."""
        if self._pool is not None:
            self._pool.close()

    async def run(self, row: Row, session: RolloutSession) -> Sequence[Trajectory] | None:
        tokenizer = session.tokenizer
        prompt = await encode_aside(
            row.get(self.prompt_key),
            lambda: encode_prompt(
                *(row, tokenizer),
                key=self.prompt_key,
                use_chat_template=self.use_chat_template,
            ),
        )
        params = with_stops(self._sampling, tokenizer, self.stop)

        async def sample(episode: Episode) -> tuple[Episode, Completion]:
            completion = await self._sample(row, session, episode, prompt, params)
            return episode, completion

        async def score(episode: Episode) -> Trajectory:
            _, completion = await sample(episode)
            asked = {name: completion.ask(name) for name in self._asked.names}
            return episode.finish(await self._score(completion.text, row, asked))

        if not self._asked.is_group:
            return await play_group(session, self.group_size, score)
        samples = await play_group(session, self.group_size, sample)
        if samples is None:
            return None
        group = [completion for _, completion in samples]
        asked: dict[str, Any] = {
            name: [each.ask(name) for each in group] for name in self._asked.names
        }
        if "prompt" in asked:
            asked["prompt"] = group[0].prompt
        texts = [each.text for each in group]
        rewards = await score_together(session, len(group), lambda: self._score(texts, row, asked))
        if rewards is None:
            return None
        return [e.finish(reward) for (e, _), reward in zip(samples, rewards, strict=True)]

    async def _sample(
        self,
        row: Row,
        session: RolloutSession,
        episode: Episode,
        prompt: IntArray,
        params: SamplingParams,
    ) -> Completion:
        episode.add_context(prompt)
        reason = await episode.generate(params)
        tokenizer, sampled = session.tokenizer, episode.sampled_token_ids.tolist()
        return Completion(
            text=completion_text(
                *(sampled, tokenizer),
                stop_token_ids=params.stop_token_ids,
                keep_special_tokens=self.keep_special_tokens,
            ),
            token_ids=sampled,
            finish_reason=reason,
            group_index=session.episodes.index(episode),
            prompt=""
            if "prompt" not in self._asked.names
            else tokenizer.decode(list(prompt), skip_special_tokens=False),
            opening=row.get(self.prompt_key),
        )

    async def _score(self, completion: str | list[str], row: Row, asked: dict[str, Any]) -> Any:
        if self._pool is None:
            limit = self.reward_timeout_s
            return await call_reward(self._reward, completion, row, timeout_s=limit, **asked)
        if isinstance(completion, str):
            return await self._pool(completion, row, **asked)
        return await self._pool.score_group(completion, row, **asked)


def _make_pool(
    reward: str | Reward, function: Any, num_workers: int, timeout_s: float
) -> RewardPool | None:
    """The pool that was passed, or a new one of ``num_workers``; None for 0 workers."""
    if isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 0:
        raise ConfigError(f"reward_workers must be an integer of at least 0, got {num_workers!r}.")
    if isinstance(function, RewardPool):
        if num_workers:
            raise ConfigError(
                f"reward is a RewardPool of {function.num_workers} workers already; leave out "
                f"reward_workers={num_workers}."
            )
        return function
    if num_workers == 0:
        refuse_without_workers(function)
        return None
    return RewardPool(reward, num_workers=num_workers, timeout_s=timeout_s)
