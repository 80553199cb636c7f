"""Clients may come by HTTPS: what they get there, and which certificates a router starts with."""

from __future__ import annotations

import ipaddress
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import router.app
from popmesh.cli import main
from popmesh.client import MeshClient
from router.http.https import https_context
from tests.router.router_mesh import running_mesh
from wire.errors import ConfigError, PeerError

LOOPBACK = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))


def certificate(folder: Path, password: bytes | None = None) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that signs itself, and its key."""
    folder.mkdir(exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "door")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([LOOPBACK]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    locked: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        locked = serialization.BestAvailableEncryption(password)
    pem = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    (folder / "key.pem").write_bytes(key.private_bytes(*pem, locked))
    (folder / "key.pem").chmod(0o600)
    return folder / "cert.pem", folder / "key.pem"


async def test_a_stream_comes_by_https_and_only_by_it(monkeypatch, tmp_path):
    cert, key = certificate(tmp_path)
    trusted = ssl.create_default_context(cafile=cert)
    async with running_mesh(monkeypatch, trusted=trusted, https=https_context(cert, key)) as mesh:
        assert mesh.url.startswith("https://127.0.0.1:")
        response = await mesh.chat(stream=True, max_tokens=3)
        text = await response.text()
        assert response.status == 200
        assert text.endswith("data: [DONE]\n\n")
        with pytest.raises(aiohttp.ClientError):
            async with aiohttp.ClientSession() as plain:
                await plain.get(mesh.url.replace("https", "http") + "/health")
        async with MeshClient(mesh.url) as stranger:
            with pytest.raises(ConfigError, match=r"no trusted router.*self-signed"):
                await stranger.models()
        async with MeshClient(mesh.url.replace("https", "http")) as client:
            with pytest.raises(PeerError, match="broke off"):
                await client.models()
        assert (await mesh.get_json("/ready"))["ready"]


async def test_a_door_in_the_clear_off_loopback_is_warned_of(monkeypatch, caplog):
    async with running_mesh(monkeypatch):
        assert "in the clear" not in caplog.text
    monkeypatch.setattr(router.app, "is_loopback", lambda host: False)
    async with running_mesh(monkeypatch):
        assert "in the clear" in caplog.text


def test_what_no_door_opens_with(tmp_path):
    cert, key = certificate(tmp_path / "one")
    https_context(cert, key)
    _, other = certificate(tmp_path / "two")
    _, locked = certificate(tmp_path / "three", b"secret")
    with pytest.raises(ConfigError, match="cannot be used"):
        https_context(cert, other)
    with pytest.raises(ConfigError, match="cannot be used"):
        https_context(key, key)
    with pytest.raises(ConfigError, match="No such file"):
        https_context(cert, tmp_path / "nowhere.pem")
    with pytest.raises(ConfigError, match="has a password"):
        https_context(cert, locked)
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        https_context(cert, key)


def test_one_without_the_other_is_refused(tmp_path):
    demo = Path(__file__).parents[2] / "topology" / "examples" / "demo.yaml"
    command = ["router", "--topology", str(demo), "--registry", "consul://127.0.0.1:1"]
    done = CliRunner().invoke(main, [*command, "--https-key", str(tmp_path / "key.pem")])
    assert done.exit_code == 2
    assert "go together" in done.stderr
