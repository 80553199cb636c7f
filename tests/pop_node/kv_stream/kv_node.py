"""A KV endpoint with a fake engine: a numpy cache, staged and imported piece by piece."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
from collections import deque
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pop_node.kv_stream.endpoint import KvEndpoint
from pop_node.kv_stream.prompt import prompt_digest
from pop_node.kv_stream.spec import KvComponent, KvGroup, KvSpec, Piece
from pop_node.kv_stream.staging import Staging, StagingLayout
from wire.address import Dialer, format_address
from wire.errors import MeshError, PeerError
from wire.messages import TransferReport

LAYERS, HEADS, DIM = 4, 3, 16


def spec_of(dtype: str) -> KvSpec:
    """K and V of values of this type."""
    components = tuple(KvComponent(name, dtype, (HEADS, DIM), 0) for name in ("k", "v"))
    return KvSpec((KvGroup("tokens", tuple(range(LAYERS)), components),))


SPEC = spec_of("float32")
CHUNK = 32
Run = Callable[[Coroutine[Any, Any, None]], None]
LAYOUT = StagingLayout(slot_bytes=CHUNK * HEADS * DIM * 4, export_slots=6, import_slots=8)


def cache_of(prompt_tokens: int, seed: int) -> np.ndarray:
    """[component, layer, token, head, dim] float32."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, LAYERS, prompt_tokens, HEADS, DIM), dtype=np.float32)


class Node:
    """Agent and engine of one node, as the KV stream sees them."""

    def __init__(
        self,
        name: str,
        server_ssl: ssl.SSLContext | None = None,
        client_ssl: ssl.SSLContext | None = None,
        mesh: str = "test",
        incarnation: str = "",
        dtype: str = "float32",
    ) -> None:
        self.name = name
        self.dtype = dtype
        self.spec = spec_of(dtype)
        self.staging = Staging.create(LAYOUT)
        self.seen: list[str] = []
        self.endpoint = KvEndpoint(
            name,
            "AMS",
            mesh,
            incarnation or f"{name}-1",
            self.staging,
            Dialer(),
            server_ssl,
            client_ssl,
            self.authorize,
            self,
        )
        self.caches: dict[bytes, np.ndarray] = {}
        self.free = deque(range(LAYOUT.export_slots))
        self.to_stage: deque[tuple[bytes, Piece]] = deque()
        self.staged_slots: set[int] = set()
        self.ends: dict[bytes, asyncio.Future] = {}
        self.kept: dict[bytes, int] = {}
        self.resumes: dict[bytes, int] = {}
        self.imports: list[tuple[bytes, int]] = []
        self.imports_held = False
        self.first_import = asyncio.Event()
        self.broken = 0
        self.address = ""

    async def __aenter__(self) -> Node:
        self.address = format_address(*await self.endpoint.start("127.0.0.1", 0))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.endpoint.close()
        self.staging.close()

    def authorize(self, peer: str, ssl_object: ssl.SSLObject | None) -> None:
        self.seen.append(peer)
        if ssl_object is None:
            return
        subject = dict(pair[0] for pair in ssl_object.getpeercert()["subject"])
        if subject["commonName"] != peer:
            raise PeerError(f"{peer} shows the certificate of another", code="identity_mismatch")

    # ---- legs ----

    def send(self, transfer: bytes, to: Node, cache: np.ndarray, identity: str = "ident") -> None:
        self.caches[transfer] = cache
        self.ends[transfer] = asyncio.get_running_loop().create_future()
        tokens = cache.shape[2]
        digest = prompt_digest(range(tokens))
        self.endpoint.open(
            transfer, 1, to.name, to.address, "m", identity, self.spec, tokens, digest, 20.0
        )
        self.endpoint.compute_started(transfer)
        self.endpoint.compute_ended(transfer)
        self.endpoint.commit(transfer, [42])

    def receive(self, transfer: bytes, sender: str, tokens: int, have: np.ndarray | None) -> None:
        cache = self.caches[transfer] = np.full(
            (2, LAYERS, tokens, HEADS, DIM), np.nan, dtype=self.dtype
        )
        self.ends[transfer] = asyncio.get_running_loop().create_future()
        digest = prompt_digest(range(tokens))
        self.endpoint.expect(transfer, 1, sender, "m", "ident", self.spec, tokens, digest, 20.0)
        have_tokens = 0 if have is None else have.shape[2]
        if have is not None:
            cache[:, :, :have_tokens] = have
        self.endpoint.allocated(transfer, have_tokens)

    # ---- engine ----

    def stage(self) -> None:
        while self.free and self.to_stage:
            transfer, piece = self.to_stage.popleft()
            slot = self.free.popleft()
            box = self.caches[transfer][
                piece.component,
                piece.layer_lo : piece.layer_hi,
                piece.token_lo : piece.token_hi,
            ]
            raw = np.ascontiguousarray(box).tobytes()
            self.staging.slot(slot)[: len(raw)] = raw
            self.staged_slots.add(slot)
            self.endpoint.staged(transfer, slot, piece, len(raw), self.resumes[transfer])

    def import_held(self) -> None:
        while self.imports:
            self.endpoint.imported(*self.imports.pop())

    # ---- KvEvents ----

    def on_stage_from(
        self, transfer: bytes, have_tokens: int, arrived: list[int], resume: int
    ) -> None:
        tokens = self.caches[transfer].shape[2]
        self.resumes[transfer] = resume
        self.to_stage = deque(item for item in self.to_stage if item[0] != transfer)
        starts = arrived or [have_tokens] * SPEC.places
        pieces = [
            Piece(
                0, place // LAYERS, place % LAYERS, place % LAYERS + 1, lo, min(lo + CHUNK, tokens)
            )
            for place, start in enumerate(starts)
            for lo in range(start, tokens, CHUNK)
        ]
        pieces.sort(key=lambda piece: (piece.token_lo, piece.layer_lo, piece.component))
        self.to_stage += [(transfer, piece) for piece in pieces]
        self.stage()

    def on_slot_free(self, slot: int) -> None:
        self.staged_slots.remove(slot)
        self.free.append(slot)
        self.stage()

    def on_import(self, transfer: bytes, slot: int, piece: Piece) -> None:
        self.first_import.set()
        if transfer in self.caches:
            layers, tokens = piece.layer_hi - piece.layer_lo, piece.token_hi - piece.token_lo
            raw = bytes(self.staging.slot(slot)[: piece.nbytes(self.spec)])
            self.caches[transfer][
                piece.component,
                piece.layer_lo : piece.layer_hi,
                piece.token_lo : piece.token_hi,
            ] = np.frombuffer(raw, dtype=self.dtype).reshape(layers, tokens, HEADS, DIM)
        self.imports.append((transfer, slot))
        if not self.imports_held:
            self.import_held()

    def on_committed(self, transfer: bytes, ids: list[int]) -> None:
        self.ends[transfer].set_result(ids)

    def on_done(self, transfer: bytes, report: TransferReport) -> None:
        self.ends[transfer].set_result(report)

    def on_failed(self, transfer: bytes, error: MeshError, kept_tokens: int) -> None:
        self.kept[transfer] = kept_tokens
        self.to_stage = deque(item for item in self.to_stage if item[0] != transfer)
        self.ends[transfer].set_result(error)

    def on_broken(self) -> None:
        self.broken += 1


