"""The digest by which two nodes agree that they speak of the same prompt."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence

DIGEST_BYTES = 16
_ID_TYPE = "I" if array("I").itemsize == 4 else "L"


def prompt_digest(ids: Sequence[int]) -> bytes:
    """BLAKE2b-128 of the token ids as unsigned 32-bit little-endian integers; 16 bytes.

    Raises ``OverflowError`` for an id outside 0..2**32-1.
    """
    packed = array(_ID_TYPE, ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return hashlib.blake2b(packed.tobytes(), digest_size=DIGEST_BYTES).digest()
