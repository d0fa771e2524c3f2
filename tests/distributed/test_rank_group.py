"""Agreement of ranks, and the errors of one that is late or elsewhere."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from sdp_lightning.distributed.rank_group import RankGroup
from sdp_lightning.errors import RankError
from support.rank_worlds import DEADLINE_S, Make


def test_alone_nobody_is_asked() -> None:
    ranks = RankGroup()
    assert ranks.all_gather("it", "mine") == ["mine"]
    assert ranks.run_on_all_ranks("it", lambda: 3, lambda n: n + 1) == (3, [4])
    assert ranks.broadcast("it", 5) == 5
    with pytest.raises(KeyError, match="mine"):
        ranks.run_on_all_ranks("it", lambda: {}["mine"])
    ranks.fail(ValueError())
    ranks.close()


def test_all_ranks_gather_the_same_in_order_of_rank(make_world: Make) -> None:
    def work(ranks: RankGroup) -> Any:
        return [ranks.all_gather(f"round {n}", (ranks.rank, n, {"x": None})) for n in range(20)]

    expected = [[(rank, n, {"x": None}) for rank in range(3)] for n in range(20)]
    assert make_world(3).run(work) == [expected] * 3


def test_the_value_of_rank_0_is_first(make_world: Make) -> None:
    assert make_world(3).run(lambda ranks: ranks.broadcast("it", ranks.rank + 7)) == [7, 7, 7]


def test_together_gives_each_its_own_result_and_what_all_tell(make_world: Make) -> None:
    def work(ranks: RankGroup) -> Any:
        return ranks.run_on_all_ranks("it", lambda: ranks.rank * 10, lambda n: n + 1)

    assert make_world(2).run(work) == [(0, [1, 11]), (10, [1, 11])]


def test_more_than_a_connection_takes_at_once_is_gathered(make_world: Make) -> None:
    sizes = [9 * 2**20, 3 * 2**20, 5]
    found = make_world(3).run(
        lambda ranks: [len(b) for b in ranks.all_gather("it", bytes(sizes[ranks.rank]))]
    )
    assert found == [sizes] * 3


def test_values_are_collected_on_rank_0_only_and_it_answers_nothing_of_them(
    make_world: Make,
) -> None:
    def work(ranks: RankGroup) -> Any:
        found = ranks.gather("saving", (ranks.rank, "x" * 3_000_000))
        return found and [(rank, len(words)) for rank, words in found], ranks.all_gather("on", 1)

    world = make_world(3)
    link = world.ranks[1]._links[0]
    receive, answers = link.receive, list[Any]()
    link.receive = lambda: answers.extend(values := receive()) or values  # type: ignore
    every = [(rank, 3_000_000) for rank in range(3)]
    assert world.run(work) == [(every, [1] * 3), (None, [1] * 3), (None, [1] * 3)]
    assert [value for _, _, value in answers] == [None, [1, 1, 1]]


def test_who_left_a_meeting_early_is_not_missed_there_and_hears_the_next_one() -> None:
    near, far = socket.socketpair()
    hurry = True
    first = RankGroup({1: near}, rank=0, size=2, timeout_s=DEADLINE_S)
    second = RankGroup({0: far}, rank=1, size=2, timeout_s=DEADLINE_S, interrupted=lambda: hurry)
    for number in range(2):
        with pytest.raises(RankError, match="interrupted while early"):
            second.all_gather("early", number)
    hurry = False
    assert [first.all_gather("early", "a"), first.all_gather("early", "b")] == [["a", 0], ["b", 1]]
    thread = threading.Thread(target=first.all_gather, args=("on time", "c"))
    thread.start()
    assert second.all_gather("on time", 2) == ["c", 2]
    thread.join(DEADLINE_S)
    first.close()
    second.close()


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.fault("exception", "gather")
def test_an_error_on_one_rank_is_raised_on_all_and_names_it(make_world: Make) -> None:
    def work(ranks: RankGroup) -> Any:
        return ranks.run_on_all_ranks("sorting", lambda: [1][ranks.rank])

    first, second, third = make_world(3).run(work)
    assert isinstance(second, IndexError) and isinstance(third, IndexError)
    assert isinstance(first, RankError)
    assert str(first) == "rank 1 failed while sorting: IndexError: list index out of range"


def test_ranks_that_had_an_error_together_are_still_together(make_world: Make) -> None:
    def work(ranks: RankGroup) -> Any:
        try:
            ranks.run_on_all_ranks("sorting", lambda: [1][ranks.rank])
        except (RankError, IndexError):
            return ranks.all_gather("after it", ranks.rank)

    assert make_world(2).run(work) == [[0, 1], [0, 1]]


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.fault("hang", "gather")
def test_a_deadline_names_the_late_rank_what_was_awaited_and_what_was_done_last(
    make_world: Make, monkeypatch: pytest.MonkeyPatch, late: int
) -> None:
    monkeypatch.setattr("sdp_lightning.distributed.rank_group._AFTER_S", 0.2)
    world = make_world(3)

    def work(ranks: RankGroup) -> None:
        ranks.all_gather("counting", 1)
        if ranks.rank != late:
            ranks.all_gather("sorting", 1, timeout_s=0.2)

    found = world.run(work)
    in_time = [result for rank, result in enumerate(found) if rank != late]
    assert all(isinstance(error, RankError) for error in in_time), found
    assert any(
        str(error).startswith("waited 0.")
        and f"for rank {late} while sorting" in str(error)
        and "did together was: counting" in str(error)
        for error in in_time
    ), found


@pytest.mark.fault("hang", "gather")
def test_a_rank_that_others_wait_for_in_vain_hears_of_it(make_world: Make) -> None:
    world = make_world(2)
    found = world.run(lambda ranks: ranks.all_gather("it", 1, timeout_s=0.1), lambda ranks: None)
    assert isinstance(found[0], RankError)
    error = RuntimeError("at last")
    world.ranks[1].fail(error)
    assert "waited 0.1 s for rank 1 while it" in error.__notes__[0]


class Unprintable(Exception):
    def __str__(self) -> str:
        raise KeyError


def test_an_error_that_cannot_be_printed_reaches_the_others_by_its_kind(make_world: Make) -> None:
    """Fault: what tells the others raises itself, and they wait to their deadline."""

    def fail() -> None:
        raise Unprintable

    first, second = make_world(2).run(
        lambda ranks: ranks.run_on_all_ranks("it", lambda: None),
        lambda ranks: ranks.run_on_all_ranks("it", fail),
    )
    assert isinstance(second, Unprintable)
    assert isinstance(first, RankError) and "rank 1 failed while it: Unprintable: " in str(first)
    world = make_world(2)
    world.ranks[1].fail(Unprintable())
    with pytest.raises(RankError, match="Unprintable: "):
        world.ranks[0].all_gather("it", 1)


@pytest.mark.fault("corrupted data", "gather")
def test_ranks_at_different_meetings_are_told_apart(make_world: Make) -> None:
    found = make_world(2).run(lambda ranks: ranks.all_gather(f"meeting {ranks.rank}", 1))
    assert [type(error) for error in found] == [RankError, RankError]
    assert str(found[1]) == "rank 1 is at 'meeting 1' while rank 0 is at 'meeting 0'."


def test_an_interrupted_wait_ends(make_world: Make) -> None:
    asked = threading.Event()
    world = make_world(2, interrupted=asked.is_set)
    threading.Timer(0.1, asked.set).start()
    found = world.run(lambda ranks: ranks.all_gather("it", 1), lambda ranks: asked.wait(DEADLINE_S))
    assert isinstance(found[0], RankError) and str(found[0]) == "interrupted while it."
