"""What tells a process of torch.distributed which rank it is."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Environment variables of one of ``size`` ranks that meet at ``port``."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
    }
