"""Addresses of servers, keys and certificates, as users write them: checked before they are used.

An error shows a value without what may be a secret in it.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import ssl
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from sdp_lightning.errors import ConfigError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[a-z0-9_]([a-z0-9._-]*[a-z0-9_.])?")
_NUMBERS = re.compile(r"[0-9.]+")  # of an address that is none, or a port without its host


def redacted(address: str) -> str:
    """``address`` without credentials or a query, for errors.

    >>> redacted("vllm://user:secret@host:8000"), redacted("vllm://host:8000?key=secret")
    ('vllm://***@host:8000', 'vllm://host:8000?***')
    """
    scheme, separator, rest = address.partition("://")
    if not separator:
        scheme, rest = "", address
    _, credentials, host = rest.rpartition("@")
    host, query, _ = host.replace("#", "?").partition("?")
    if credentials and ("?" in rest or "#" in rest):
        host = ""  # any part may be of the secret
    shown = f"{scheme}{separator}{'***@' if credentials else ''}{host}{'?***' if query else ''}"
    return "".join(c if c.isprintable() else "?" for c in shown)


def server_urls(scheme: str, rest: str, otherwise: str = "") -> list[str]:
    """URL of each server in ``rest``, which follows ``scheme://`` and separates them by commas.

    Each is ``host``, ``host:port`` or ``host:port/prefix``, or one of these after ``http://`` or
    ``https://``. An error about the whole ends with ``otherwise``.

    >>> server_urls("vllm", "h1:8000, [::1]:8000, https://gateway/team")
    ['http://h1:8000', 'http://[::1]:8000', 'https://gateway/team']

    Raises:
        ConfigError: if one is no address.
    """
    web = "https" if scheme.endswith("s") else "http"
    if "@" in rest:
        server_url(f"{scheme}://{rest}")  # its error does not show them
    hosts = [host for part in rest.split(",") if (host := part.strip(" ").rstrip("/"))]
    if "?" in rest or not hosts or not all(map(_may_be_address, hosts)):
        raise ConfigError(
            f"{redacted(f'{scheme}://{rest}')!r} does not name servers. Write "
            f"'{scheme}://host:port,host:port'{otherwise}."
        )
    if scheme == "vllm" and any(host.partition(":")[0].lower() == "launch" for host in hosts):
        raise ConfigError(
            f"{redacted(f'{scheme}://{rest}')!r}: 'vllm://launch' starts servers, and its settings "
            "follow a '?': 'vllm://launch?replicas=1'."
        )
    if web == "https" and any(host.lower().startswith("http://") for host in hosts):
        raise ConfigError(
            f"{redacted(f'{scheme}://{rest}')!r} says https and http. Write '{scheme[:-1]}://...'."
        )
    return [server_url(host if "://" in host else f"{web}://{host}") for host in hosts]


def _may_be_address(host: str) -> bool:
    """Whether what follows the host's last colon may be a port."""
    netloc = host.rpartition("://")[2].partition("/")[0]
    _, colon, port = netloc.rpartition(":")
    return not colon or netloc.endswith("]") or port.isdigit()


def server_url(address: str) -> str:
    """The URL of a server, without a slash at its end, nor the ``/v1`` that all routes have.

    Raises:
        ConfigError: unless it is ``http://host:port`` or ``https://host:port``, or has a path too,
            or no port, which is then that of the scheme.
    """
    url = address.rstrip("/")
    try:
        parts = urlsplit(url)
        hostname, port = parts.hostname, parts.port
    except ValueError:  # a port that is none, brackets that do not close
        hostname = port = None
        parts = urlsplit("")
    if "@" in address:
        raise ConfigError(
            f"{redacted(address)} has a name and a password in it. Pass the server's key as "
            "api_key, or in SDP_API_KEY: addresses are shown in logs and errors."
        )
    odd = parts.query or parts.fragment or any(not "!" <= c <= "~" for c in url)
    odd = odd or not _is_host(hostname or "") or not set(parts.path).isdisjoint(":;")
    if parts.scheme not in ("http", "https") or port == 0 or odd:
        raise ConfigError(
            f"{redacted(address)!r} is not the address of a server. Write http://host:port or "
            "https://host:port, with a port from 1 to 65535." + _hint(url)
        )
    assert hostname is not None
    if ":" in hostname:
        hostname = f"[{ipaddress.ip_address(hostname).compressed}]"
    prefix = parts.path.rstrip("/")
    if prefix == "/v1" or prefix.endswith("/v1"):
        logger.info("%s: /v1 is left out, as routes begin with it.", url)
        prefix = prefix.removesuffix("/v1").rstrip("/")
    return f"{parts.scheme}://{hostname}{'' if port is None else f':{port}'}{prefix}"


