"""TLS on real sockets: who gets in, who does not, and what the other end is told."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popmesh.authority import CERT_LIFETIME, init_authority, issue
from wire.errors import ConfigError, PeerError
from wire.tls import Credentials, Identity, parse_identity, peer_identity, require_tls

NODE = Identity("demo", "node", "fra", "fra-1", frozenset({"prefill", "decode"}))
ROUTER = Identity("demo", "router", "lhr", "router-lhr")
NAMES = st.text(min_size=1, max_size=20)
ROLES = st.frozensets(st.sampled_from(["prefill", "decode"]))


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    init_authority(tmp_path / "ca")
    return tmp_path / "ca"


def credentials(authority: Path, identity: Identity, **options) -> Credentials:
    return Credentials.load(issue(authority, identity, **options))


def raw_context(folder: Path, protocol: int) -> ssl.SSLContext:
    """A context of files that ``Credentials.load`` would refuse."""
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(folder / "ca.pem")
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


async def meet(server: ssl.SSLContext, client: ssl.SSLContext | None) -> tuple[Identity, Identity]:
    """Connect once; returns who (the client saw, the server saw)."""
    seen: asyncio.Future[Identity] = asyncio.get_running_loop().create_future()

    async def accepted(reader, writer):
        try:
            seen.set_result(peer_identity(writer.get_extra_info("ssl_object")))
            writer.write(b"welcome")
            await writer.drain()
        except PeerError as exc:
            seen.set_exception(exc)
        finally:
            writer.close()

    listener = await asyncio.start_server(accepted, "127.0.0.1", 0, ssl=server)
    port = listener.sockets[0].getsockname()[1]
    try:
        async with asyncio.timeout(10):
            options = {"ssl": client, "server_hostname": ""} if client else {}
            reader, writer = await asyncio.open_connection("127.0.0.1", port, **options)
            try:
                writer.write(b"not a ClientHello" if client is None else b"hello")
                # TLS 1.3: a refused client certificate shows at the first read.
                if await reader.read() != b"welcome":
                    raise ConnectionResetError("not welcome")
                mine = peer_identity(writer.get_extra_info("ssl_object"))
                return mine, await seen
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    finally:
        listener.close()
        if not seen.done():
            seen.cancel()


async def test_both_ends_learn_who_the_other_is(authority):
    node, router = credentials(authority, NODE), credentials(authority, ROUTER)
    assert node.identity == NODE
    assert await meet(node.server_context(), router.client_context()) == (NODE, ROUTER)


async def test_only_tls_1_3_is_spoken(authority):
    node = credentials(authority, NODE)
    old = node.client_context()
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, OSError)):
        await meet(node.server_context(), old)


async def test_a_client_without_a_certificate_is_refused(authority):
    node = credentials(authority, NODE)
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname = False
    bare.load_verify_locations(authority / "ca.pem")
    with pytest.raises((ssl.SSLError, OSError)):
        await meet(node.server_context(), bare)


async def test_a_client_without_tls_is_refused(authority):
    with pytest.raises(ConnectionResetError):
        await meet(credentials(authority, NODE).server_context(), None)


@pytest.mark.parametrize("stranger_is", ["client", "server"])
async def test_another_meshs_authority_is_refused(authority, tmp_path, stranger_is):
    init_authority(tmp_path / "other")
    mine, stranger = credentials(authority, NODE), credentials(tmp_path / "other", ROUTER)
    server, client = (mine, stranger) if stranger_is == "client" else (stranger, mine)
    with pytest.raises((ssl.SSLError, OSError)):
        await meet(server.server_context(), client.client_context())


@pytest.mark.parametrize("expired_is", ["client", "server"])
async def test_an_expired_certificate_is_refused_at_the_handshake(authority, expired_is):
    long_ago = datetime.now(UTC) - CERT_LIFETIME - timedelta(days=1)
    old = issue(authority, ROUTER, now=long_ago)
    mine = credentials(authority, NODE)
    if expired_is == "client":
        server, client = mine.server_context(), raw_context(old, ssl.PROTOCOL_TLS_CLIENT)
    else:
        server, client = raw_context(old, ssl.PROTOCOL_TLS_SERVER), mine.client_context()
    with pytest.raises((ssl.SSLError, OSError)):
        await meet(server, client)
    with pytest.raises(ConfigError, match="expired"):
        Credentials.load(old)


def test_a_connection_without_tls_has_no_identity():
    with pytest.raises(PeerError) as caught:
        peer_identity(None)
    assert caught.value.code == "identity_mismatch"


@given(NAMES, st.sampled_from(["router", "node"]), NAMES, NAMES, ROLES)
def test_an_identity_survives_its_uri(mesh, kind, site, name, roles):
    identity = Identity(mesh, kind, site, name, roles)
    assert parse_identity(identity.uri()) == identity


@given(st.text(max_size=60))
def test_other_uris_are_no_identity(text):
    with pytest.raises(ValueError):  # noqa: PT011 - urlsplit words some of them
        parse_identity(text)


@pytest.mark.parametrize(
    "uri",
    [
        "popmesh://demo/node/fra",
        "popmesh://demo/node/fra/x/y",
        "popmesh://demo/operator/fra/x",
        "popmesh:///node/fra/x",
        "popmesh://demo/node//x",
        "popmesh://demo/node/fra/x?roles=train",
        "https://demo/node/fra/x",
    ],
)
def test_uris_that_look_like_it_are_refused(uri):
    with pytest.raises(ValueError, match="not a popmesh identity"):
        parse_identity(uri)


@pytest.mark.parametrize("name", ["ca.pem", "cert.pem", "key.pem"])
def test_a_missing_file_is_named(authority, name):
    folder = issue(authority, NODE)
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=name) as caught:
        Credentials.load(folder)
    assert "popmesh tls issue" in str(caught.value)


def test_a_key_that_others_may_read_is_refused(authority):
    folder = issue(authority, NODE)
    (folder / "key.pem").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        Credentials.load(folder)


def test_files_that_do_not_belong_together_are_refused(authority, tmp_path):
    init_authority(tmp_path / "other")
    folder, other = issue(authority, NODE), issue(tmp_path / "other", NODE)
    (folder / "key.pem").write_bytes((other / "key.pem").read_bytes())
    with pytest.raises(ConfigError, match="cannot be used"):
        Credentials.load(folder)
    (folder / "ca.pem").write_bytes((other / "ca.pem").read_bytes())
    with pytest.raises(ConfigError, match="not signed"):
        Credentials.load(folder)


@pytest.mark.parametrize("name", ["ca.pem", "cert.pem"])
def test_garbage_is_refused(authority, name):
    folder = issue(authority, NODE)
    (folder / name).write_text("not a certificate")
    with pytest.raises(ConfigError, match="not a popmesh certificate"):
        Credentials.load(folder)


def test_only_loopback_may_listen_without_certificates(authority):
    require_tls("127.0.0.1", None)
    require_tls("0.0.0.0", credentials(authority, NODE))
    with pytest.raises(ConfigError, match="popmesh tls init"):
        require_tls("0.0.0.0", None)
