"""The source of groups to submit: interrupted groups of a checkpoint first, then new rows.

It also writes groups to checkpoints. Not thread-safe: its owner locks.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from sdp_lightning.config import RolloutConfig
from sdp_lightning.config.pretrained import count_tokens
from sdp_lightning.engines.protocol import InferenceEngine
from sdp_lightning.errors import RolloutError
from sdp_lightning.prompts.iterable_stream import IterableStream
from sdp_lightning.prompts.stream import PromptRow, PromptStream, derive_seed
from sdp_lightning.rollout.checkpoint.group_state import read_groups
from sdp_lightning.rollout.checkpoint.packed_groups import pack_groups
from sdp_lightning.rollout.checkpoint.row_codec import decode, encode
from sdp_lightning.rollout.checkpoint.saved_group import (
    SavedGroup,
    save_finished,
    save_running,
)
from sdp_lightning.rollout.groups.in_flight import InFlightGroup
from sdp_lightning.types import Row, TrajectoryGroup
from sdp_lightning.workflows.episode import Episode
from sdp_lightning.workflows.episode_log import Event
from sdp_lightning.workflows.send_gate import SendGate
from sdp_lightning.workflows.stop_texts import StopTexts
from sdp_lightning.workflows.workflow import RolloutSession, Tokenizer

logger = logging.getLogger(__name__)

Prompts = PromptStream | IterableStream


class GroupSource:
    """Hands out groups to submit, in their ``order`` of creation.

    A group that a checkpoint interrupted keeps its order, versions and sampled tokens. Its workflow
    runs again and is given these tokens again (:class:`~sdp_lightning.workflows.episode.Episode`).

    Args:
        prompts: rows of new groups.
        engine: samples for every episode.
        gate: passed by every request to the engine.
        tokenizer: tokenizer of the policy.
        config: seed of the run, mixed with epoch, row and sample; what a group does without the
            samples that infrastructure errors cost it.
        eos_token_ids: tokens that end a completion, as the model's folder says.
    """

    def __init__(
        self,
        prompts: Prompts,
        engine: InferenceEngine,
        gate: SendGate,
        tokenizer: Tokenizer,
        *,
        config: RolloutConfig,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self._prompts, self._engine, self._gate = prompts, engine, gate
        self._tokenizer, self._config = tokenizer, config
        self._eos_token_ids = eos_token_ids
        self._num_tokens = count_tokens(tokenizer)
        self._find_stops = lru_cache(partial(StopTexts, decode=tokenizer.decode))
        self._interrupted: deque[InFlightGroup] = deque()
        self._next_order = 0

    @property
    def is_exhausted(self) -> bool:
        """Whether no group is left, unless a row is given back."""
        return not self._interrupted and self._prompts.is_exhausted

    @property
    def awaited_s(self) -> float | None:
        """Seconds for which a stream's next row has been awaited; None if none is."""
        return self._prompts.awaited_s

    def watch(self, on_ready: Callable[[], None]) -> None:
        """Call ``on_ready``, in some thread, when a stream has a row that was not there before."""
        self._prompts.watch(on_ready)

    def close(self) -> None:
        """End the thread that reads a stream."""
        self._prompts.close()

    def next(self, version: int) -> InFlightGroup | None:
        """The next group, created at ``version`` if it is new; None if there is none now.

        Raises:
            RolloutError: naming the row that could not be read (the position does not move), or
                that a checkpoint could not hold.
        """
        if self._interrupted:
            return self._interrupted.popleft()
        row = self._prompts.next()
        if row is None:
            return None
        if isinstance(self._prompts, IterableStream):
            encode(row.data, f"row {row.row_id}")
        self._next_order += 1
        return InFlightGroup(self._next_order - 1, row, version, self.new_session(row))

    def new_session(self, row: PromptRow, saved: Sequence[Sequence[Event]] = ()) -> RolloutSession:
        """The session in which a workflow rolls ``row`` out, repeating the ``saved`` logs."""
        key = f"{row.epoch}/{row.index}"

        def new_episode(sample: int) -> Episode:
            seed = derive_seed(self._config.seed, row.epoch, row.index, sample)
            return Episode(
                *(self._engine, self._gate),
                seed=seed,
                group_key=key,
                find_stops=self._find_stops,
                num_tokens=self._num_tokens,
            )

        return RolloutSession(
            self._tokenizer,
            new_episode,
            saved,
            is_evaluation=row.is_evaluation,
            min_group_size=self._config.min_group_size,
            lost_retries=self._config.lost_retries,
            eos_token_ids=self._eos_token_ids,
        )

    def put_back(self, group: InFlightGroup) -> None:
        """Hand out ``group`` again, before any other: it could not be submitted."""
        self._interrupted.appendleft(group)

    def give_back(self, group: InFlightGroup) -> None:
        """Begin the row of a dropped group again, before any new row."""
        self._prompts.give_back(group.row)

    def extend(self, count: int) -> None:
        """Go on for ``count`` rows after the end of the prompts."""
        self._prompts.extend(count)

    def remove(self, is_overdue: Callable[[InFlightGroup], bool]) -> None:
        """Remove the interrupted groups that are overdue."""
        self._interrupted = deque([g for g in self._interrupted if not is_overdue(g)])

    def position(self, groups: Sequence[InFlightGroup]) -> SourcePosition:
        """The position in the prompts, all ``groups``, and those not submitted again yet."""
        prompts = self._prompts
        running = [*self._interrupted, *(g for g in groups if g.finished is None)]
        return SourcePosition(
            prompts=self._prompts_state(),
            next_order=self._next_order,
            running=sorted(running, key=lambda group: group.order),
            finished=[g for g in groups if g.finished is not None],
            returned=prompts.returned if isinstance(prompts, IterableStream) else None,
        )

    def load_state_dict(
        self, state: Mapping[str, Any]
    ) -> list[tuple[InFlightGroup, TrajectoryGroup]]:
        """Continue from ``state``; returns the groups that were finished.

        Raises:
            ConfigError: if the prompts differ from those of ``state``.
            CheckpointError: if the parts of ``state`` do not fit each other.
            RolloutError: if the row of an interrupted group cannot be read.
        """
        kept = {(int(e), int(i)): decode(row) for e, i, row in state.get("rows", ())}
        self._prompts.load_state_dict(decode(state["prompts"]), kept)
        self._next_order = int(state["next_order"])
        interrupted = read_groups(state["running"], finished=False)
        for saved in sorted(interrupted, key=lambda group: group.order):
            place = saved.epoch, saved.index
            row = PromptRow(*place, kept[place]) if place in kept else self._prompts.read(*place)
            session = self.new_session(row, saved.logs)
            self._interrupted.append(
                InFlightGroup(saved.order, row, saved.created_version, session)
            )
        pending = read_groups(state["pending"], finished=True)
        return [self._restore(saved, kept) for saved in pending]

    def _restore(
        self, saved: SavedGroup, kept: Mapping[tuple[int, int], Row]
    ) -> tuple[InFlightGroup, TrajectoryGroup]:
        group, place = saved.finished(), (saved.epoch, saved.index)
        row = PromptRow(*place, kept.get(place, {"id": saved.row_id}))
        session = self.new_session(row)
        return InFlightGroup(group.order, row, group.created_version, session), group

    def _prompts_state(self) -> dict[str, Any]:
        state = self._prompts.state_dict()
        try:
            return encode(state, "the state_dict of the prompts")
        except RolloutError as error:
            logger.warning("%s A resume finds the place by reading all rows before it.", error)
            assert isinstance(self._prompts, IterableStream)
            return self._prompts.state_by_count()


@dataclass(frozen=True)
class SourcePosition:
    """The prompts and all groups of one instant, which ``state_dict`` writes at leisure.

    Args:
        prompts: state of the prompts.
        next_order: number of the next new group.
        running: groups that ran, or were not submitted again yet, in order of creation.
        finished: groups that had finished.
        returned: rows that were given back to a stream; None if the prompts are no stream.
    """

    prompts: dict[str, Any]
    next_order: int
    running: Sequence[InFlightGroup]
    finished: Sequence[InFlightGroup]
    returned: Sequence[PromptRow] | None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds. Tensors are copies."""
        return {
            "prompts": self.prompts,
            **self._rows(),
            "next_order": self.next_order,
            "pending": pack_groups([save_finished(group) for group in self.finished]),
            "running": pack_groups([save_running(group) for group in self.running]),
        }

    def _rows(self) -> dict[str, Any]:
        """The rows that a stream cannot go back to, each once, as ``(epoch, index, row)``."""
        if self.returned is None:
            return {}
        held = [group.row for group in (*self.running, *self.finished)]
        rows = {(row.epoch, row.index): row for row in (*self.returned, *held)}
        return {"rows": [[*place, encode(r.data, f"row {r.row_id}")] for place, r in rows.items()]}
