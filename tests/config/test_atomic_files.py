"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sdp_lightning.config.atomic_files import atomic_file, atomic_folder, remove_leftovers


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_has_its_name_only_when_it_is_complete(tmp_path: Path, durable: bool) -> None:
    target = tmp_path / "made" / "state.json"
    with atomic_file(target, durable=durable) as file:
        file.write(b"new")
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]


def test_a_write_that_fails_leaves_the_file_that_was_there_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    target.write_bytes(b"old")
    with pytest.raises(OSError, match="full") as failure, atomic_file(target) as file:
        file.write(b"ne")
        raise OSError("the disk is full")
    assert "untouched" in failure.value.__notes__[0]
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_is_replaced_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "first").touch()
    with pytest.raises(OSError, match="full"), atomic_folder(target) as folder:
        (folder / "half").touch()
        raise OSError("the disk is full")
    assert [path.name for path in target.iterdir()] == ["first"]
    with atomic_folder(target) as folder:
        (folder / "second").touch()
    assert [path.name for path in target.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [target]


def test_leftovers_of_killed_processes_are_removed_and_other_files_are_not(tmp_path: Path) -> None:
    (tmp_path / ".model.1.part").mkdir()
    (tmp_path / f".model.{os.getpid()}.part").touch()
    (tmp_path / ".other.1.part").touch()
    remove_leftovers(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == [".other.1.part"]
