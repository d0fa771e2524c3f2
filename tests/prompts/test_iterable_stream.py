"""Prompts that are read one after another: every row once, also over a resume."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.prompts.iterable_rows import IterableRows
from sdp_lightning.prompts.iterable_stream import READ_AHEAD, IterableStream
from sdp_lightning.prompts.sources import load_rows, read_rows
from sdp_lightning.rollout.checkpoint.resharding import reshard
from sdp_lightning.rollout.checkpoint.row_codec import decode, encode
from sdp_lightning.types import Row
from support.checkpoints import through_a_file

WAIT_S = 60.0


def rows_of(count: int, epoch: int = 0) -> list[dict[str, Any]]:
    return [{"id": f"{epoch}-{i}", "n": i, "deep": {"tests": [i]}} for i in range(count)]


class Stateful:
    """As ``datasets`` streaming: it has epochs and a state, which counts the rows it gave."""

    def __init__(self, count: int) -> None:
        self.count, self.epoch, self.given, self.start = count, 0, 0, 0
        self.read: list[str] = []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["given"] if state["epoch"] == self.epoch else 0

    def __iter__(self) -> Iterator[Row]:
        self.given, self.start = self.start, 0
        for row in rows_of(self.count, self.epoch)[self.given :]:
            self.given += 1
            self.read.append(row["id"])
            yield row


class Unshuffled(Stateful):
    """Its state does not hold what was in its buffer, as after ``datasets``' ``shuffle``."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        lost = 2 if state["given"] else 0
        super().load_state_dict(state | {"given": state["given"] + lost})


class Torch(IterableDataset[Row]):
    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Iterator[Row]:
        return iter(rows_of(7))


def generator(count: int = 7) -> Callable[[], Iterator[Row]]:
    def rows() -> Iterator[Row]:
        yield from rows_of(count)

    return rows


def loader(count: int = 7, **settings: Any) -> DataLoader[Any]:
    return DataLoader(rows_of(count), batch_size=3, collate_fn=list, **settings)  # type: ignore[arg-type]


def stream(source: Any, **settings: Any) -> IterableStream:
    rows = load_rows(source)
    assert isinstance(rows, IterableRows)
    return IterableStream(rows, **{"num_epochs": 2} | settings)


def take(prompts: IterableStream, count: int = 10**6) -> list[tuple[int, int]]:
    places: list[tuple[int, int]] = []
    while len(places) < count and (row := prompts.next(WAIT_S)) is not None:
        assert row.data["n"] == row.index
        places.append((row.epoch, row.index))
    return places


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_row_with_the_id_of_an_earlier_one_of_its_epoch_is_dropped(num_ranks: int) -> None:
    """Also where another rank takes that one; without ``drops``, ids say nothing."""

    def rows() -> Iterator[Any]:
        for n, name in enumerate("abacb"):
            yield {"n": n, "id": name}
        yield {"n": 5}

    ranks = [stream(rows, rank=r, num_ranks=num_ranks, drops=True) for r in range(num_ranks)]
    places = sorted(place for prompts in ranks for place in take(prompts))
    assert places == [(epoch, index) for epoch in (0, 1) for index in (0, 1, 3, 5)]
    assert sum(prompts.num_dropped for prompts in ranks) == 4
    ranks.append(stream(rows))
    assert len(take(ranks[-1])) == 12
    for prompts in ranks:
        prompts.close()


def test_a_source_that_repeats_itself_without_end_is_refused_when_repeats_are_dropped() -> None:
    prompts = stream(lambda: itertools.cycle(rows_of(3)), drops=True)
    assert len(take(prompts, 3)) == 3
    with pytest.raises(RolloutError, match=r"the last 10000 rows .* were left out, .*begins again"):
        prompts.next(WAIT_S)
    prompts.close()


def saved(prompts: IterableStream) -> dict[str, Any]:
    return decode(through_a_file({"state": encode(prompts.state_dict(), "it")})["state"])


WHOLE = [(epoch, index) for epoch in range(2) for index in range(7)]
SOURCES: dict[str, Callable[[], Any]] = {
    "function": generator,
    "iterable": lambda: Again(),
    "stateful": lambda: Stateful(7),
    "a state that loses rows": lambda: Unshuffled(7),
    "torch": Torch,
    "loader": loader,
    "loader of rows": lambda: DataLoader(Torch(), batch_size=None),
}


