"""How an engine deals with its servers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from sdp_lightning.engines.remote.backend import OnUpdate
from sdp_lightning.errors import ConfigError
from sdp_lightning.types import KVPolicy
from sdp_lightning.weights.protocol import TransportName


@dataclass(frozen=True)
class RemoteOptions:
    """How an engine deals with its servers. Times in seconds.

    Args:
        min_replicas: fewer serving servers than this end a publish with an error.
        request_timeout_s: longest wait for one completion.
        control_timeout_s: longest wait for a load of weights, and for a probe.
        answer_timeout_s: longest wait for what is short: a pause, a resume, a version.
        recover_s: longest wait for servers to come back when none is left to sample on, or too
            few to publish to.
        max_tries: times a request is sent, each to a server that seemed well, before its error
            is the rollout's.
        max_requests: out at once, over all servers; others wait here. Each has a connection, so
            stay below what ``ulimit -n`` allows.
        settle_s: a pause waits until the latest request is this old, so that it has arrived.
        abort_grace_s: requests that have not returned this long after a pause had not arrived
            before it: they are taken back, with no token, and sent again later.
        health_interval_s: how often servers are asked whether they live.
        health_timeout_s: a server that takes longer to say so is taken out.
        on_update: ``"interrupt"``: requests return what they have and are sent again under the new
            version. ``"keep"``: servers carry them across, and say which version sampled what.
        kv_on_update: ``"recompute"`` clears caches when weights change, ``"keep"`` does not, and
            then log-probs of a prefix that was cached before belong to no single version.
        stream: take tokens as they are sampled, some at a time: a server that dies takes few
            of them with it. Costs the client time for every chunk.
        transport: how weights travel. ``"files"`` in shared memory, or in ``weight_folder``;
            ``"gloo"`` over the network from CPU to CPU; ``"nccl"`` and ``"ipc"`` between GPUs, by
            vLLM's own engines; ``"lora"`` only an adapter, by its path.
        weight_folder: where files go; None is this host's shared memory. Other hosts must see it
            under the same name.
        trainer_host: this host's name for servers that fetch weights from it; None finds out.
        lora_alpha: of the adapter that ``"lora"`` sends.
        api_key: bearer token, else that in ``SDP_API_KEY``; servers on other hosts need one.
    """

    min_replicas: int = 1
    request_timeout_s: float = 600.0
    control_timeout_s: float = 120.0
    answer_timeout_s: float = 30.0
    recover_s: float = 120.0
    max_tries: int = 5
    max_requests: int = 768
    settle_s: float = 0.05
    abort_grace_s: float = 1.0
    health_interval_s: float = 2.0
    health_timeout_s: float = 10.0
    on_update: OnUpdate = "interrupt"
    kv_on_update: KVPolicy = "recompute"
    stream: bool = False
    transport: TransportName = "files"
    weight_folder: str | None = None
    trainer_host: str | None = None
    lora_alpha: float | None = None
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.on_update not in ("interrupt", "keep"):
            raise ConfigError(f"on_update must be 'interrupt' or 'keep', got {self.on_update!r}.")
        if min(self.min_replicas, self.max_tries, self.max_requests) < 1:
            raise ConfigError(
                "min_replicas, max_tries and max_requests must be at least 1, got "
                f"{self.min_replicas}, {self.max_tries} and {self.max_requests}."
            )
        if self.transport not in get_args(TransportName):
            raise ConfigError(
                f"transport must be one of {', '.join(get_args(TransportName))}, got "
                f"{self.transport!r}."
            )
        if (self.lora_alpha is None) == (self.transport == "lora"):
            raise ConfigError(
                f"lora_alpha={self.lora_alpha} and transport={self.transport!r}: the one goes with "
                "the other."
            )
        if self.settle_s < 0:
            raise ConfigError(f"settle_s must not be negative, got {self.settle_s}.")
        for name, value in (
            ("request_timeout_s", self.request_timeout_s),
            ("control_timeout_s", self.control_timeout_s),
            ("answer_timeout_s", self.answer_timeout_s),
            ("recover_s", self.recover_s),
            ("abort_grace_s", self.abort_grace_s),
            ("health_interval_s", self.health_interval_s),
            ("health_timeout_s", self.health_timeout_s),
        ):
            if not value > 0:
                raise ConfigError(f"{name} must be positive, got {value}.")