def _is_host(name: str) -> bool:
    """Whether ``name`` may be a name or address of a host that can be reached."""
    try:
        return not ipaddress.ip_address(name).is_unspecified
    except ValueError:
        return bool(_NAME.fullmatch(name)) and not _NUMBERS.fullmatch(name)


def _hint(url: str) -> str:
    netloc, _, path = url.partition("://")[2].partition("/")
    if ";" in url or any(c.isspace() for c in url):
        return " Separate servers by commas."
    if netloc.count(":") > 1 and "[" not in netloc:
        return " An IPv6 address goes into brackets: [::1]:8000."
    if ":" in path:
        return " The port precedes the path: host:8000/path."
    if netloc.startswith(("0.0.0.0", "[::]")):
        return " This is where a server listens, on all of its addresses: name one, as 127.0.0.1."
    return ""


def same_server(url: str) -> tuple[str, int, str]:
    """Host, port and path of ``url``: equal for two ways to write one server."""
    parts = urlsplit(url)
    host = "127.0.0.1" if parts.hostname == "localhost" else str(parts.hostname)
    return host, parts.port or (443 if parts.scheme == "https" else 80), parts.path


def is_far(url: str) -> bool:
    """Whether ``url`` is not of this machine's loopback."""
    host = str(urlsplit(url).hostname)
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def proxy_of(url: str) -> str | None:
    """The proxy that the environment names for ``url``: none for what is in ``NO_PROXY``, or near.

    Raises:
        ConfigError: if it is no http proxy.
    """
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    if not proxy or not is_far(url) or proxy_bypass(str(parts.hostname)):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if not proxy.startswith("http://"):
        raise ConfigError(
            f"{parts.scheme.upper()}_PROXY={redacted(proxy)} is no http:// proxy, the only kind "
            "that is supported."
        )
    return proxy


def check_proxy(urls: list[str]) -> None:
    """Refuse ``use_proxy=True`` if the environment names no proxy for any of ``urls``."""
    if not any(map(proxy_of, urls)):
        raise ConfigError(
            "use_proxy=True has no effect: HTTP_PROXY or HTTPS_PROXY is not set, NO_PROXY excludes "
            "every server, or all are on this machine."
        )


def check_api_key(name: str, key: str) -> None:
    """Refuse a key that no HTTP header can hold; the error does not show it.

    Args:
        name: of the setting or environment variable, for the error.
        key: visible ASCII characters.
    """
    if not isinstance(key, str):
        raise ConfigError(f"{name} must be a text, got {type(key).__name__}.")
    odd = [(place, c) for place, c in enumerate(key) if not "!" <= c <= "~"]
    if odd:
        place, character = odd[0]
        raise ConfigError(
            f"{name} has U+{ord(character):04X} at place {place} of {len(key)}, which no HTTP "
            "header may hold. A key that was read from a file may end in a newline: strip it."
        )


def tls_context(ca_file: str | None, urls: list[str]) -> ssl.SSLContext | None:
    """What believes the certificates of ``ca_file``; None: the system's authorities.

    Raises:
        ConfigError: if the file cannot be read, or no address is ``https``.
    """
    if ca_file is None:
        return None
    if not any(url.startswith("https://") for url in urls):
        raise ConfigError(f"ca_file={ca_file!r} has no effect: no server has an https address.")
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise ConfigError(f"ca_file={ca_file!r} holds no certificates in PEM: {error}") from error
