"""Where servers may run beside the processes that train."""

from __future__ import annotations

from collections.abc import Mapping

from sdp_lightning.errors import ConfigError


def require_one_host(num_hosts: int, environment: Mapping[str, str]) -> None:
    """Refuse servers that rank 0 starts where some ranks could not reach them.

    Args:
        num_hosts: that the Trainer was told of.
        environment: of this process; torchrun says there how many ranks are on its host.

    Raises:
        ConfigError: if the ranks are on more than one host.
    """
    here, all_of_them = (environment.get(name) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    if num_hosts > 1 or (here and all_of_them and int(here) < int(all_of_them)):
        place = f"{num_hosts} hosts" if num_hosts > 1 else f"{here} of {all_of_them} ranks are here"
        raise ConfigError(
            "servers that 'vllm://launch' starts are reached from the host of rank 0 only, but the "
            f"training runs on several ({place}). Start them yourself with `vllm serve`, where "
            "every host reaches them, and pass engine='vllm://host:port,...'."
        )
