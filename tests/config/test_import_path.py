"""Objects named by strings, and folders that are built once."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdp_lightning.config.build_cache import build_once, cache_folder
from sdp_lightning.config.import_path import load_object
from sdp_lightning.config.model_source import quiet_transformers, resolve_model
from sdp_lightning.errors import ConfigError
from sdp_lightning.prompts.sources import load_rows


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sdp_lightning"


def test_a_module_object_is_loaded_by_name():
    import os.path

    assert load_object("os.path:join") is os.path.join


def test_a_dotted_name_reaches_into_the_object():
    assert load_object("pathlib:Path.home") == Path.home


def test_a_file_is_relative_to_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "task.py").write_text("rows = [1, 2]\n")
    monkeypatch.chdir(tmp_path)
    assert load_object("task.py:rows") == [1, 2]


def test_a_file_runs_once_however_often_it_is_named(tmp_path: Path):
    file = tmp_path / "once.py"
    file.write_text("first, second = object(), object()\n")
    assert load_object(f"{file}:first") is load_object(f"{tmp_path}/./once.py:first")


def test_a_file_imports_its_neighbours_and_leaves_the_path_as_it_was(tmp_path: Path):
    (tmp_path / "neighbour_of_task.py").write_text("value = 7\n")
    (tmp_path / "task.py").write_text("from neighbour_of_task import value\n")
    before = list(sys.path)
    assert load_object(f"{tmp_path}/task.py:value") == 7
    assert sys.path == before


def folder_with(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        file = folder / f"{name.replace('__', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_files_beside_a_file_are_its_own_whatever_else_has_their_names(tmp_path: Path):
    imports = "import helper_of_task as h\nfrom task import name\n\ndef later():\n    import task\n"
    model = f"{imports}    return task\n"
    for letter in "ab":
        folder_with(
            tmp_path / letter,
            model=model,
            task=f"from helper_of_task import name\nclass Kind: pass\nnames = '{letter}'\n",
            helper_of_task=f"name = {letter!r}\n",
        )
    for letter in "abab":
        place = f"{tmp_path}/{letter}"
        assert load_object(f"{place}/model.py:name") == letter
        later: Any = load_object(f"{place}/model.py:later")
        assert later().names == letter
        kind = load_object(f"{place}/task.py:Kind")
        assert later().Kind is kind and pickle.loads(pickle.dumps(kind)) is kind  # one module
    assert "helper_of_task" not in sys.modules


def test_a_neighbour_that_the_process_has_imported_is_that_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder_with(
        tmp_path, shared_by_both="class Kind: pass\n", task="from shared_by_both import Kind"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import shared_by_both  # type: ignore[import-not-found]  # pyright: ignore

    assert load_object(f"{tmp_path}/task.py:Kind") is shared_by_both.Kind
    monkeypatch.delitem(sys.modules, "shared_by_both")


def test_the_standard_librarys_names_are_its_own(tmp_path: Path):
    folder_with(tmp_path, math="tau = 0\n", task="import math\n")
    assert load_object(f"{tmp_path}/task.py:math.tau") > 6


def test_packages_of_one_name_beside_two_files_are_an_error_that_names_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for letter in "ab":
        folder_with(
            tmp_path / letter, task="from helpers_of_task.x import y", helpers_of_task__x="y=1"
        )
        (tmp_path / letter / "helpers_of_task/__init__.py").touch()
    assert load_object(f"{tmp_path}/a/task.py:y") == 1
    with pytest.raises(ConfigError, match=r"b/helpers_of_task/.*a/helpers_of_task/.*Rename one"):
        load_object(f"{tmp_path}/b/task.py:y")
    for name in ("helpers_of_task", "helpers_of_task.x"):
        monkeypatch.delitem(sys.modules, name)


def test_classes_of_a_file_can_be_pickled(tmp_path: Path):
    (tmp_path / "kinds.py").write_text("class Kind:\n    pass\n")
    kind = load_object(f"{tmp_path}/kinds.py:Kind")
    assert pickle.loads(pickle.dumps(kind)) is kind


def test_a_file_that_fails_passes_its_error_and_is_run_again(tmp_path: Path):
    file = tmp_path / "broken.py"
    file.write_text("1 / 0\n")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            load_object(f"{file}:anything")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        pytest.param("no_colon", "does not name an object", id="no colon"),
        pytest.param(":name", "does not name an object", id="nothing before the colon"),
        pytest.param("os.path:", "does not name an object", id="nothing after the colon"),
        pytest.param("os path:join", "does not name an object", id="a module with a space"),
        pytest.param("os:a-b", "does not name an object", id="a name that is no identifier"),
        pytest.param("os.path:joim", "Did you mean join", id="a near miss is suggested"),
        pytest.param("os.path:zzzzzz", "has no 'zzzzzz'.$", id="no near miss, no suggestion"),
        pytest.param("no_such_package.x:y", "no module 'no_such_package'", id="no package"),
        pytest.param("os.nowhere:y", "no module 'os.nowhere'", id="no submodule"),
        pytest.param("no/such/folder/file.py:y", "there is no file", id="no folder"),
    ],
)
def test_a_wrong_spec_is_a_config_error_that_says_what_is_wrong(spec: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_object(spec)


def test_a_missing_file_names_its_near_neighbours(tmp_path: Path):
    (tmp_path / "rewards.py").touch()
    with pytest.raises(ConfigError, match=r"Did you mean rewards\.py"):
        load_object(f"{tmp_path}/reward.py:x")


def test_a_module_that_misses_an_import_of_its_own_keeps_that_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "needs_absent_thing.py").write_text("import absent_thing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="absent_thing"):
        load_object("needs_absent_thing:x")


def test_without_xdg_the_cache_is_in_the_home_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "sdp_lightning"


def test_a_folder_is_built_once(cache: Path):
    calls: list[Path] = []

    def build(folder: Path) -> None:
        calls.append(folder)
        (folder / "file").write_text("x")

    assert build_once("thing", build) == build_once("thing", build) == cache / "thing"
    assert len(calls) == 1
    assert (cache / "thing" / "file").read_text() == "x"


def test_a_build_that_failed_leaves_no_folder_and_is_done_again(cache: Path):
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        build_once("thing", fail)
    assert not (cache / "thing").exists()
    build_once("thing", lambda folder: (folder / "whole").touch())
    assert [file.name for file in (cache / "thing").iterdir()] == ["whole"]


def test_of_two_processes_one_builds_and_both_find_the_folder_complete(cache: Path):
    script = (
        "import sys, time\n"
        "from sdp_lightning.config.build_cache import build_once\n"
        "def build(folder):\n"
        "    print('built'); time.sleep(0.5); (folder / 'done').touch()\n"
        "assert (build_once('thing', build) / 'done').exists()\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(outputs) == ["", "built\n"]


def test_transformers_is_quiet_inside_and_as_before_after(capsys: pytest.CaptureFixture[str]):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(RuntimeError), quiet_transformers():
        logging.get_logger("transformers").warning("advice")
        list(logging.tqdm([1, 2]))
        print("a bar", file=sys.stderr)
        raise RuntimeError
    assert capsys.readouterr().err == ""
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(7, id="a number"),
        pytest.param({"prompt": "1+1="}, id="a single row"),
        pytest.param(None, id="None"),
    ],
)
def test_what_is_no_rows_is_refused(source: Any):
    with pytest.raises(ConfigError, match=rf"must be rows: .*got {type(source).__name__}"):
        load_rows(source)


def test_rows_pass_as_they_are():
    rows = ({"prompt": "1+1="},)
    assert load_rows(rows) is rows


def test_a_model_may_be_a_path_in_the_home_folder_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model(tmp_path / "model") == str(tmp_path / "model")
    assert resolve_model("~/model") == str(tmp_path / "model")
    assert resolve_model("org/model") == "org/model"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        pytest.param("/no/such", "there is no model folder '/no/such'", id="a path"),
        pytest.param(Path("no"), "there is no model folder 'no'", id="a Path"),
        pytest.param("os:sep", "'os:sep' is no function, but str", id="no function"),
        pytest.param(object(), "must be an id, a folder, .* got object", id="an object"),
    ],
)
def test_what_is_no_model_is_named(model: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        resolve_model(model)