def assert_at_rest(*nodes: Node) -> None:
    """No transfer is left, and every slot is where it was."""
    for node in nodes:
        s = node.endpoint.statistics()
        assert (s.outgoing_now, s.incoming_now, s.parked_now) == (0, 0, 0)
        assert s.export_slots_held_now == 0
        assert s.import_slots_free_now == LAYOUT.import_slots
        assert sorted(node.free) == list(range(LAYOUT.export_slots))


async def hand_over(p: Node, d: Node, transfer: bytes, tokens: int, have: int = 0) -> None:
    """One whole transfer, of which ``have`` tokens need not be sent; compares every byte."""
    cache = cache_of(tokens, tokens)
    p.send(transfer, d, cache)
    d.receive(transfer, p.name, tokens, cache[:, :, :have] if have else None)
    assert await d.ends[transfer] == [42]
    report = await p.ends[transfer]
    assert isinstance(report, TransferReport)
    assert report.kv_bytes == (tokens - have) * SPEC.token_bytes
    assert report.wire_bytes >= report.kv_bytes
    np.testing.assert_array_equal(
        d.caches[transfer].view(np.uint32), cache.view(np.uint32), strict=True
    )


class Authority:
    """A throw-away certificate authority."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.cert = self._sign("test authority", self.key.public_key(), is_ca=True)
        self.path = folder / f"ca-{id(self)}.pem"
        self.path.write_bytes(self.cert.public_bytes(serialization.Encoding.PEM))

    def contexts(self, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        """(server, client) contexts for a node, both with its certificate; TLS 1.3, mutual."""
        key = ec.generate_private_key(ec.SECP256R1())
        cert = self._sign(name, key.public_key(), is_ca=False)
        path = self.pem(name)
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + cert.public_bytes(serialization.Encoding.PEM)
        )
        found = []
        for protocol in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
            context = ssl.SSLContext(protocol)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.load_cert_chain(path)
            context.load_verify_locations(self.path)
            context.verify_mode = ssl.CERT_REQUIRED
            found.append(context)
        return found[0], found[1]

    def pem(self, name: str) -> Path:
        """Key and certificate of ``name``, once ``contexts`` made them."""
        return self.folder / f"{name}-{id(self)}.pem"

    def _sign(self, name: str, public_key: object, *, is_ca: bool) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer = subject if is_ca else self.cert.subject
        start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
        names = [x509.DNSName(name), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + datetime.timedelta(days=36500))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self.key, hashes.SHA256())
        )
