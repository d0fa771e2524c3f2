"""The groups of a checkpoint as a few tensors, whose number does not grow with that of the groups.

torch takes some 20 us for each tensor that it writes and 50 us for each that it reads, more than
for the bytes of most segments. So the arrays of all groups are laid end to end, and so are the
numbers that belong to them. Letters: G groups, L logs (trajectories), E events, S segments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sdp_lightning.errors import CheckpointError
from sdp_lightning.rollout.checkpoint.saved_group import SavedGroup, SavedResult
from sdp_lightning.rollout.checkpoint.segment_codec import params_to_fields
from sdp_lightning.types import Context, SamplingParams, Segment
from sdp_lightning.workflows.episode_log import CallEnd, CallStart, Event

_CONTEXT, _SEGMENT, _START, _END = range(4)


def pack_groups(groups: Sequence[SavedGroup]) -> dict[str, Any]:
    """All ``groups``, either all finished or none, as tensors and three lists.

    Returns:
        ``places`` [G, 4] (epoch, index, order, created version), ``num_logs`` [G], ``num_events``
        [L], ``events`` [E, 3] (kind, number of tokens, and the version of a segment, or the place
        in ``params`` or ``texts``), ``segments`` [S, 3] (place of ``kv_on_update`` in ``texts``,
        version of the proximal or -1, whether there is one), ``temperatures`` [S], ``token_ids``,
        ``logprobs``, ``proximals``, ``rewards``, ``finish_reasons``, ``samples`` (-1 is alone) and
        ``num_named`` [L] (empty if under way); of the N rewards with names, ``reward_names`` [N]
        (places in ``texts``) and ``named_rewards`` [N, 2] (reward, weight); and the lists
        ``row_ids``, ``params``, ``texts``.
    """
    packer = _Packer()
    for group in groups:
        for log in group.logs:
            for event in log:
                packer.add(event)
    results = [result for group in groups for result in group.results or ()]
    places = [(g.epoch, g.index, g.order, g.created_version) for g in groups]
    return {
        "row_ids": [group.row_id for group in groups],
        "places": torch.tensor(places, dtype=torch.int64).reshape(-1, 4),
        "num_logs": torch.tensor([len(g.logs) for g in groups], dtype=torch.int64),
        "num_events": torch.tensor([len(log) for g in groups for log in g.logs], dtype=torch.int64),
        "rewards": torch.tensor([each.reward for each in results], dtype=torch.float64),
        "finish_reasons": _integers(packer.text(each.finish_reason) for each in results),
        "num_named": _integers(len(each.rewards) for each in results),
        "samples": _integers(-1 if each.sample is None else each.sample for each in results),
        "reward_names": _integers(packer.text(name) for each in results for name in each.rewards),
        "named_rewards": torch.tensor(
            [
                (v, each.reward_weights[name])
                for each in results
                for name, v in each.rewards.items()
            ],
            dtype=torch.float64,
        ).reshape(-1, 2),
        **packer.columns(),
    }


def unpack_groups(packed: Mapping[str, Any], *, finished: bool) -> list[SavedGroup]:
    """The groups that :func:`pack_groups` packed.

    Raises:
        CheckpointError: if the parts of ``packed`` do not fit each other, or a version makes no
            sense.
        RolloutError: if tokens or log-probs make no sense.
    """
    events = _events(packed)
    try:
        logs = [[next(events) for _ in range(count)] for count in _numbers(packed["num_events"])]
        results = _results(packed)
        groups, begin = list[SavedGroup](), 0
        rows = zip(packed["row_ids"], _numbers(packed["places"]), strict=True)
        for (row_id, place), count in zip(rows, _numbers(packed["num_logs"]), strict=True):
            epoch, index, order, version = place
            part = slice(begin, begin + count)
            its_results = results[part] if finished else None
            groups.append(SavedGroup(epoch, index, row_id, order, version, logs[part], its_results))
            begin += count
    except (LookupError, ValueError, TypeError, RuntimeError, StopIteration) as error:
        raise CheckpointError(f"the rollouts of the checkpoint are damaged: {error!r}.") from error
    if begin != len(logs) or next(events, None) is not None:
        raise CheckpointError("the rollouts of the checkpoint hold more events than their logs.")
    return groups


def _results(packed: Mapping[str, Any]) -> list[SavedResult]:
    rewards, reasons = packed["rewards"].tolist(), _numbers(packed["finish_reasons"])
    texts: Sequence[Any] = packed["texts"]
    if "num_named" not in packed:  # written before rewards had names
        return [SavedResult(r, texts[why]) for r, why in zip(rewards, reasons, strict=True)]
    names = [texts[place] for place in _numbers(packed["reward_names"])]
    named = list(zip(names, _numbers(packed["named_rewards"]), strict=True))
    alone = torch.full((len(rewards),), -1)  # written before samples had branches
    samples = _numbers(packed.get("samples", alone))
    results, begin = list[SavedResult](), 0
    counts = _numbers(packed["num_named"])
    for reward, reason, count, sample in zip(rewards, reasons, counts, samples, strict=True):
        own = named[begin : begin + count]
        values = {name: value for name, (value, _) in own}
        weights = {name: weight for name, (_, weight) in own}
        place = None if sample < 0 else sample
        results.append(SavedResult(reward, texts[reason], values, weights, place))
        begin += count
    return results


class _Packer:
    def __init__(self) -> None:
        self._events: list[tuple[int, int, int]] = []
        self._segments: list[tuple[int, int, int]] = []
        self._temperatures: list[float] = []
        self._token_ids: list[NDArray[Any]] = []
        self._logprobs: list[NDArray[Any]] = []
        self._proximals: list[NDArray[Any]] = []
        self._params: dict[SamplingParams, int] = {}
        self._texts: dict[str, int] = {}

    def text(self, value: str) -> int:
        return self._texts.setdefault(value, len(self._texts))

    def add(self, event: Event) -> None:
        if isinstance(event, Segment):
            self._token_ids.append(event.token_ids)
            self._logprobs.append(event.logprobs)
            self._temperatures.append(event.temperature)
            self._events.append((_SEGMENT, event.token_ids.size, event.version))
            logprobs = event.proximal.logprobs  # read first: the version is there by then
            version = event.proximal.version
            if logprobs is None or version is None:
                self._segments.append((self.text(event.kv_on_update), -1, 0))
            else:
                self._segments.append((self.text(event.kv_on_update), version, 1))
                self._proximals.append(logprobs)
        elif isinstance(event, Context):
            self._token_ids.append(event.token_ids)
            self._events.append((_CONTEXT, event.token_ids.size, 0))
        elif isinstance(event, CallStart):
            place = self._params.setdefault(event.params, len(self._params))
            self._events.append((_START, 0, place))
        else:
            self._events.append((_END, 0, self.text(event.finish_reason)))

    def columns(self) -> dict[str, Any]:
        return {
            "events": torch.tensor(self._events, dtype=torch.int64).reshape(-1, 3),
            "segments": torch.tensor(self._segments, dtype=torch.int64).reshape(-1, 3),
            "temperatures": torch.tensor(self._temperatures, dtype=torch.float64),
            "token_ids": _joined(self._token_ids, np.int64),
            "logprobs": _joined(self._logprobs, np.float32),
            "proximals": _joined(self._proximals, np.float32),
            "params": [params_to_fields(params) for params in self._params],
            "texts": list(self._texts),
        }


def _events(packed: Mapping[str, Any]) -> Iterator[Event]:
    """All events in order."""
    params = [CallStart(SamplingParams(**fields)) for fields in packed["params"]]
    texts = packed["texts"]
    ends = [CallEnd(text) for text in texts]
    tokens, logprobs = packed["token_ids"].numpy(), packed["logprobs"].numpy()
    proximals = packed["proximals"].numpy()
    segments = zip(_numbers(packed["segments"]), packed["temperatures"].tolist(), strict=True)
    token, sampled, scored = 0, 0, 0
    for kind, size, value in _numbers(packed["events"]):
        if kind == _START:
            yield params[value]
        elif kind == _END:
            yield ends[value]
        elif kind == _CONTEXT:
            yield Context(tokens[token : token + size])
        else:
            (kv, version, has_proximal), temperature = next(segments)
            segment = Segment(
                value,
                tokens[token : token + size],
                logprobs[sampled : sampled + size],
                temperature,
                texts[kv],
            )
            if has_proximal:
                segment.proximal.set(proximals[scored : scored + size], version)
                scored += size
            sampled += size
            yield segment
        token += size


def _joined(arrays: Sequence[NDArray[Any]], dtype: Any) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype), *arrays], dtype=dtype))


def _integers(values: Iterable[int]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


def _numbers(tensor: torch.Tensor) -> list[Any]:
    return tensor.tolist()
