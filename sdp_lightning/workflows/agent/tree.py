"""The tree of turns of one sample: which tokens continue which, and the trajectories at its leaves.

A *turn* is a request's tokens and the tokens sampled in answer. A *branch* is an Episode: a turn
that goes on where the last turn of a branch ended is added to it. Any other begins a branch of its
own, whose context is all that it read. So a token that was sampled is in one branch only, and is
trained once. No HTTP, no text, no threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sdp_lightning.types import Context, FinishReason, IntArray, SamplingParams, Trajectory
from sdp_lightning.workflows.episode import Episode
from sdp_lightning.workflows.episode_log import CallStart, Event

OpenEpisode = Callable[[int, Callable[[Sequence[Event]], bool]], Episode]


@dataclass(frozen=True, eq=False)
class Turn:
    """What was read and said in one turn.

    Attributes:
        token_ids: ``[n]`` the request's tokens and those sampled after them.
        num_read: number of the request's tokens.
        finish_reason: ``"stop"`` or ``"length"``.
    """

    token_ids: IntArray
    num_read: int
    finish_reason: FinishReason

    @property
    def sampled(self) -> list[int]:
        """The sampled tokens."""
        return self.token_ids[self.num_read :].tolist()


@dataclass(eq=False)
class _Branch:
    """One Episode and the turns that ended in it.

    Attributes:
        ends: number of tokens at the end of each turn.
        num_parts: parts of the episode at the end of its last turn.
        is_open: whether a turn may be added: none is under way, and none has failed.
        is_side: whether its turns are left out of training.
    """

    episode: Episode
    is_side: bool
    tokens: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    ends: list[int] = field(default_factory=list[int])
    num_parts: int = 0
    finish_reason: FinishReason = "stop"
    is_open: bool = False

    def deepest(self, tokens: IntArray) -> int:
        """Length of the longest turn that ``tokens`` extend; 0: there is none."""
        size = min(self.tokens.size, tokens.size)
        differs = np.flatnonzero(self.tokens[:size] != tokens[:size])
        shared = int(differs[0]) if differs.size else size
        return max((end for end in self.ends if end <= shared), default=0)


class TurnTree:
    """The turns of one sample.

    Turns may be under way at the same time; only the event loop's thread may call.

    Args:
        open_episode: makes the Episode of the n-th branch, from 0, given what tells whether it
            will repeat the log of an interrupted run.

    Attributes:
        num_unfinished: turns whose sampling was ended from outside. Their tokens are not trained.
        num_diverged: branches that did not repeat their saved log to its end.
    """

    def __init__(self, open_episode: OpenEpisode) -> None:
        self._open_episode = open_episode
        self._branches: list[_Branch] = []
        self.num_unfinished = self.num_diverged = 0

    @property
    def num_turns(self) -> int:
        """Number of turns that have ended, side requests included."""
        return sum(len(branch.ends) for branch in self._branches)

    async def take_turn(
        self, tokens: IntArray, params: SamplingParams, *, is_side: bool = False
    ) -> Turn:
        """Sample an answer to ``tokens``, which continue the deepest turn that they extend.

        Args:
            tokens: ``[n]`` all that the policy reads, n >= 1.
            params: how the answer is sampled.
            is_side: whether the turn, and what continues it, is left out of training.

        Raises:
            EngineError: if the engine cannot serve the request.
            RolloutError: if the engine breaks its protocol.
        """
        branch = self._branch_for(tokens, params, is_side)
        branch.is_open = False
        if tokens.size > branch.tokens.size:
            branch.episode.add_context(tokens[branch.tokens.size :])
        self.num_unfinished += 1
        branch.finish_reason = await branch.episode.generate(params)
        self.num_unfinished -= 1
        branch.tokens = branch.episode.token_ids
        branch.ends.append(branch.tokens.size)
        branch.num_parts = len(branch.episode.parts)
        branch.is_open = True
        return Turn(branch.tokens, tokens.size, branch.finish_reason)

    def trajectories(
        self,
        reward: float | Mapping[str, float],
        weights: Mapping[str, float],
        *,
        sample: int,
        truncated: bool = False,
    ) -> list[Trajectory]:
        """One trajectory for each branch, up to the end of its last turn; side requests have none.

        Args:
            reward: reward of the sample, or several by name.
            weights: weights of several by name.
            sample: number of the sample in its group.
            truncated: whether a bound ended the sample.
        """
        made: list[Trajectory] = []
        for branch in self._branches:
            if branch.is_side or not branch.ends:
                continue
            parts = branch.episode.parts[: branch.num_parts]
            reason: FinishReason = "length" if truncated else branch.finish_reason
            if isinstance(reward, Mapping):
                plain = Trajectory(parts, finish_reason=reason, sample=sample)
                made.append(plain.with_rewards(reward, weights))
            else:
                made.append(Trajectory(parts, reward, reason, sample=sample))
        return made

    def forget(self) -> None:
        """Drop what branches did not repeat of their saved logs, when the sample has ended."""
        for branch in self._branches:
            self._forget(branch)

    def _branch_for(self, tokens: IntArray, params: SamplingParams, is_side: bool) -> _Branch:
        depths = [branch.deepest(tokens) for branch in self._branches]
        deepest = max(depths, default=0)
        for branch, depth in zip(self._branches, depths, strict=True):
            is_leaf = branch.is_open and depth == branch.tokens.size
            if depth == deepest > 0 and is_leaf and branch.is_side == is_side:
                saved = branch.episode.to_restore
                if saved and not _begins(saved, tokens[branch.tokens.size :], params):
                    self._forget(branch)
                return branch
        return self._new_branch(tokens, params, is_side)

    def _new_branch(self, tokens: IntArray, params: SamplingParams, is_side: bool) -> _Branch:
        episode = self._open_episode(
            len(self._branches), lambda saved: _begins(saved, tokens, params)
        )
        branch = _Branch(episode, is_side)
        if episode.is_restoring and not _begins(episode.to_restore, tokens, params):
            self._forget(branch)
        self._branches.append(branch)
        return branch

    def _forget(self, branch: _Branch) -> None:
        if branch.episode.is_restoring:
            branch.episode.forget()
            self.num_diverged += 1


def _begins(saved: Sequence[Event], context: IntArray, params: SamplingParams) -> bool:
    """Whether saved events begin with a turn that reads ``context`` and samples by ``params``."""
    events = list(saved)
    if context.size:
        first = events.pop(0) if events else None
        if not isinstance(first, Context) or not np.array_equal(first.token_ids, context):
            return False
    return not events or events[0] == CallStart(params)
