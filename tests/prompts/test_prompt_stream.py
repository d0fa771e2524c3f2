"""Which row comes next: by (seed, epoch), from a position that survives a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, overload

import pytest

from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.prompts.stream import PromptStream, derive_seed


def make_stream(n: int = 5, **settings: Any) -> PromptStream:
    return PromptStream([{"n": i} for i in range(n)], **{"num_epochs": None} | settings)


def indices(stream: PromptStream, count: int) -> list[int]:
    rows = [stream.next() for _ in range(count)]
    return [row.index for row in rows if row is not None]


def test_every_epoch_has_every_row_once_in_an_order_of_its_own() -> None:
    stream = make_stream(20)
    epochs = [indices(stream, 20) for _ in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert indices(make_stream(20), 60) == [*epochs[0], *epochs[1], *epochs[2]], "fixed by the seed"
    assert indices(make_stream(20, seed=1), 20) != epochs[0]


def test_unshuffled_rows_come_as_they_are_until_the_epochs_end() -> None:
    stream = make_stream(3, shuffle=False, num_epochs=2)
    assert indices(stream, 6) == [0, 1, 2, 0, 1, 2]
    assert stream.is_exhausted and stream.next() is None


def test_rows_given_back_come_first_also_after_the_end() -> None:
    stream = make_stream(3, shuffle=False, num_epochs=1)
    rows = [row for _ in range(3) if (row := stream.next())]
    for row in rows[1:]:
        stream.give_back(row)
    assert not stream.is_exhausted
    assert indices(stream, 2) == [1, 2] and stream.is_exhausted


def test_a_stream_goes_on_where_its_state_was_taken() -> None:
    stream = make_stream(5)
    rows = [row for _ in range(7) if (row := stream.next())]
    for row in rows[3:5]:
        stream.give_back(row)
    state = stream.state_dict()
    expected = indices(stream, 20)
    restored = make_stream(5)
    restored.load_state_dict(state)
    assert indices(restored, 20) == expected


@pytest.mark.fault("corrupted data", "resume")
def test_another_number_of_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="made with 5 prompts, now there are 4"):
        make_stream(4).load_state_dict(make_stream(5).state_dict())
    with pytest.raises(ConfigError, match="prompts is empty"):
        make_stream(0)


@pytest.mark.fault("corrupted data", "resume")
def test_other_rows_of_the_same_number_are_refused_with_the_remedy() -> None:
    rows = [{"prompt": str(n), "tests": [n]} for n in range(5)]
    state = PromptStream(rows, num_epochs=None).state_dict()
    same = [dict(reversed(row.items())) for row in rows]
    PromptStream(same, num_epochs=None).load_state_dict(state)
    other = [*rows[:3], {"prompt": "3", "tests": [4]}, rows[4]]
    with pytest.raises(ConfigError, match=r"with 5 other prompts .*prompts_on_resume='restart'"):
        PromptStream(other, num_epochs=None).load_state_dict(state)


def test_a_state_without_a_fingerprint_is_taken_and_said(caplog: pytest.LogCaptureFixture) -> None:
    state = make_stream(5).state_dict()
    del state["fingerprint"]
    make_stream(5).load_state_dict(state)
    assert "has no fingerprint of its 5 prompts" in caplog.text


def test_rows_that_cannot_all_be_read_are_said_to_have_no_fingerprint(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(list[dict[str, int]]):
        def __iter__(self) -> Any:
            raise OSError("disk")

    stream = PromptStream(Broken([{"n": 0}]), num_epochs=None)
    assert stream.state_dict()["fingerprint"] is stream.state_dict()["fingerprint"] is None
    assert caplog.text.count("cannot tell its prompts from others") == 1
    restored = make_stream(1)
    restored.load_state_dict(stream.state_dict())


@pytest.mark.fault("exception", "fetch")
def test_a_row_that_cannot_be_read_is_named_and_comes_again() -> None:
    class Flaky(Sequence[Mapping[str, Any]]):
        broken = True

        def __len__(self) -> int:
            return 2

        @overload
        def __getitem__(self, index: int) -> Mapping[str, Any]: ...
        @overload
        def __getitem__(self, index: slice) -> Sequence[Mapping[str, Any]]: ...
        def __getitem__(self, index: Any) -> Any:
            if self.broken:
                raise OSError("disk")
            return {"n": index}

    rows = Flaky()
    stream = PromptStream(rows, shuffle=False, num_epochs=1)
    with pytest.raises(RolloutError, match=r"reading row 0 .* failed: OSError"):
        stream.next()
    rows.broken = False
    assert indices(stream, 2) == [0, 1]


@pytest.mark.fault("corrupted data", "fetch")
def test_a_row_must_be_a_mapping_and_is_named_by_its_id_or_index() -> None:
    with pytest.raises(RolloutError, match="row 0 of the prompts is str"):
        PromptStream(["text"], num_epochs=1).next()  # type: ignore[list-item]
    stream = PromptStream([{"id": "a"}, {}], shuffle=False, num_epochs=1)
    assert [row.row_id for _ in range(2) if (row := stream.next())] == ["a", "1"]


def test_seeds_differ_in_every_part_and_are_reproducible() -> None:
    seeds = {derive_seed(*parts) for parts in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0))}
    assert len(seeds) >= 4 and derive_seed(1, 2) == derive_seed(1, 2) != derive_seed(2, 1)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("other", [{"seed": 1}, {"shuffle": False}])
@pytest.mark.fault("corrupted data", "resume")
def test_a_position_in_another_order_is_refused(other: dict[str, Any]) -> None:
    rows = [{"prompt": str(n)} for n in range(4)]
    state = PromptStream(rows, seed=0, num_epochs=None).state_dict()
    with pytest.raises(ConfigError, match="seed=0 and shuffle=True"):
        PromptStream(rows, num_epochs=None, **other).load_state_dict(state)
