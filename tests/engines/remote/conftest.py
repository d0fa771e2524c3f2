"""Fixtures of the tests of remote engines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.raw_server import Asker, asking


@pytest.fixture(scope="module")
def asker() -> Iterator[Asker]:
    """Asks a server that answers with given bytes."""
    with asking() as asker:
        yield asker
