"""Fixtures of fake vLLM servers; a ``conftest.py`` imports them for the tests beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.fake_servers import Server, servers


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Server]]:
    """Two servers that all tests of a module share."""
    with servers(2) as running:
        yield running


@pytest.fixture
def two(pair: list[Server]) -> list[Server]:
    """Two servers in their first state."""
    for server in pair:
        server.do(reset={}, faults=[])
    return pair


@pytest.fixture
def one(two: list[Server]) -> Server:
    """One server in its first state."""
    return two[0]


@pytest.fixture
def fresh() -> Iterator[list[Server]]:
    """Two servers that a test may kill."""
    with servers(2) as running:
        yield running
