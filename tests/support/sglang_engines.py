"""Fake SGLang processes; engines on them are made as those on vLLM's are."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from sdp_lightning.engines.remote.sglang import SGLangBackend
from support.fake_servers import Server, servers


class SGLangServer(Server):
    """A fake SGLang in a process of its own."""

    script = "fake_sglang.py"
    backend = SGLangBackend

    def post(self, path: str, body: Any) -> Any:
        """As another client would."""
        asked = urllib.request.Request(self.url + path, json.dumps(body).encode(), method="POST")
        asked.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(asked, timeout=30.0) as answer:
            return json.loads(answer.read())


@pytest.fixture(scope="module")
def pair() -> Iterator[list[SGLangServer]]:
    with servers(2, kind=SGLangServer) as running:
        yield running