class Again:
    def __iter__(self) -> Iterator[Row]:
        return iter(rows_of(7))


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("begun", [0, 1, 5, 7, 9, 14])
def test_every_row_of_every_epoch_comes_once_over_a_resume(make: Any, begun: int) -> None:
    first = stream(make())
    assert take(first, begun) == WHOLE[:begun]
    state = saved(first)
    first.close()
    second = stream(make())
    second.load_state_dict(state)
    assert take(second) == WHOLE[begun:] and second.is_exhausted
    second.close()
    assert "sdp-prompts" not in [thread.name for thread in threading.enumerate()]


def test_a_state_saves_reading_all_rows_again(caplog: pytest.LogCaptureFixture) -> None:
    first = stream(Stateful(7))
    take(first, 5)
    source = Stateful(7)
    second = stream(source)
    second.load_state_dict(saved(first))
    assert source.read[0] == "0-4" and not caplog.records  # the last one, to be compared
    other = stream(generator())
    other.load_state_dict(saved(first) | {"source": None, "skip": 5, "digest_before": ""})
    assert "reading 5 rows of the prompts rows again" in caplog.text
    for each in (first, second, other):
        each.close()


@pytest.mark.parametrize("make", [generator, Stateful], ids=["by count", "by state"])
@pytest.mark.fault("corrupted data", "resume")
def test_other_rows_are_refused(make: Any) -> None:
    first = stream(make(7))
    take(first, 5)
    state = saved(first) | {"digest": "of others"}
    for prompts in (stream(make(7)), stream(make(3))):
        with pytest.raises(ConfigError, match=r"first 5 rows of .* prompts_on_resume='restart'"):
            prompts.load_state_dict(state)
        prompts.close()
    first.close()


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("taken", [[4, 1], [0, 3], [7, 7]])
def test_ranks_share_all_rows_also_when_there_are_more_or_fewer_of_them(
    num_ranks: int, taken: list[int]
) -> None:
    begun: list[tuple[int, int]] = []
    parts: list[dict[str, Any]] = []
    for rank, count in enumerate(taken):
        prompts = stream(Stateful(7), rank=rank, num_ranks=len(taken))
        mine = take(prompts, count)
        assert mine == WHOLE[rank :: len(taken)][:count]
        back = [row for row in [prompts.next(WAIT_S)] if row is not None]
        for row in back:
            prompts.give_back(row)
        rows = [[row.epoch, row.index, row.data] for row in back]
        parts.append({"prompts": prompts.state_dict(), "rows": rows, "pending": [], "running": []})
        prompts.close()
        begun += mine
    for rank, part in enumerate(reshard(parts, num_ranks)):
        kept = {(epoch, index): row for epoch, index, row in part["rows"]}
        prompts = stream(Stateful(7), rank=rank, num_ranks=num_ranks)
        prompts.load_state_dict(part["prompts"], kept)
        begun += take(prompts)
        prompts.close()
    assert sorted(begun) == WHOLE


def test_few_rows_are_read_ahead_and_none_is_kept() -> None:
    given: list[int] = []

    def endless() -> Iterator[Row]:
        while True:
            given.append(len(given))
            yield {"n": given[-1]}

    prompts = stream(endless, num_epochs=None)
    assert take(prompts, 500) == [(0, index) for index in range(500)]
    assert len(given) <= 500 + READ_AHEAD + 1
    assert prompts.state_dict()["returned"] == [] and not prompts.is_exhausted
    prompts.close()


def test_a_source_that_blocks_holds_nobody_up_and_says_when_it_goes_on() -> None:
    go_on, ready = threading.Event(), threading.Event()

    def slow() -> Iterator[Row]:
        yield {"n": 0}
        assert go_on.wait(WAIT_S)
        yield {"n": 1}

    prompts = stream(slow, num_epochs=1)
    prompts.watch(ready.set)
    assert take(prompts, 1) == [(0, 0)]
    assert prompts.next() is None and not prompts.is_exhausted
    assert prompts.awaited_s is not None
    go_on.set()
    assert ready.wait(WAIT_S)
    assert take(prompts) == [(0, 1)] and prompts.is_exhausted and prompts.awaited_s is None
    prompts.close()


