"""docs/reference/network.md names every port of a run; those of several ranks are tested there."""

from __future__ import annotations

import pytest

import sdp_lightning as sdp
from support.fake_servers import Server, connected
from support.listening import listening
from support.network_page import check, places
from support.remote_engines import publish
from support.trainers import make_data, make_module, make_trainer


class Ports(sdp.WeightSyncCallback):
    """Keeps what this process listens on while it trains."""

    def on_train_batch_start(self, *_: object) -> None:
        self.found = listening()


def test_one_process_with_an_engine_of_its_own_listens_on_nothing(model_folder: str) -> None:
    before, ports = listening(), Ports()
    make_trainer(ports, max_steps=1).fit(make_module(model_folder), make_data())
    check(ports.found - before, places("one process", "trainer"))


@pytest.mark.parametrize("transport", ["files", "tcp"])
def test_on_servers_that_run_already_it_listens_on_nothing_between_transfers(
    one: Server, transport: str
) -> None:
    before = listening()
    with connected(one, transport=transport) as engine:
        publish(engine, 0, reset=True)
        check(listening() - before, places("vllm://host:port", "trainer"))
    check(listening(one.process.pid), places("vllm://launch", "each server"))


@pytest.mark.parametrize(
    ("sockets", "said"),
    [
        ([("0.0.0.0", 7)], "0.0.0.0:7 is not on the page"),
        ([("10.0.0.1", 7), ("0.0.0.0", 8)], "10.0.0.1:7 is not on the page"),
        ([], "nobody listens there"),
    ],
)
def test_a_port_that_the_page_does_not_have_is_found(
    sockets: list[tuple[str, int]], said: str
) -> None:
    named = places("several processes", "rank 0")
    assert named == ["all:MASTER_PORT"]
    check([("::", 8)], named, MASTER_PORT=8)
    with pytest.raises(AssertionError, match=said):
        check(sockets, named, MASTER_PORT=8)
    with pytest.raises(KeyError):
        places("several processes", "nobody")
