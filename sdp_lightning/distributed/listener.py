"""Connections between processes that share a secret, on a network where anybody may connect.

The greeting is plain bytes of fixed length. The listener sends a nonce; who connects answers with
its number, a nonce of its own and an HMAC of all three under the secret; the listener proves itself
the same way. The secret is never sent, and nothing of a stranger is parsed. What follows the
greeting is neither encrypted nor signed here.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import selectors
import socket
import sys
import time
from collections.abc import Callable, Sequence
from logging import getLogger

from sdp_lightning.distributed.messaging import LOOPBACK_HOSTS, authenticate
from sdp_lightning.errors import RankError

logger = getLogger(__name__)

# Connections that have not proved themselves, beside as many as are awaited; one more drops the
# oldest, because a process of the run answers at once.
MAX_CANDIDATES = 64
_BACKLOG = 1024
_GREETING_S = 30.0  # for one candidate's whole greeting
_POLL_S = 2e-2  # between two checks of what may end a wait
_NONCE_BYTES = _SECRET_BYTES = 32
_NUMBER_BYTES = 4
_PROOF_BYTES = 32
_ANSWER_BYTES = _NUMBER_BYTES + _NONCE_BYTES + _PROOF_BYTES


class Listener:
    """Accepts one connection of each process that knows the secret, and closes.

    Candidates are served side by side, each for ``_GREETING_S`` and ``_ANSWER_BYTES`` at most, so
    strangers neither delay the others nor the deadline.

    Args:
        host: address of this host to listen on; empty is all of its addresses.
        needs_port: listen on a port even if ``host`` is this machine's loopback; otherwise Linux
            gets a socket without a port there.

    Raises:
        OSError: if ``host`` is no address of this host.

    Attributes:
        host: as given.
    """

    def __init__(self, host: str, *, needs_port: bool = False) -> None:
        if host in LOOPBACK_HOSTS and sys.platform == "linux" and not needs_port:
            self._server = socket.socket(socket.AF_UNIX)  # 10 % faster, and leaves no file
            self._server.bind(f"\0sdp-{secrets.token_hex(8)}")
            self._server.listen(_BACKLOG)
        else:
            both = not host and socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else family_of(host)
            self._server = socket.create_server(
                (host, 0), family=family, backlog=_BACKLOG, dualstack_ipv6=both
            )
        self._server.setblocking(False)
        self.host = host
        self._secret = secrets.token_bytes(_SECRET_BYTES)

    @property
    def address(self) -> tuple[int | bytes, bytes]:
        """Port, or socket name on this machine, and the secret that both ends must know."""
        name = self._server.getsockname()
        return name if isinstance(name, bytes) else name[1], self._secret

    def accept(self, size: int, timeout_s: float) -> dict[int, socket.socket]:
        """A connection for each rank from 1 to ``size - 1``.

        Raises:
            RankError: naming the ranks that did not connect within ``timeout_s``.
        """
        links, num_strangers = self.collect(size, timeout_s)
        late = [str(rank) for rank in range(1, size) if rank not in links]
        if late:
            for link in links.values():
                link.close()
            raise RankError(
                f"waited {timeout_s:.1f} s for rank {', '.join(late)} to connect to rank 0."
                + (f" {num_strangers} connections were strangers'." if num_strangers else "")
            )
        return links

    def collect(
        self, size: int, timeout_s: float, is_cancelled: Callable[[], bool] = lambda: False
    ) -> tuple[dict[int, socket.socket], int]:
        """Connections by number, up to ``size - 1``, and how many strangers were turned away.

        Numbers are missing if ``timeout_s`` has passed, or ``is_cancelled`` became true.
        """
        deadline = time.monotonic() + timeout_s
        links: dict[int, socket.socket] = {}
        candidates: list[_Candidate] = []  # the oldest first
        num_strangers = 0
        try:
            with self._server, selectors.DefaultSelector() as selector:
                selector.register(self._server, selectors.EVENT_READ)
                while len(links) < size - 1 and not is_cancelled():
                    now = time.monotonic()
                    if now >= deadline:
                        break
                    for key, _ in selector.select(min(_POLL_S, deadline - now)):
                        if key.data is None:
                            candidates += self._welcome(selector)
                        elif (number := key.data.hear(self._secret)) in range(1, size):
                            candidates.remove(key.data)
                            selector.unregister(key.data.link)
                            if number in links:  # it has connected again
                                links[number].close()
                            links[number] = _keep_alive(key.data.link)
                    crowd = max(0, len(candidates) - MAX_CANDIDATES - size)
                    for place, candidate in enumerate(candidates.copy()):
                        if place < crowd or candidate.is_stranger:
                            num_strangers += 1
                            candidates.remove(candidate)
                            selector.unregister(candidate.link)
                            candidate.link.close()
        except BaseException:
            for link in links.values():
                link.close()
            raise
        finally:
            for candidate in candidates:
                candidate.link.close()
        if num_strangers:
            logger.warning(
                "%d connections to a port of this run did not know its secret and were closed: a "
                "port scan, or another program.",
                num_strangers,
            )
        return links, num_strangers

    def close(self) -> None:
        """Stop listening. Safe to call twice."""
        self._server.close()

    def _welcome(self, selector: selectors.BaseSelector) -> list[_Candidate]:
        try:
            link, _ = self._server.accept()
        except (BlockingIOError, ConnectionError):  # it has gone again
            return []
        candidate = _Candidate(link)
        selector.register(link, selectors.EVENT_READ, candidate)
        return [candidate]


class _Candidate:
    """A connection that has not proved that it knows the secret."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self._nonce, self._answer = secrets.token_bytes(_NONCE_BYTES), b""
        self._deadline = time.monotonic() + _GREETING_S
        self._has_failed = False
        link.setblocking(False)
        self._send(self._nonce)

    @property
    def is_stranger(self) -> bool:
        """Whether it is late, has gone, or has answered wrong."""
        return self._has_failed or time.monotonic() > self._deadline

    def hear(self, secret: bytes) -> int:
        """Read what has come; returns the number of a process that has proved itself, else 0."""
        try:
            data = self.link.recv(_ANSWER_BYTES - len(self._answer))
        except BlockingIOError:
            return 0
        except OSError:
            data = b""
        self._answer += data
        self._has_failed = not data
        if len(self._answer) < _ANSWER_BYTES:
            return 0
        number, nonce = self._answer[:_NUMBER_BYTES], self._answer[_NUMBER_BYTES:-_PROOF_BYTES]
        proof = authenticate(secret, b"connects", number, self._nonce, nonce)
        self._has_failed = not hmac.compare_digest(self._answer[-_PROOF_BYTES:], proof)
        if self._has_failed:
            return 0
        self._send(authenticate(secret, b"accepts", number, self._nonce, nonce))
        self._has_failed = True  # unless its number is awaited, which ends its candidacy
        return int.from_bytes(number)

    def _send(self, data: bytes) -> None:
        try:
            self._has_failed |= self.link.send(data) < len(data)
        except OSError:
            self._has_failed = True


