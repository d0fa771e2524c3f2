"""Ranks in the threads of one process, over real connections."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

from sdp_lightning.distributed.rank_group import RankGroup

DEADLINE_S = 60.0


class World:
    """Ranks in threads of this process, with connections between rank 0 and every other."""

    def __init__(self, size: int = 2, **settings: Any) -> None:
        settings = {"timeout_s": DEADLINE_S} | settings
        self.pairs = [[socket.socketpair() for _ in range(1, size)] for _ in range(2)]
        links, lines = (
            [
                {rank: near for rank, (near, _) in enumerate(pairs, 1)},
                *({0: far} for _, far in pairs),
            ]
            for pairs in self.pairs
        )
        self.ranks = [RankGroup(links[r], rank=r, size=size, **settings) for r in range(size)]
        for ranks, line in zip(self.ranks, lines, strict=True):
            ranks.watch(line)

    def run(self, *work: Callable[[RankGroup], Any]) -> list[Any]:
        """What ``work`` returned or raised on each rank; one function is for all of them."""
        results: list[Any] = [None] * len(self.ranks)

        def one(rank: int) -> None:
            try:
                results[rank] = work[rank % len(work)](self.ranks[rank])
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(self.ranks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
        return results

    def close(self) -> None:
        for ranks in self.ranks:
            ranks.close()


Make = Callable[..., World]
