"""TLS of the door for clients: a certificate of an authority that they trust, none asked of them.

The mesh's own links are another matter (``wire.tls``): there both ends have certificates.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from wire.errors import ConfigError
from wire.tls import check_private


def https_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """For a router's listener: ``certificate`` with the chain above it, and its ``key``, in PEM.

    TLS 1.2 is the oldest: clients are not ours to choose. Raises ``ConfigError`` when a file is
    missing, the key readable by others, or they do not fit together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        check_private(key)
        context.load_cert_chain(certificate, key, password=_no_password)
    except OSError as exc:  # ssl.SSLError is one
        raise ConfigError(
            f"this certificate and its key {key} cannot be used: {exc}", where=str(certificate)
        ) from exc
    return context


def _no_password() -> str:
    """Nobody is asked at a terminal: a service starts alone."""
    raise ConfigError("the key has a password", suggestion="store it without, and chmod 600 it")
