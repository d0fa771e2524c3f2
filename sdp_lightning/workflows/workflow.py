"""The base class of workflows, and the session that a workflow works in."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sdp_lightning.config.plain_settings import GivenSettings
from sdp_lightning.types import Row, SamplingParams, Trajectory
from sdp_lightning.workflows.episode import Episode
from sdp_lightning.workflows.episode_log import Event, VersionRange, versions_of, widest

if TYPE_CHECKING:
    from sdp_lightning.workflows.prompt_lengths import PromptLength, PromptMeter

Sample = TypeVar("Sample")


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that workflows use."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a completion."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Text to tokens."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str:
        """Tokens to text."""
        ...

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        add_generation_prompt: bool = ...,
        tokenize: bool = ...,
    ) -> str:
        """A conversation to the text that the model expects."""
        ...


class RolloutSession:
    """The tokenizer and the episodes of one group.

    Args:
        tokenizer: tokenizer of the policy.
        new_episode: makes the episode of the n-th sample.
        saved: logs of the episodes of an interrupted run, which its new episodes restore.
        is_evaluation: whether the group is only judged, and never trained on.
        min_group_size: samples that a group to train on needs, once infrastructure errors left
            others out.
        lost_retries: times that samples are tried again which a group with fewer has lost.
        eos_token_ids: tokens that end a completion, as the model's folder says.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        new_episode: Callable[[int], Episode],
        saved: Sequence[Sequence[Event]] = (),
        *,
        is_evaluation: bool = False,
        min_group_size: int = 1,
        lost_retries: int = 0,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self.tokenizer, self.is_evaluation = tokenizer, is_evaluation
        self.eos_token_ids = tuple(eos_token_ids)
        self.min_group_size = 1 if is_evaluation else min_group_size
        self.lost_retries = lost_retries
        self.rejection = ""
        self.num_left_out = 0
        self._errors: list[str] = []
        self._new_episode = new_episode
        # Of episodes that are still to be opened, each with the versions of its tokens.
        self._saved = [(tuple(log), versions_of(log)) for log in saved]
        self._lock = threading.Lock()
        self._episodes: list[Episode] = []
        self._divergence = ""

    @property
    def episodes(self) -> tuple[Episode, ...]:
        """Episodes opened so far."""
        with self._lock:
            return tuple(self._episodes)

    @property
    def logs(self) -> list[tuple[Event, ...]]:
        """Log of every episode, those included that are still to be opened again."""
        with self._lock:
            return [*(episode.log for episode in self._episodes), *(log for log, _ in self._saved)]

    @property
    def versions(self) -> VersionRange:
        """Oldest and newest version of all tokens in ``logs``; costs nothing for each segment."""
        with self._lock:
            opened = [episode.versions for episode in self._episodes]
            return widest([*opened, *(versions for _, versions in self._saved)])

    @property
    def divergence(self) -> str:
        """How the workflow diverged from its interrupted run; empty if it did not."""
        return next((e.divergence for e in self.episodes if e.divergence), self._divergence)

    def open(self) -> Episode:
        """A new episode; the n-th one of a group always gets the same random numbers."""
        with self._lock:
            episode = self._new_episode(len(self._episodes))
            if self._saved:
                episode.restore(self._saved.pop(0)[0])
            self._episodes.append(episode)
            return episode

    def open_like(self, number: int, is_like: Callable[[Sequence[Event]], bool]) -> Episode:
        """A new episode that restores the first saved log that is like it, if there is one.

        Args:
            number: its random numbers are those of the sample with this number.
            is_like: whether the episode will repeat a log.
        """
        with self._lock:
            episode = self._new_episode(number)
            place = next((n for n, (log, _) in enumerate(self._saved) if is_like(log)), None)
            if place is not None:
                episode.restore(self._saved.pop(place)[0])
            self._episodes.append(episode)
            return episode

    def forget(self) -> int:
        """Drop the saved logs that no episode has restored; returns their number."""
        with self._lock:
            count = len(self._saved)
            self._saved.clear()
            return count

    def reopen(self, index: int, *, keep: bool = True) -> Episode:
        """An episode in place of the one of this ``index``, whose sample was lost.

        Args:
            index: number of the sample in its group.
            keep: whether it repeats the steps of the lost sample, with its tokens; False begins
                the sample anew.
        """
        with self._lock:
            episode = self._new_episode(index)
            if keep:
                episode.restore(self._episodes[index].log)
            self._episodes[index] = episode
            return episode

    def add_error(self, cause: str) -> None:
        """Count an infrastructure error by its cause, which is one of a few texts."""
        with self._lock:
            self._errors.append(cause)

    def take_errors(self) -> list[str]:
        """Causes of the infrastructure errors since this was called last."""
        with self._lock:
            errors, self._errors = self._errors, []
            return errors

    def reject(self, reason: str) -> None:
        """Reject this group. Groups are counted by ``reason``, which is one of a few texts."""
        self.rejection = reason

    def end(self) -> None:
        """Close the session when the workflow has returned: by then it must have restored all."""
        if self._saved or any(episode.is_restoring for episode in self.episodes):
            self._divergence = "it ended before it had repeated all saved steps"


