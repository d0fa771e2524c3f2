"""Addresses of servers, keys and certificates, as users write them: checked before they are used.

An error shows a value without what may be a secret in it.
"""

from __future__ import annotations

import ssl
from urllib.parse import urlsplit

from sdp_lightning.errors import ConfigError


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


def server_url(address: str) -> str:
    """The URL of a server, without a slash at its end.

    Raises:
        ConfigError: unless it is ``http://host:port`` or ``https://host:port``, or has a path too.
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
    if parts.scheme not in ("http", "https") or not hostname or port == 0 or odd:
        raise ConfigError(
            f"{redacted(address)!r} is not the address of a server. Write http://host:port or "
            "https://host:port, with a port from 1 to 65535."
        )
    return url


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
