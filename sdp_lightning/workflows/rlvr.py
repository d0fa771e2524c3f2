"""RL with verifiable rewards: one prompt, n samples, a reward or several for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Unpack

from sdp_lightning.errors import ConfigError
from sdp_lightning.rewards.pool import RewardPool
from sdp_lightning.types import IntArray, Row, SamplingParams, Trajectory
from sdp_lightning.workflows.chat.row_kinds import (
    first_of_each_kind,
    refuse_unwritable,
    say_without_effect,
)
from sdp_lightning.workflows.chat.turn_ends import unstopped_turn
from sdp_lightning.workflows.chat_template import encode_aside, encode_prompt, prompt_of
from sdp_lightning.workflows.completion import (
    Completion,
    TextSettings,
    chat_settings,
    check_settings,
    completion_text,
)
from sdp_lightning.workflows.episode import Episode
from sdp_lightning.workflows.group_play import play_group, score_together
from sdp_lightning.workflows.prompt_lengths import Opening, PromptLength, PromptMeter
from sdp_lightning.workflows.scoring import Reward, Rewards, Scores, Scoring
from sdp_lightning.workflows.stops import stop_texts, with_stops
from sdp_lightning.workflows.workflow import (
    RolloutSession,
    RolloutWorkflow,
    Tokenizer,
)


class RLVRSettings(TextSettings, total=False):
    """Settings of a :class:`RLVRWorkflow` that are given by name.

    Attributes:
        rewards: several rewards by name, each as ``reward`` is given, or one that returns a mapping
            of names to numbers. They run side by side for a sample.
        reward_weights: weight of each reward in the sum that is the sample's reward; 1 for each
            without it. A resume may change them.
    """

    rewards: Rewards
    reward_weights: Mapping[str, float]


class RLVRWorkflow(RolloutWorkflow):
    """Samples ``group_size`` completions of one prompt and scores each.

    Args:
        reward: ``reward(completion, row) -> float``, plain or async, or its import path:
            ``"package.module:name"`` or ``"path/to/file.py:name"``. A mapping of names to numbers
            that it returns makes several rewards. Further parameters named
            ``prompt``, ``messages``, ``token_ids``, ``finish_reason`` or ``group_index`` are given
            as well; one whose first parameter is named ``completions`` scores a group at once. A
            plain function runs in one of 256 threads that rewards and environments share, so it may
            block. A ``RewardPool`` runs it in a process that can be killed; one that is
            ``workers_only`` (reasoning-gym's, math-verify's) runs nowhere else. None: ``rewards``.
        group_size: number of samples for each prompt.
        sampling: sampling settings; the tokenizer's end of text, those that the model's folder
            names, and ``stop`` are added to its stops.
        prompt_key: key of the prompt in a row: text, or a list of ``{"role", "content"}`` messages.
        use_chat_template: whether a text prompt becomes a user message; message lists always use
            the template.
        stop: a text of any length that ends a completion, such as ``"</answer>"``, or several.
        reward_timeout_s: seconds after which a reward fails its group, with an error naming the
            row; with ``reward_workers`` it is killed and its sample left out of its group (0 if the
            reward is ``workers_only``), with a warning naming the row.
        reward_workers: number of processes of a ``RewardPool``, for a reward that may hang, crash
            or exhaust memory; 0 calls it in this process. Each of several has a pool of its own.
            For more settings pass a ``RewardPool`` as the reward.
        more: those of :class:`RLVRSettings`: ``rewards``, ``reward_weights``,
            ``keep_special_tokens``, ``include_stop_text``, ``chat_template_kwargs`` and
            ``add_special_tokens``.

    Raises:
        ConfigError: if a setting is out of range, there are both ``reward`` and ``rewards`` or
            neither, a weight has no reward or a reward no weight, worker processes cannot import a
            reward, it runs in worker processes only and there are none, or it needs what no reward
            is given.
    """

    def __init__(
        self,
        reward: str | Reward | None = None,
        *,
        group_size: int = 8,
        sampling: SamplingParams | None = None,
        prompt_key: str = "prompt",
        use_chat_template: bool = False,
        stop: str | Sequence[str] = (),
        reward_timeout_s: float = 30.0,
        reward_workers: int = 0,
        **more: Unpack[RLVRSettings],
    ) -> None:
        check_settings(self, more, RLVRSettings)
        if group_size < 1:
            raise ConfigError(f"group_size must be at least 1, got {group_size}.")
        if not reward_timeout_s > 0:
            raise ConfigError(f"reward_timeout_s must be positive, got {reward_timeout_s}.")
        self._scoring = Scoring(
            reward,
            more.get("rewards"),
            more.get("reward_weights"),
            workers=reward_workers,
            timeout_s=reward_timeout_s,
        )
        self.keep_special_tokens = more.get("keep_special_tokens", False)
        self.include_stop_text = more.get("include_stop_text", True)
        self._sampling = sampling if sampling is not None else SamplingParams()
        self.group_size = group_size
        self.prompt_key = prompt_key
        self.use_chat_template = use_chat_template
        self.stop = stop_texts(stop)
        self.chat = chat_settings(more, self.stop)
        self.reward_timeout_s = reward_timeout_s

    @property
    def sampling(self) -> SamplingParams:
        return self._sampling

    @property
    def reward_weights(self) -> Mapping[str, float]:
        return dict(self._scoring.weights)

    @property
    def reward_pool(self) -> RewardPool | None:
        """Pool that calls and counts the one reward; None if there is another number of pools."""
        pools = list(self.reward_pools.values())
        return pools[0] if len(pools) == 1 else None

    @property
    def reward_pools(self) -> Mapping[str, RewardPool]:
        """The pools by the names of their rewards; the name of a single reward is empty."""
        return self._scoring.pools

    @property
    def counts(self) -> Mapping[str, int]:
        total = Counter[str]()
        pools = {id(pool): pool for pool in self.reward_pools.values()}
        for pool in pools.values():
            total.update(asdict(pool.counts))
        if not pools:
            return {}
        kinds = ("raised", "timed_out", "out_of_memory", "crashed")
        counts = {f"reward_{kind}": total[kind] for kind in kinds}
        return counts | {"verifier_raised": total["verifier_raised"]}

    def check_rows(self, rows: Iterable[tuple[int, Row]]) -> None:
        self._scoring.check_rows(rows)

    def check_prompts(self, rows: Iterable[tuple[int, Row]], tokenizer: Tokenizer) -> None:
        kinds = list(first_of_each_kind(rows, self.prompt_key))
        refuse_unwritable(kinds, lambda row: self._encode(row, tokenizer))
        for _, row in kinds[:1]:
            prompt = row[self.prompt_key] if self._is_chat(row) else None
            say_without_effect(prompt, tokenizer, self.chat)

    def unstopped(self, row: Row, tokenizer: Tokenizer, eos_token_ids: Sequence[int]) -> str:
        params = with_stops(self._sampling, tokenizer, self.stop, eos_token_ids)
        return unstopped_turn(tokenizer, self.chat, params) if self._is_chat(row) else ""

    def _is_chat(self, row: Row) -> bool:
        return self.use_chat_template or not isinstance(row[self.prompt_key], str)

    def prompt_lengths(self, rows: Sequence[Row], meter: PromptMeter) -> Sequence[PromptLength]:
        return meter.of_rows(
            rows,
            lambda row: Opening(prompt_of(row, self.prompt_key)),
            use_chat_template=self.use_chat_template,
            settings=self.chat,
        )

    def longest_prompt(self, max_length: int | None) -> int | None:
        return None if max_length is None else max_length - self._sampling.max_new_tokens

    def close(self) -> None:
        """End the worker processes, if there are any. The next rollout starts new ones."""
        for pool in self.reward_pools.values():
            pool.close()

    async def run(self, row: Row, session: RolloutSession) -> Sequence[Trajectory] | None:
        tokenizer = session.tokenizer
        prompt = await encode_aside(row.get(self.prompt_key), lambda: self._encode(row, tokenizer))
        params = with_stops(self._sampling, tokenizer, self.stop, session.eos_token_ids)

        async def sample(episode: Episode) -> tuple[Episode, Completion, Scores]:
            completion = await self._sample(row, session, episode, prompt, params)
            return episode, completion, await self._scoring.score_sample(completion, row)

        async def score(episode: Episode) -> Trajectory:
            _, _, scores = await sample(episode)
            return self._finish(episode, scores)

        if not self._scoring.scores_groups:
            return await play_group(session, self.group_size, score)
        samples = await play_group(session, self.group_size, sample)
        if samples is None:
            return None
        group = [completion for _, completion, _ in samples]
        more = await score_together(
            session, len(group), lambda: self._scoring.score_group(group, row)
        )
        if more is None:
            return None
        return [
            self._finish(episode, {**own, **of_group})
            for (episode, _, own), of_group in zip(samples, more, strict=True)
        ]

    def _finish(self, episode: Episode, scores: Scores) -> Trajectory:
        reward = self._scoring.reward_of(scores)
        return episode.finish(reward, weights=self._scoring.weights)

    def _encode(self, row: Row, tokenizer: Tokenizer) -> list[int]:
        return encode_prompt(
            *(row, tokenizer),
            key=self.prompt_key,
            use_chat_template=self.use_chat_template,
            settings=self.chat,
        )

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
                stop_texts=params.stop_texts,
                keep_special_tokens=self.keep_special_tokens,
                include_stop_text=self.include_stop_text,
            ),
            token_ids=sampled,
            finish_reason=reason,
            group_index=session.episodes.index(episode),
            prompt=tokenizer.decode(list(prompt), skip_special_tokens=False)
            if self._scoring.asks_for_prompt
            else "",
            opening=row.get(self.prompt_key),
        )