def address_of(host: str) -> str:
    """The address of ``host`` as seen from here; empty if there is none."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return ""


def family_of(host: str) -> socket.AddressFamily:
    """The family of the addresses of ``host``, IPv4 if it has both, or none at all."""
    try:
        found = {entry[0] for entry in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)}
    except OSError:
        return socket.AF_INET
    return socket.AF_INET6 if found == {socket.AF_INET6} else socket.AF_INET


def listen_at(seen: Sequence[str]) -> Listener:
    """Listen where the processes of a run reach this one, and nowhere else.

    Args:
        seen: this host's address as each of the processes sees it: the same for all, but that the
            processes of this host may see a loopback address.

    Returns:
        A listener on that one address; on all, with a warning, if there is no such address.
    """
    far = {address for address in seen if not _is_loopback(address)}
    try:
        if len(far) < 2:
            return Listener(far.pop() if far else "127.0.0.1")
    except OSError as error:
        logger.debug("cannot listen on one address: %s", error)
    logger.warning(
        "the ranks see rank 0 at %s, which is not one address of this host: it listens on all of "
        "its addresses. Set MASTER_ADDR to one that all ranks reach.",
        ", ".join(address or "no address" for address in sorted(set(seen))),
    )
    return Listener("")


def _is_loopback(address: str) -> bool:
    return bool(address) and ipaddress.ip_address(address).is_loopback


def connect(
    host: str, address: tuple[int | bytes, bytes], number: int, timeout_s: float
) -> socket.socket:
    """A connection to the :class:`Listener` at ``address``, as its process ``number``.

    Raises:
        OSError: if nobody listens there.
        RankError: if who listens does not prove within ``timeout_s`` that it knows the secret.
    """
    port, secret = address
    where = "this machine" if isinstance(port, bytes) else f"{host}:{port}"
    deadline = time.monotonic() + timeout_s
    link = _open(host, port, deadline)
    try:
        nonces = _receive(link, _NONCE_BYTES, deadline), secrets.token_bytes(_NONCE_BYTES)
        name = number.to_bytes(_NUMBER_BYTES)
        link.sendall(name + nonces[1] + authenticate(secret, b"connects", name, *nonces))
        proof = _receive(link, _PROOF_BYTES, deadline)
    except OSError as error:
        link.close()
        raise RankError(
            f"who listens on {where} has not proved within {timeout_s:.1f} s that it is of this "
            f"run: {error}."
        ) from error
    if not hmac.compare_digest(proof, authenticate(secret, b"accepts", name, *nonces)):
        link.close()
        raise RankError(f"who listens on {where} does not know the secret of this run.")
    return _keep_alive(link)


def _open(host: str, port: int | bytes, deadline: float) -> socket.socket:
    if not isinstance(port, bytes):
        return socket.create_connection((host, port), max(1e-3, deadline - time.monotonic()))
    link = socket.socket(socket.AF_UNIX)
    link.setblocking(False)
    while True:
        try:
            link.connect(port)
            return link
        except BlockingIOError as error:  # strangers fill the queue of those not yet accepted
            if time.monotonic() > deadline:
                link.close()
                raise TimeoutError("the queue of connections is full") from error
            time.sleep(_POLL_S)
        except OSError:
            link.close()
            raise


def _receive(link: socket.socket, count: int, deadline: float) -> bytes:
    data = b""
    while len(data) < count:
        link.settimeout(max(1e-3, deadline - time.monotonic()))
        more = link.recv(count - len(data))
        if not more:
            raise ConnectionError("it closed the connection")
        data += more
    return data


def _keep_alive(link: socket.socket) -> socket.socket:
    """Let the kernel notice when the other machine is gone."""
    link.settimeout(None)
    if link.family not in (socket.AF_INET, socket.AF_INET6):
        return link  # on this machine
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if name in vars(socket):  # Linux; elsewhere the system's hours
            link.setsockopt(socket.IPPROTO_TCP, vars(socket)[name], value)
    return link
