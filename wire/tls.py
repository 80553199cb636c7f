"""Who is at the other end: TLS 1.3 with certificates of the mesh's own authority on both ends.

A certificate's URI name says what a process is:
``popmesh://MESH/KIND/SITE/NAME?roles=prefill,decode``. Host names play no part, so that a node may
move; whoever accepts a peer compares the identity with the topology. ``popmesh.authority`` makes
the files; this module only reads them.
"""

from __future__ import annotations

import ssl
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, cast
from urllib.parse import parse_qs, quote, unquote, urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from wire.address import is_loopback
from wire.errors import ConfigError, PeerError
from wire.messages import Role

SCHEME = "popmesh"
FILES = ("ca.pem", "cert.pem", "key.pem")
_ISSUE = "make one with 'popmesh tls issue DIR NAME --topology FILE'"

Kind = Literal["router", "node"]


@dataclass(frozen=True, slots=True)
class Identity:
    """What a certificate says its holder is. ``roles`` are empty for a router."""

    mesh: str
    kind: Kind
    site: str
    name: str
    roles: frozenset[Role] = frozenset()

    def uri(self) -> str:
        """The URI name that carries this identity."""
        mesh, site, name = (quote(part, safe="") for part in (self.mesh, self.site, self.name))
        query = f"?roles={','.join(sorted(self.roles))}" if self.roles else ""
        return f"{SCHEME}://{mesh}/{self.kind}/{site}/{name}{query}"


def parse_identity(uri: str) -> Identity:
    """The reverse of ``Identity.uri``; raises ``ValueError`` on anything else."""
    parts = urlsplit(uri)
    path = parts.path.split("/")
    if parts.scheme != SCHEME or not parts.netloc or len(path) != 4 or parts.fragment:
        raise ValueError(f"{uri!r} is not a popmesh identity")
    _, kind, site, name = path
    roles = frozenset(
        role for value in parse_qs(parts.query).get("roles", []) for role in value.split(",")
    )
    if kind not in ("router", "node") or not site or not name or roles - {"prefill", "decode"}:
        raise ValueError(f"{uri!r} is not a popmesh identity")
    return Identity(
        unquote(parts.netloc),
        cast(Kind, kind),
        unquote(site),
        unquote(name),
        cast("frozenset[Role]", roles),
    )


@dataclass(frozen=True, slots=True)
class Credentials:
    """A process's certificate, its key and the authority it trusts, as files in one directory."""

    directory: Path
    identity: Identity

    @classmethod
    def load(cls, directory: Path) -> Credentials:
        """Read and check ``ca.pem``, ``cert.pem`` and ``key.pem``.

        Raises ``ConfigError`` when a file is missing, readable by others (the key), expired, not
        signed by the authority, not matching the key, or without an identity.
        """
        for name in FILES:
            if not (directory / name).is_file():
                raise ConfigError(
                    f"no {name}", where=str(directory), suggestion=f"{_ISSUE}, and name DIR/NAME"
                )
        check_private(directory / "key.pem")
        credentials = cls(directory, _own_identity(directory))
        credentials.server_context()  # the key fits the certificate
        return credentials

    def client_context(self) -> ssl.SSLContext:
        """For connections we open; raises ``ConfigError`` when the files do not fit together."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def server_context(self) -> ssl.SSLContext:
        """For listeners: refuses peers without a certificate of the mesh's authority."""
        return self._context(ssl.PROTOCOL_TLS_SERVER)

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # identity is the URI name, see the module
        context.verify_mode = ssl.CERT_REQUIRED
        ca, cert, key = (self.directory / name for name in FILES)
        try:
            context.load_verify_locations(ca)
            context.load_cert_chain(cert, key)
        except (ssl.SSLError, OSError) as exc:
            raise ConfigError(
                f"these certificates cannot be used: {exc}",
                where=str(self.directory),
                suggestion=_ISSUE,
            ) from exc
        return context


def check_private(key: Path) -> None:
    """Raises ``ConfigError`` when others than its owner may read the ``key``."""
    if stat.S_IMODE(key.stat().st_mode) & 0o077:
        raise ConfigError(
            "other users may read this key", where=str(key), suggestion="chmod 600 it"
        )


def peer_identity(peer: ssl.SSLObject | ssl.SSLSocket | None) -> Identity:
    """Who the verified certificate of a finished handshake says the peer is.

    ``peer`` None is a connection without TLS. Raises ``PeerError`` (``identity_mismatch``) when
    there is no certificate or it names no single popmesh identity.
    """
    certificate = (peer.getpeercert() if peer is not None else None) or {}
    names = cast("tuple[tuple[str, str], ...]", certificate.get("subjectAltName", ()))
    uris = [value for kind, value in names if kind == "URI"]
    try:
        (uri,) = uris
        return parse_identity(uri)
    except ValueError as exc:
        raise PeerError(
            f"the peer's certificate carries no popmesh identity: {uris}",
            code="identity_mismatch",
            retryable=False,
        ) from exc


def require_tls(host: str, credentials: Credentials | None) -> None:
    """Refuse a listener off loopback without credentials: raises ``ConfigError``."""
    if credentials is None and not is_loopback(host):
        raise ConfigError(
            f"listening on {host} needs certificates: only loopback may go without",
            suggestion="pass --tls DIR; 'popmesh tls init' and 'popmesh tls issue' make one",
        )


def _own_identity(directory: Path) -> Identity:
    where = str(directory / "cert.pem")
    try:
        ca = x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes())
        cert = x509.load_pem_x509_certificate((directory / "cert.pem").read_bytes())
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        identity = parse_identity(uri)
    except (ValueError, x509.ExtensionNotFound) as exc:
        raise ConfigError(
            f"not a popmesh certificate: {exc}", where=where, suggestion=_ISSUE
        ) from exc
    try:
        cert.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature) as exc:
        raise ConfigError(
            "not signed by the ca.pem beside it", where=where, suggestion=_ISSUE
        ) from exc
    if cert.not_valid_after_utc <= datetime.now(UTC):
        raise ConfigError(
            f"expired on {cert.not_valid_after_utc:%Y-%m-%d}", where=where, suggestion=_ISSUE
        )
    return identity
