"""What a stranger does who tries every port of a process."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

WORDS = (b"", b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 4096, bytes(4096))
_LISTENS = "0A"  # state in /proc/net/tcp


def listening_ports() -> list[int]:
    """TCP ports on which this process listens."""
    links: set[str] = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of the listing
            links.add(os.readlink(f"/proc/self/fd/{name}"))
    ports: set[int] = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENS and f"socket:[{fields[9]}]" in links:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return sorted(ports)


def scan(ports: list[int]) -> list[socket.socket]:
    """Say each of ``WORDS`` to every port; the connections, which stay open until they go."""
    kept: list[socket.socket] = []
    for port in ports:
        for words in WORDS:
            with suppress(OSError):  # refused: as good
                kept.append(socket.create_connection(("127.0.0.1", port), timeout=10.0))
                kept[-1].sendall(words)
    return kept
