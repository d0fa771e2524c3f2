"""One line of an error, and the place in the user's own code."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdp_lightning.cli.main import main
from sdp_lightning.config.import_path import load_object
from sdp_lightning.errors import RolloutError, error_text, explain, user_place


def test_a_message_of_ours_stands_alone_others_with_their_name() -> None:
    assert error_text(RolloutError("row 3 is empty.")) == "row 3 is empty."
    assert error_text(KeyError("gold")) == "KeyError: 'gold'"
    assert error_text(RolloutError()) == "RolloutError: "


def test_an_explanation_is_one_line_with_the_notes() -> None:
    error = OSError("no space\nleft")
    error.add_note("it was not written.")
    assert explain(error) == "no space left it was not written."


def test_the_place_is_what_the_package_called_not_what_called_the_package(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def outer():\n    inner()\n\ndef inner():\n    raise ValueError('no')\n\nouter()\n"
    )
    with pytest.raises(ValueError, match="no") as raised:
        load_object(f"{path}:outer")
    assert user_place(raised.value) == f"{path}:5, in inner"
    with pytest.raises(RolloutError) as ours:
        raise RolloutError("nobody's")
    assert user_place(ours.value) is None


def test_a_cycle_of_causes_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert explain(first) == "a"


def test_on_demand_the_error_comes_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDP_TRACEBACK", "1")
    with pytest.raises(RolloutError):
        raise_through_main(monkeypatch)
    monkeypatch.delenv("SDP_TRACEBACK")
    assert raise_through_main(monkeypatch) == 1


def raise_through_main(monkeypatch: pytest.MonkeyPatch) -> int:
    from sdp_lightning.cli import trainer as trainer_cli

    def fail(arguments: list[str]) -> None:
        raise RolloutError("it failed.")

    monkeypatch.setattr(trainer_cli, "RolloutCLI", fail)
    return main(["fit"])


class Unprintable(Exception):
    def __str__(self) -> str:
        raise KeyboardInterrupt


def test_an_error_that_cannot_be_printed_is_still_named() -> None:
    shown = "(its message cannot be made: KeyboardInterrupt)"
    assert error_text(Unprintable()) == f"Unprintable: {shown}"
    assert shown in explain(Unprintable())
