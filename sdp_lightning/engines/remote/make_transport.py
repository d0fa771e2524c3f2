"""The factory of weight transports."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from sdp_lightning.engines.remote.addresses import is_far
from sdp_lightning.engines.remote.options import RemoteOptions
from sdp_lightning.errors import EngineError
from sdp_lightning.weights.protocol import WeightTransport


def make_transport(options: RemoteOptions, urls: list[str]) -> WeightTransport:
    """Make the transport that ``options`` name, for the servers at ``urls``.

    Raises:
        EngineError: if it cannot be opened.
        ConfigError: if it does not support this setup.
    """
    folder = None if options.weight_folder is None else Path(options.weight_folder)
    limit = options.control_timeout_s
    match options.transport:
        case "files":
            from sdp_lightning.weights.files import FileTransport

            return FileTransport(folder)
        case "lora":
            from sdp_lightning.weights.lora import LoRATransport

            assert options.lora_alpha is not None
            return LoRATransport(options.lora_alpha, root=folder)
        case "tcp":
            from sdp_lightning.weights.tcp import TcpTransport

            return TcpTransport(_trainer_host(options, urls), timeout_s=limit, root=folder)
        case "delta":
            from sdp_lightning.weights.delta_transport import DeltaTransport, tell_folder
            from sdp_lightning.weights.tcp import FolderSender

            deliver = tell_folder
            if options.delta_over == "tcp":
                deliver = FolderSender(_trainer_host(options, urls), timeout_s=limit).send
            every = options.anchor_every
            return DeltaTransport(anchor_every=every, deliver=deliver, root=folder)
        case "nccl" | "ipc":
            from sdp_lightning.weights.vllm_native import NativeTransport

            host = _trainer_host(options, urls)
            return NativeTransport(options.transport, host, timeout_s=limit)


def _trainer_host(options: RemoteOptions, urls: list[str]) -> str:
    from sdp_lightning.weights.tcp import address_towards

    if options.trainer_host is not None:
        return options.trainer_host.strip("[]")  # of an IPv6 address, as in a URL
    parts = map(urlsplit, sorted(urls, key=is_far, reverse=True))
    *others, last = [(str(part.hostname), part.port or 80) for part in parts]
    for address in others:
        with suppress(EngineError):  # one server may be out of reach, and another one not
            return address_towards(*address)
    return address_towards(*last)