class RolloutWorkflow(GivenSettings, ABC):
    """Turns one dataset row into the trajectories of one group.

    Holds settings only: the same object serves many groups at once.

    After a resume it runs again for an interrupted group and is given the tokens sampled before. So
    it should do the same things in the same order, given the same row and tokens. If it does not,
    the saved tokens of that group are discarded, and it is sampled from scratch.
    """

    @property
    @abstractmethod
    def sampling(self) -> SamplingParams:
        """Sampling settings; the trainer scores at the same temperature."""

    @abstractmethod
    async def run(self, row: Row, session: RolloutSession) -> Sequence[Trajectory] | None:
        """Roll out ``row``.

        Returns:
            Trajectories of the group; None or an empty sequence rejects the row.

        Raises:
            Exception: any; the group is counted as failed, others go on.
        """

    def check_rows(self, rows: Iterable[tuple[int, Row]]) -> None:  # most take any
        """Raise ``RowsError`` if there are ``rows`` (and indices) that cannot be scored."""

    def prompt_lengths(
        self, rows: Sequence[Row], meter: PromptMeter
    ) -> Sequence[PromptLength | None]:
        """Tokens of the prompt of each row, or what is wrong with it; None is not known.

        Args:
            rows: the rows.
            meter: measures prompts with the tokenizer of the policy.
        """
        return [None] * len(rows)

    def longest_prompt(self, max_length: int | None) -> int | None:
        """Tokens of the longest prompt that leaves room for a completion; None is not known.

        Args:
            max_length: tokens of the longest sequence of the engine; None is not known.
        """
        return None

    def check_prompts(  # most write their own
        self, rows: Iterable[tuple[int, Row]], tokenizer: Tokenizer
    ) -> None:
        """Raise ``ConfigError`` if a prompt of ``rows`` (and indices) cannot be written.

        One row of each kind is tried, with the tokenizer of the policy.
        """

    def unstopped(self, row: Row, tokenizer: Tokenizer, eos_token_ids: Sequence[int]) -> str:
        """What is wrong if turns of the chat template end where no completion does; else empty.

        Args:
            row: a row that can be written.
            tokenizer: tokenizer of the policy.
            eos_token_ids: those of the model's folder.
        """
        return ""

    @property
    def reward_weights(self) -> Mapping[str, float]:
        """Weights of several rewards by name, as far as they are known; empty for one reward."""
        return {}

    @property
    def counts(self) -> Mapping[str, int]:
        """Counts over a run, logged by their names, which are the same on every rank."""
        return {}

    def close(self) -> None:  # most hold nothing
        """Release processes at the end of a run. The next run may start them again."""


def why_rejected(trajectories: Sequence[Trajectory] | None) -> str:
    """Reason why the return value of a workflow cannot be trained on; empty if it can."""
    if trajectories is None:
        return "the workflow returned None"
    if len(trajectories) == 0:
        return "the workflow returned no trajectories"
    if any(trajectory.head_version is None for trajectory in trajectories):
        return "a trajectory has no sampled tokens"
    return ""


async def gather_or_cancel(samples: Sequence[Coroutine[Any, Any, Sample]]) -> list[Sample]:
    """Await all samples; if one fails, the others are cancelled before its error goes on."""
    tasks = [asyncio.ensure_future(sample) for sample in samples]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
