"""Ports that processes listen on, as the kernel says."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

TLS_HELLO = bytes.fromhex("16030100a5010000a10303") + bytes(range(200))
_LISTENS = "0A"


def listening(*pids: int) -> set[tuple[str, int]]:
    """Address and port of every TCP socket on which ``pids`` listen, or else this process."""
    inodes = {inode for pid in pids or [os.getpid()] for inode in _sockets_of(pid)}
    found: set[tuple[str, int]] = set()
    for table in ("tcp", "tcp6"):
        with suppress(FileNotFoundError):  # no IPv6 here
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                _, local, _, state, *rest = line.split()
                if state == _LISTENS and rest[5] in inodes:
                    address, _, port = local.rpartition(":")
                    found.add((_address(address), int(port, 16)))
    return found


def siblings() -> list[int]:
    """This process and all others that its parent has started."""
    parent, found = str(os.getppid()), list[int]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            if path.read_text().rpartition(")")[2].split()[1] == parent:
                found.append(int(path.parent.name))
    return found


def scan(places: Iterable[tuple[str, int]]) -> list[socket.socket]:
    """Do what port scanners do at every place; returns connections that say nothing more."""
    silent: list[socket.socket] = []
    for address, port in places:
        for words in (b"", b"GET / HTTP/1.0\r\n\r\n", TLS_HELLO, b"\xff" * 64, bytes(4096), b"x"):
            with suppress(OSError):  # it was closed in the middle
                link = socket.create_connection((address, port), 30.0)
                silent.append(link)
                link.sendall(words)
        silent.pop().close()
    return silent


def _sockets_of(pid: int) -> Iterable[str]:
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            name = os.readlink(link)
            if name.startswith("socket:["):
                yield name[8:-1]


def _address(words: str) -> str:
    """An address of /proc/net: words of 32 bits in the machine's order of bytes."""
    data = b"".join(
        int(words[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(words), 8)
    )
    return str(ipaddress.ip_address(data))
