"""Checks on the hosts of servers and trainer."""

from __future__ import annotations

from collections.abc import Mapping

from sdp_lightning.errors import ConfigError


def require_one_host(num_hosts: int, environment: Mapping[str, str]) -> None:
    """Refuse servers that rank 0 starts if other ranks are on another host.

    Args:
        num_hosts: the Trainer's ``num_nodes``.
        environment: environment of this process, where torchrun sets the number of its ranks.

    Raises:
        ConfigError: if the ranks are on more than one host.
    """
    local_size, world_size = (environment.get(name) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    if num_hosts > 1 or (local_size and world_size and int(local_size) < int(world_size)):
        ranks = f"{local_size} of {world_size} ranks are here"
        layout = f"{num_hosts} hosts" if num_hosts > 1 else ranks
        raise ConfigError(
            "servers that 'vllm://launch' starts are reached from the host of rank 0 only, but the "
            f"training runs on several ({layout}). Start them yourself with `vllm serve`, where "
            "every host reaches them, and pass engine='vllm://host:port,...'."
        )
