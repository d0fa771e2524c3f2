"""Settings of an engine of servers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields
from typing import Literal

from sdp_lightning.config.server_keys import key_source
from sdp_lightning.config.validation import at_least, check_types, not_negative, positive
from sdp_lightning.engines.remote.addresses import check_api_key
from sdp_lightning.engines.remote.backend import OnUpdate
from sdp_lightning.errors import ConfigError
from sdp_lightning.types import KVPolicy
from sdp_lightning.weights.protocol import TransportName


@dataclass(frozen=True)
class RemoteOptions:
    """Deadlines and policies of an engine of servers. Times in seconds.

    Args:
        min_replicas: a publish with fewer serving servers than this is an error.
        request_timeout_s: a completion is sent again, alone and with twice the time, when there was
            no sign of sampling for so long: no token of it where answers are streamed, else no
            answer of its server to any request, nor progress of the server's count of sampled
            tokens (``/metrics``). Without a sign of its own a request is also sent again after one
            second more for each of ``max_new_tokens``. A server is taken out when three requests in
            a row had no sign.
        control_timeout_s: timeout of a load of weights, and of a probe.
        answer_timeout_s: timeout of short calls: pause, resume, version.
        recover_s: longest wait for servers to come back when none is left to sample on, or too
            few to publish to.
        max_tries: number of times a request is sent, each to a healthy server, before its error
            fails the rollout.
        max_requests: outstanding requests over all servers; others wait here. Each has a
            connection: the soft ``ulimit -n`` is raised as far as needed, and fewer are sent at a
            time, with a warning, where the hard one does not allow them.
        settle_s: a pause waits until the latest request is this old, so that it has arrived.
        abort_grace_s: requests that have not returned this long after a pause had not arrived
            before it: they are cancelled, without a token, and sent again later.
        health_interval_s: time between two health checks of a server.
        health_timeout_s: a server that takes longer to answer a health check is taken out.
        on_update: ``"interrupt"``: requests return what they have and are sent again under the new
            version. ``"keep"``: servers keep requests across an update, and report which version
            sampled which token.
        kv_on_update: ``"recompute"`` clears caches when weights change, ``"keep"`` does not, and
            then log-probs of a prefix that was cached before belong to no single version.
        stream: receive tokens in chunks while they are sampled, so that few are lost when a server
            dies. Costs the client time for every chunk.
        transport: how weights travel. ``"files"`` in shared memory, or in ``weight_folder``;
            ``"tcp"`` over the network from CPU to CPU; ``"nccl"`` and ``"ipc"`` between GPUs, by
            vLLM's own engines; ``"lora"`` only an adapter, by its path; ``"delta"`` only the values
            that changed, as files or by TCP.
        weight_folder: folder of weight files; None is this host's shared memory. Other hosts must
            see it under the same name.
        trainer_host: this host's address for servers that fetch weights from it; None detects it.
        delta_over: ``"files"`` or ``"tcp"``: how ``"delta"`` travels.
        anchor_every: ``"delta"`` sends all trained weights with every so many updates.
        lora_alpha: ``alpha`` of the adapter that ``"lora"`` sends.
        api_key: bearer token: ``env:NAME``, ``file:PATH`` or the key; None is the value of
            ``SDP_API_KEY``. Servers on other hosts need one; those that a run starts are given it.
        ca_file: PEM file of the certificate authorities that are believed at ``https`` addresses;
            None: those of the system.
        use_proxy: send requests through the proxy of ``HTTP_PROXY`` or ``HTTPS_PROXY``, except to
            servers of ``NO_PROXY`` or of this machine. Weights do not go through it.
        vocab_size: number of token ids of the model; a server that samples another one is set
            aside. None: a fit takes its model's; else any of 31 bits is accepted.
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
    delta_over: Literal["files", "tcp"] = "files"
    anchor_every: int = 50
    api_key: str | None = field(default=None, repr=False)
    ca_file: str | None = None
    vocab_size: int | None = None
    use_proxy: bool = False

    def __post_init__(self) -> None:
        if self.api_key is not None and key_source(self.api_key) == "api_key":
            check_api_key("api_key", self.api_key)  # first: other errors show the value
        if str(self.transport) == "gloo":
            warnings.warn("transport='gloo' is now 'tcp'.", FutureWarning, stacklevel=3)
            object.__setattr__(self, "transport", "tcp")
        check_types(self)
        if self.transport != "delta" and (self.delta_over, self.anchor_every) != ("files", 50):
            raise ConfigError(
                f"delta_over={self.delta_over!r} and anchor_every={self.anchor_every} are for "
                f"transport='delta', and it is {self.transport!r}."
            )
        for name in ("min_replicas", "max_tries", "max_requests", "anchor_every"):
            at_least(name, getattr(self, name), 1)
        if self.vocab_size is not None:
            at_least("vocab_size", self.vocab_size, 1)
        if (self.lora_alpha is None) == (self.transport == "lora"):
            raise ConfigError(
                f"lora_alpha={self.lora_alpha} and transport={self.transport!r}: the one goes with "
                "the other."
            )
        not_negative("settle_s", self.settle_s)
        for setting in fields(self):
            if setting.name.endswith("_s") and setting.name != "settle_s":
                positive(setting.name, getattr(self, setting.name))
