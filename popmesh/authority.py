"""A mesh's own certificate authority: ``popmesh tls init`` and ``popmesh tls issue``.

Owns how certificates are made; ``wire.tls`` reads them. The authority's key stays in the operator's
directory; every process gets its own certificate with its identity in the URI name.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from popmesh import cache_key
from topology.model import Topology
from wire.errors import ConfigError
from wire.tls import FILES, Identity

CA_KEY = "ca-key.pem"
CA_LIFETIME = timedelta(days=3653)
"""Ten years: replacing an authority means touching every machine."""

CERT_LIFETIME = timedelta(days=398)
"""A year and a month, the longest public authorities may issue for: renewed once a year."""

BACKDATE = timedelta(minutes=5)
"""Certificates are valid a little before now, for machines whose clock is slow. Guess."""

_USAGE = {
    "content_commitment": False,
    "key_encipherment": False,
    "data_encipherment": False,
    "key_agreement": False,
    "encipher_only": False,
    "decipher_only": False,
}


def init_authority(directory: Path, now: datetime | None = None) -> Path:
    """Make ``ca.pem``, its key and the mesh's cache key (mode 0600) in ``directory``.

    Returns the certificate's path.
    Raises ``ConfigError`` when there is an authority already.
    """
    now = now or datetime.now(UTC)
    if (directory / CA_KEY).exists() or (directory / "ca.pem").exists():
        raise ConfigError(
            "there is an authority here already",
            where=str(directory),
            suggestion="a new one would make every issued certificate useless; use another DIR",
        )
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "popmesh authority")])
    certificate = (
        _builder(name, name, key.public_key(), now, CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=False, key_cert_sign=True, crl_sign=True, **_USAGE),
            critical=True,
        )
        .sign(key, hashes.SHA256())
    )
    directory.mkdir(parents=True, exist_ok=True)
    _write_key(directory / CA_KEY, key)
    cache_key.make_cache_key(directory / cache_key.FILE)
    path = directory / "ca.pem"
    path.write_bytes(_pem(certificate))
    return path


def identity_of(topology: Topology, name: str) -> Identity:
    """The identity of a node or router of the topology; raises ``ConfigError`` if there is none."""
    if node := topology.nodes.get(name):
        return Identity(topology.mesh, "node", node.site, name, node.roles)
    if router := topology.routers.get(name):
        return Identity(topology.mesh, "router", router.site, name)
    known = ", ".join([*topology.nodes, *topology.routers])
    raise ConfigError(
        f"no node or router is called {name!r}",
        where=topology.source or None,
        suggestion=f"one of {known}",
    )


def issue(directory: Path, identity: Identity, now: datetime | None = None) -> Path:
    """Write ``directory/NAME/{ca,cert,key}.pem``, and the cache key for a router; returns that
    folder. An old one is replaced.

    Raises ``ConfigError`` when ``directory`` holds no authority.
    """
    now = now or datetime.now(UTC)
    try:
        ca_pem = (directory / "ca.pem").read_bytes()
        ca = x509.load_pem_x509_certificate(ca_pem)
        ca_key = serialization.load_pem_private_key((directory / CA_KEY).read_bytes(), None)
    except (OSError, ValueError) as exc:
        raise ConfigError(
            f"no authority here: {exc}",
            where=str(directory),
            suggestion=f"make one with 'popmesh tls init {directory}'",
        ) from exc
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey):
        raise ConfigError("the authority's key is not an EC key", where=str(directory / CA_KEY))
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.name[:64])])
    certificate = (
        _builder(subject, ca.subject, key.public_key(), now, CERT_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=True, key_cert_sign=False, crl_sign=False, **_USAGE),
            critical=True,
        )
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
            critical=False,
        )
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri())]),
            critical=False,
        )
        .sign(ca_key, hashes.SHA256())
    )
    folder = directory / identity.name
    folder.mkdir(exist_ok=True)
    ca_name, cert_name, key_name = FILES
    _write_key(folder / key_name, key)
    (folder / cert_name).write_bytes(_pem(certificate))
    (folder / ca_name).write_bytes(ca_pem)
    if identity.kind == "router":
        if not (directory / cache_key.FILE).exists():  # of an authority from an earlier release
            cache_key.make_cache_key(directory / cache_key.FILE)
        key_of_all = cache_key.load_cache_key(directory / cache_key.FILE)
        cache_key.write_cache_key(folder / cache_key.FILE, key_of_all)
    return folder


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    now: datetime,
    lifetime: timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    data = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.unlink(missing_ok=True)  # an old file's mode and links would otherwise survive
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
