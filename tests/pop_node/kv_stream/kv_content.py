"""What the transfers of a ``Pair`` carry: memory whose content is a function of (group, component,
layer, token), the pieces that cover it, and frames that were damaged on their way."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from pop_node.kv_stream import events as ev
from pop_node.kv_stream.coverage import required_tokens
from pop_node.kv_stream.frames import CODEC_PACKED, CODEC_RAW, Commit
from pop_node.kv_stream.prompt import prompt_digest
from pop_node.kv_stream.spec import KvComponent, KvGroup, KvSpec, Piece

SPEC = KvSpec(
    (
        KvGroup(
            "tokens",
            (0, 2),
            (KvComponent("k", "float32", (2,)), KvComponent("v", "bfloat16", (1, 2))),
        ),
        KvGroup("window", (1,), (KvComponent("latent", "float16", (3,)),), window=3),
    )
)
CHUNK = 4  # tokens per piece
DEADLINE_S = 60.0


def token_bytes(seed: bytes, group: int, component: int, layer: int, token: int) -> bytes:
    """What a correct cache holds at one place."""
    size = SPEC.groups[group].components[component].token_bytes
    place = f"{group}.{component}.{layer}.{token}".encode()
    return hashlib.blake2b(place, key=seed, digest_size=size).digest()


def piece_bytes(seed: bytes, p: Piece) -> bytes:
    """Payload of a piece: [layer, token]."""
    return b"".join(
        token_bytes(seed, p.group, p.component, layer, token)
        for layer in range(p.layer_lo, p.layer_hi)
        for token in range(p.token_lo, p.token_hi)
    )


def pieces_after(arrived: tuple[int, ...], total: int) -> list[Piece]:
    """What is missing when so many tokens of each place have arrived."""
    places = [
        (g, c, layer)
        for g, group in enumerate(SPEC.groups)
        for c in range(len(group.components))
        for layer in range(len(group.layers))
    ]
    found = [
        Piece(g, c, layer, layer + 1, lo, min(lo + CHUNK, total))
        for (g, c, layer), start in zip(places, arrived, strict=True)
        for lo in range(start, total, CHUNK)
    ]
    return sorted(found, key=lambda piece: piece.token_lo)


def pieces_from(have: int, total: int) -> list[Piece]:
    """All pieces of a prompt in chunks, both layers of group 0 at once."""
    found = []
    for lo in range(have, total, CHUNK):
        for g, group in enumerate(SPEC.groups):
            hi, layers = min(lo + CHUNK, total), len(group.layers)
            found += [Piece(g, c, 0, layers, lo, hi) for c in range(len(group.components))]
    return found


def scatter(cells: dict, p: Piece, payload: bytes) -> None:
    """Put a piece where it belongs."""
    size = SPEC.groups[p.group].components[p.component].token_bytes
    at = 0
    for layer in range(p.layer_lo, p.layer_hi):
        for token in range(p.token_lo, p.token_hi):
            cells[p.group, p.component, layer, token] = payload[at : at + size]
            at += size


def check_cells(cells: dict, total: int) -> None:
    """All that so many tokens need is there and bit-equal."""
    for g, group in enumerate(SPEC.groups):
        lo, hi = required_tokens(group, 0, total)
        for c in range(len(group.components)):
            for layer in range(len(group.layers)):
                for token in range(lo, hi):
                    assert cells[g, c, layer, token] == token_bytes(b"kv", g, c, layer, token)


@dataclass
class Plan:
    """One transfer as the test wants it."""

    transfer: bytes
    prompt_tokens: int = 9
    have_tokens: int = 0
    ids: tuple[int, ...] = (5,)
    attempt: int = 1
    deadline: float = DEADLINE_S
    packs: bool = False

    @property
    def codecs(self) -> tuple[str, ...]:
        """What both nodes offer."""
        return (CODEC_PACKED, CODEC_RAW) if self.packs else (CODEC_RAW,)

    @property
    def digest(self) -> bytes:
        return prompt_digest(range(self.prompt_tokens))

    @property
    def total(self) -> int:
        return self.prompt_tokens + len(self.ids) - 1

    def opened(self, link: str) -> ev.Opened:
        """What the prefill node is told."""
        head = (self.transfer, self.attempt, "d", link, "m", "ident", SPEC)
        return ev.Opened(*head, self.prompt_tokens, self.digest, self.deadline, self.codecs)

    def expected(self) -> ev.Expected:
        """What the decode node is told."""
        head = (self.transfer, self.attempt, "p", "m", "ident", SPEC)
        tail = (self.prompt_tokens, self.digest, self.deadline)
        return ev.Expected(*head, *tail, max_ids=len(self.ids), codecs=self.codecs)


def altered(frame: tuple, how: int) -> tuple:
    """A frame with one thing changed."""
    message, payload = frame
    if payload:
        if how % 2:
            flipped = bytearray(payload)
            flipped[how % len(payload)] ^= 1 << how % 8
            return message, bytes(flipped)
        changes = [{"token_lo": 0, "token_hi": message.token_hi - message.token_lo}]
        changes += [{"component": 1 - min(message.component, 1)}, {"group": 9}, {"codec": "zip"}]
        return _with(message, changes[how // 2 % 4]), payload
    if isinstance(message, Commit):
        return _with(message, {"prompt_digest": bytes(16)}), payload
    return _with(message, {"attempt": message.attempt + how % 3 - 1 & 0xFF}), payload


def _with(message, changes: dict):
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    return type(message)(**(fields | changes))
