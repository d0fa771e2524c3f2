"""What every test shares: one thread, a quiet transformers, a tiny model in a folder."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import support.quick_lightning  # noqa: F401  (changes Lightning)
from sdp_lightning.testing import tiny_model, tiny_tokenizer
from support.export_fixtures import trained, untied_folder
from support.server_fixtures import fresh, one, pair, two

__all__ = ["fresh", "one", "pair", "trained", "two", "untied_folder"]  # fixtures

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # under nohup, or in a script's background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests send it to what they start

torch.set_num_threads(1)
# Scripts of the tests import their helpers as tests do.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)

# Many cases, or much that is not the package: to trace their lines takes as long as to run them.
# What they reach in the package is also reached by tests that are measured.
UNMEASURED = {
    "test_architecture.py",
    "test_estimators.py",
    "test_estimators_by_hand.py",
    "test_gsm8k_recipe.py",
    "test_ledger_machine.py",
    "test_loglinear.py",
    "test_loss.py",
    "test_loss_by_hand.py",
    "test_loss_mutations.py",
    "test_module_objectives.py",
    "test_reward_mutations.py",
    "test_second_moment.py",
    "test_segment_completion.py",
    "test_staleness_ablation.py",
}
# What takes longest: another process of pytest-xdist does the rest beside it.
FIRST = "test_recipes.py"
THREAD_END_S = 200.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != FIRST)
    for item in items:
        if item.path.name in UNMEASURED:
            item.add_marker("no_cover")


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Say something at the end of the tests' output, also from a worker of pytest-xdist."""
    return lambda text: request.node.user_properties.append(("told", text))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, text in report.user_properties:
            if name == "told" and report.when == "call":
                terminalreporter.write_line(text)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama and its character tokenizer, saved as transformers saves them."""
    return save_tiny(tmp_path_factory.mktemp("tiny"), seed=0)


def save_tiny(folder: Path, *, seed: int) -> str:
    from transformers.utils import logging

    logging.disable_progress_bar()
    tiny_model(seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def assertions_in_callbacks_count() -> Iterator[None]:
    """A run sets a callback that raises aside: what a test asserts in one must still fail it."""
    failed: list[str] = []

    def look(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        failed.extend([text] if "set aside: AssertionError" in text else [])
        return True

    observer = logging.getLogger("sdp_lightning.lightning.observer")
    observer.addFilter(look)
    yield
    observer.removeFilter(look)
    assert not failed


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    """Every thread that the test starts ends."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(THREAD_END_S)  # a thread that calls a reward ends when the reward does
        assert not thread.is_alive(), thread


@pytest.fixture
def nothing_is_left(no_thread_is_left: None) -> Iterator[None]:
    """Threads end, and every signal has its handler again. Lightning leaves Ctrl-C ignored."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    after = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after[signal.SIGTERM] == before[signal.SIGTERM]
    assert after[signal.SIGINT] in (before[signal.SIGINT], signal.SIG_IGN)


@pytest.fixture(scope="session")
def fork_server() -> Iterator[Any]:
    """Starts processes that have the libraries loaded: see ``support/fork_server.py``."""
    from support.fork_server import ForkServer

    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def launcher(
    fork_server: Any, model_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """The process that ranks are forked from: see ``support/many_ranks_run.py``."""
    from support.rank_runs import Launcher

    running = Launcher(fork_server, model_folder, tmp_path_factory.mktemp("ranks"))
    yield running
    running.close()


@pytest.fixture
def make_world() -> Iterator[Callable[..., Any]]:
    """Makes the ranks of ``support/rank_worlds.py``, which are closed at the end."""
    from support.rank_worlds import World

    worlds: list[World] = []

    def make(*args: Any, **settings: Any) -> World:
        worlds.append(World(*args, **settings))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()
    assert "sdp-failure-detector" not in [thread.name for thread in threading.enumerate()]