def test_more_rows_than_the_epochs_have_are_read_when_they_are_asked_for() -> None:
    prompts = stream(generator(3), num_epochs=1)
    assert take(prompts) == [(0, 0), (0, 1), (0, 2)] and prompts.is_exhausted
    prompts.extend(2)
    assert not prompts.is_exhausted
    assert take(prompts) == [(1, 0), (1, 1)] and prompts.is_exhausted
    prompts.close()


@pytest.mark.fault("exception", "fetch")
def test_what_a_source_raises_names_it() -> None:
    def broken() -> Iterator[Row]:
        yield {"n": 0}
        raise OSError("no network")

    for source, message in (
        (broken, "reading the prompts broken failed: OSError"),
        (lambda: iter(()), "gave no row in epoch 0"),
        (lambda: iter(["text"]), "the prompts give a str; rows must be mappings"),
        (lambda: iter([[{"n": 0}], [1]]), "the prompts give a int; rows must be mappings"),
    ):
        prompts = stream(source)
        with pytest.raises(RolloutError, match=message):
            take(prompts)
        prompts.close()


def test_a_generator_is_one_epoch_and_only_once() -> None:
    with pytest.raises(ConfigError, match="'rows' can be read once: give the function"):
        stream(generator()(), num_epochs=2)
    with pytest.raises(ConfigError, match="can be read once"):
        stream(generator()(), num_epochs=1, fills=True)
    begun = generator()()
    next(begun)
    with pytest.raises(ConfigError, match="was read from already"):
        load_rows(begun)
    rows = load_rows(generator()())
    assert isinstance(rows, IterableRows) and rows.head(2) == rows_of(2)
    first, second = stream(rows, num_epochs=1), stream(rows, num_epochs=1)
    assert take(first) == WHOLE[:7]
    with pytest.raises(RolloutError, match="were read already"):
        take(second)
    first.close()
    second.close()


def test_a_generator_made_anew_goes_on_where_the_checkpoint_was() -> None:
    first = stream(generator()(), num_epochs=1)
    take(first, 4)
    second = stream(generator()(), num_epochs=1)
    second.load_state_dict(saved(first))
    assert take(second) == WHOLE[4:7]
    first.close()
    second.close()


def test_batches_of_columns_fall_into_rows_or_are_refused() -> None:
    flat = [
        {"prompt": f"{i}+1=", "n": i, "worth": i / 3, "ids": torch.arange(i, i + 2)}
        for i in range(5)
    ]
    rows = read_rows(DataLoader(flat, batch_size=2))  # type: ignore[arg-type]
    assert [(r["prompt"], r["n"], r["worth"], r["ids"].tolist()) for r in rows] == [
        (f"{i}+1=", i, i / 3, [i, i + 1]) for i in range(5)
    ]
    nested = [{"messages": [{"role": "user", "content": str(i)}], "n": i} for i in range(4)]
    with pytest.raises(RolloutError, match="make it with collate_fn=list"):
        read_rows(DataLoader(nested, batch_size=1))  # type: ignore[arg-type]
    assert read_rows(DataLoader(nested, batch_size=3, collate_fn=list)) == nested  # type: ignore[arg-type]


def test_what_shuffles_in_an_order_of_its_own_is_refused() -> None:
    with pytest.raises(ConfigError, match="give its dataset itself"):
        load_rows(loader(shuffle=True))


def test_rows_to_evaluate_are_read_whole_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdp_lightning.prompts.sources.MOST_AT_ONCE", 7)
    assert read_rows(generator()) == rows_of(7)
    with pytest.raises(ConfigError, match="more than 7 rows"):
        read_rows(generator(8))


class GoesOn:
    """As a reader of shards: its iterator goes on where the last one was."""

    def __init__(self, count: int) -> None:
        self.count, self.given = count, 0

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given = state["given"]

    def __iter__(self) -> Iterator[Row]:
        while self.given < self.count:
            self.given += 1
            yield rows_of(self.count)[self.given - 1]


@pytest.mark.parametrize("make", [GoesOn, Stateful], ids=lambda kind: kind.__name__)
def test_looking_at_the_first_rows_does_not_move_a_source_with_a_state(make: Any) -> None:
    rows = IterableRows(make(9))
    assert rows.head(4) == rows.head(4) == rows_of(4)
    stream = IterableStream(rows, num_epochs=1)
    try:
        found = [stream.next(WAIT_S) for _ in range(9)]
        assert [row and row.data for row in found] == rows_of(9)
    finally:
        stream.close()
