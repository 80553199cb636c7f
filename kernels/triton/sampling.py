"""Gumbel-max sampling with counter-based noise; every term is defined in
``kernels.reference.sampling``.

Four kernels, without a word to the host between them: the largest logit of each block of the
vocabulary, NaN or infinity found on the way; one program per row that finds the limits of top-k;
noise and scores of each block, with its best token and its part of the softmax's mass; and one
program per row that picks the winner.

Top-k and min-p are limits of z: a token below has no score, and all tokens before one that is above
are above as well. The k-th largest z is found bit by bit: z is at most 0, so the bits of -z are a
number that grows as z falls, and 31 times the tokens up to a number are counted.

The nucleus is found without sorting: the best token overall is the answer if it lies inside.
Otherwise it and all that rank behind it are out, and the search goes on among those before it. A
try fails with a probability of at most 1 - top_p, and what remains is at least halved every other
time, so tries are few.

Logarithms are computed in float64 and rounded once, like the reference's, so noise has the same
bits everywhere. z is float32 with a division that rounds to nearest.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

Roofline: 4 V bytes per row read twice, 4 V written and read again where there is a nucleus, read 31
times more (from the cache) where there is a top-k; about 30 integer and 40 float64 operations per
token of the vocabulary. Not measured on a device yet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from kernels.reference.sampling import min_p_limit
from kernels.triton.launch import Launch, ceil_div, power_of_2, require

BLOCK = 1024
"""Tokens of one program: 125 programs for one row of 128,000. Guess."""

DRAW_BLOCK = 2048
"""Tokens per step of the program that walks over a row's nucleus. Guess."""

LN_2 = tl.constexpr(0.6931471805599453)
SQRT_HALF_BITS = tl.constexpr(0x3FE6A09E667F3BCD)
"""The square root of 1/2 as the bits of a float64."""

PARAMETERS = 7
"""Words of 64 bits per row: temperature, top_p (both as bits of a float64), seed, choice, index,
top_k (0: all), the smallest z that min_p allows (bits of a float64)."""

INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def log_of_normal(x):
    """Natural logarithm of positive normal float64 numbers, to about an ulp.

    x = 2^n m with m in [sqrt(1/2), sqrt(2)), and log m = 2 artanh s with s = (m - 1) / (m + 1), by
    its series up to s^23: s^2 is below 0.0295, so the next term is below 1e-19.
    """
    bits = x.to(tl.int64, bitcast=True)
    n = (bits - SQRT_HALF_BITS) >> 52
    m = (bits - (n << 52)).to(tl.float64, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    square = s * s
    series = tl.full(x.shape, 1.0 / 23.0, tl.float64)
    for term in tl.static_range(11):
        series = series * square + 1.0 / (21.0 - 2.0 * term)
    return n.to(tl.float64) * LN_2 + 2.0 * s * series


@triton.jit
def gumbel_noise(block, seed, choice, index, BLOCK: tl.constexpr):
    """Noise of the tokens [block BLOCK, (block + 1) BLOCK): [BLOCK] float32."""
    counter = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    zero = counter * 0
    c0, c1, c2, c3 = tl.philox(seed, counter, zero + index, zero + choice, zero)
    word = tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))  # in order of token ids
    v = (word.to(tl.uint32, bitcast=True).to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    v = tl.minimum(v, 0.999999940395355224609375)  # 1 - 2^-24
    e = -log_of_normal(1.0 - v.to(tl.float64))
    return (-log_of_normal(e)).to(tl.float32)


@triton.jit
def row_settings(parameters_ptr, row):
    """(temperature float32, top_p float64, seed int64, choice int32, index int32) of a row."""
    at = parameters_ptr + row * 7
    temperature = tl.load(at).to(tl.float64, bitcast=True).to(tl.float32)
    top_p = tl.load(at + 1).to(tl.float64, bitcast=True)
    return (
        temperature,
        top_p,
        tl.load(at + 2),
        tl.load(at + 3).to(tl.int32),
        tl.load(at + 4).to(tl.int32),
    )


@triton.jit
def peaks_kernel(logits_ptr, peaks_ptr, vocab, blocks, BLOCK: tl.constexpr):
    """The largest logit of each block; infinity where there is a NaN."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * vocab + token, mask=token < vocab, other=float("-inf"))
    unsound = tl.max((x != x).to(tl.int32), axis=0)
    peak = tl.max(tl.where(x != x, float("-inf"), x), axis=0)
    tl.store(peaks_ptr + row * blocks + block, tl.where(unsound > 0, float("inf"), peak))


@triton.jit
def limits_kernel(
    logits_ptr, parameters_ptr, peaks_ptr, limits_ptr,
    vocab, blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """(k-th largest z, smallest z that may be drawn) of one row; -inf: no limit."""
    row = tl.program_id(0).to(tl.int64)
    temperature, _top_p, _seed, _choice, _index = row_settings(parameters_ptr, row)
    top_k = tl.load(parameters_ptr + row * 7 + 5)
    least = tl.load(parameters_ptr + row * 7 + 6).to(tl.float64, bitcast=True).to(tl.float32)
    number = tl.arange(0, BLOCKS)
    peaks = tl.load(peaks_ptr + row * blocks + number, mask=number < blocks, other=float("-inf"))
    peak = tl.max(peaks, axis=0)
    kth = tl.full((), float("-inf"), tl.float32)
    sound = (peak > float("-inf")) & (peak < float("inf"))
    if sound & (temperature > 0.0) & (top_k > 0) & (top_k < vocab):
        lane = tl.arange(0, BLOCK)
        # The smallest number that at least k tokens do not exceed; infinity is one.
        found = tl.full((), INFINITY_BITS, tl.int32)
        for bit in range(31):
            tried = found - (1 << (30 - bit))
            count = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, vocab, BLOCK):
                held = start + lane < vocab
                at = logits_ptr + row * vocab + start + lane
                x = tl.load(at, mask=held, other=float("-inf"))  # [BLOCK]
                z = tl.div_rn(x - peak, tl.zeros((BLOCK,), tl.float32) + temperature)
                depth = (0.0 - z).to(tl.int32, bitcast=True)
                count += ((depth <= tried) & held).to(tl.int32)
            enough = (tried >= 0) & (tl.sum(count, axis=0) >= top_k)
            found = tl.where(enough, tried, found)
        kth = 0.0 - found.to(tl.float32, bitcast=True)
    tl.store(limits_ptr + row * 2, kth)
    tl.store(limits_ptr + row * 2 + 1, tl.maximum(kth, least))


@triton.jit
def scores_kernel(
    logits_ptr, parameters_ptr, peaks_ptr, limits_ptr, scores_ptr, best_ptr, winners_ptr,
    masses_ptr, vocab, blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Scores of a block, its best token, and its sum of e^z."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, top_p, seed, choice, index = row_settings(parameters_ptr, row)
    number = tl.arange(0, BLOCKS)
    peaks = tl.load(peaks_ptr + row * blocks + number, mask=number < blocks, other=float("-inf"))
    peak = tl.max(peaks, axis=0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    held = token < vocab
    score = tl.load(logits_ptr + row * vocab + token, mask=held, other=float("-inf"))  # [BLOCK]
    sound = (peak > float("-inf")) & (peak < float("inf"))
    if sound & (temperature > 0.0):
        z = tl.div_rn(score - peak, tl.zeros((BLOCK,), tl.float32) + temperature)
        kth = tl.load(limits_ptr + row * 2)
        limit = tl.load(limits_ptr + row * 2 + 1)
        score = z + gumbel_noise(block, seed, choice, index, BLOCK)
        score = tl.where(z >= limit, score, float("-inf"))
        if top_p < 1.0:
            mass = tl.sum(tl.where(z >= kth, tl.exp(z.to(tl.float64)), 0.0), axis=0)
            tl.store(masses_ptr + row * blocks + block, mass)
            tl.store(scores_ptr + row * vocab + token, score, mask=held)
    if sound:
        best, winner = tl.max(score, axis=0, return_indices=True)
        tl.store(best_ptr + row * blocks + block, best)
        tl.store(winners_ptr + row * blocks + block, block * BLOCK + winner)


@triton.jit
def draw_kernel(
    logits_ptr, parameters_ptr, peaks_ptr, scores_ptr, best_ptr, winners_ptr, masses_ptr, out_ptr,
    vocab, blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The token of one row; -1 if the row has no finite maximum."""
    row = tl.program_id(0).to(tl.int64)
    temperature, top_p, _seed, _choice, _index = row_settings(parameters_ptr, row)
    number = tl.arange(0, BLOCKS)
    there = number < blocks
    at = row * blocks + number
    peak = tl.max(tl.load(peaks_ptr + at, mask=there, other=float("-inf")), axis=0)
    chosen = tl.full((), -1, tl.int64)
    if (peak > float("-inf")) & (peak < float("inf")):
        best = tl.load(best_ptr + at, mask=there, other=float("-inf"))
        _best, block = tl.max(best, axis=0, return_indices=True)
        token = tl.load(winners_ptr + row * blocks + block)
        if (temperature > 0.0) & (top_p < 1.0):
            limit = top_p * tl.sum(tl.load(masses_ptr + at, mask=there, other=0.0), axis=0)
            lane = tl.arange(0, BLOCK)
            outside = True
            while outside:
                z = tl.div_rn(tl.load(logits_ptr + row * vocab + token) - peak, temperature)
                before = tl.zeros((BLOCK,), tl.float64)
                high = tl.full((BLOCK,), float("-inf"), tl.float32)
                holder = lane
                for start in range(0, vocab, BLOCK):
                    other = start + lane
                    held = other < vocab
                    x = tl.load(
                        logits_ptr + row * vocab + other, mask=held, other=float("-inf")
                    )  # [BLOCK]
                    other_z = tl.div_rn(x - peak, tl.zeros((BLOCK,), tl.float32) + temperature)
                    ahead = (other_z > z) | ((other_z == z) & (other < token))
                    before += tl.where(ahead, tl.exp(other_z.to(tl.float64)), 0.0)
                    score = tl.load(
                        scores_ptr + row * vocab + other, mask=ahead & held, other=float("-inf")
                    )
                    better = score > high  # equal ones: the first stays, its id is smaller
                    high = tl.where(better, score, high)
                    holder = tl.where(better, other, holder)
                mass = tl.sum(before, axis=0)
                outside = (mass >= limit) & (mass > 0.0)
                if outside:
                    top = tl.max(high, axis=0)
                    token = tl.min(tl.where(high == top, holder, vocab), axis=0)
        chosen = token.to(tl.int64)
    tl.store(out_ptr + row, chosen)


def pack_parameters(
    temperature: Sequence[float],
    top_p: Sequence[float],
    seed: Sequence[int],
    choice: Sequence[int],
    index: Sequence[int],
    top_k: Sequence[int] | None = None,
    min_p: Sequence[float] | None = None,
) -> torch.Tensor:
    """What differs between rows, for one copy to the device: [S, PARAMETERS] int64 on the host."""
    words = np.empty((len(temperature), PARAMETERS), dtype=np.int64)
    words[:, 0] = np.array(temperature, dtype=np.float64).view(np.int64)
    words[:, 1] = np.array(top_p, dtype=np.float64).view(np.int64)
    for column, numbers in ((2, seed), (3, choice), (4, index)):
        unsigned = [number & 0xFFFFFFFFFFFFFFFF for number in numbers]
        words[:, column] = np.array(unsigned, dtype=np.uint64).view(np.int64)
    words[:, 5] = 0 if top_k is None else top_k
    limits = [-math.inf] if min_p is None else [min_p_limit(each) for each in min_p]
    words[:, 6] = np.array(limits, dtype=np.float64).view(np.int64)
    return torch.from_numpy(words)


def plan_sample(
    logits: torch.Tensor, parameters: torch.Tensor, out: torch.Tensor
) -> tuple[Launch, ...]:
    """One token of each row of ``logits`` [S, V] float32 into ``out`` [S] int64; -1: a row without
    a finite maximum.

    Args:
        parameters: of ``pack_parameters``, on the device.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    rows, vocab = logits.shape
    require(
        vocab > 0
        and logits.is_contiguous()
        and logits.dtype is torch.float32
        and parameters.shape == (rows, PARAMETERS)
        and parameters.is_contiguous()
        and out.shape == (rows,),
        "sample",
        *(logits, parameters, out),
    )
    blocks = ceil_div(vocab, BLOCK)
    peaks, best = logits.new_empty(rows, blocks), logits.new_empty(rows, blocks)
    winners = logits.new_empty(rows, blocks, dtype=torch.int32)
    masses = logits.new_empty(rows, blocks, dtype=torch.float64)
    rows_of: dict[str, torch.Tensor | int | float] = {
        "logits_ptr": logits,
        "peaks_ptr": peaks,
        "vocab": vocab,
        "blocks": blocks,
    }
    limited = rows_of | {"parameters_ptr": parameters, "limits_ptr": logits.new_empty(rows, 2)}
    more = {
        "scores_ptr": torch.empty_like(logits),
        "best_ptr": best,
        "winners_ptr": winners,
        "masses_ptr": masses,
    }
    drawn = rows_of | more | {"parameters_ptr": parameters, "out_ptr": out}
    tiles = {"BLOCK": BLOCK, "BLOCKS": power_of_2(blocks)}
    walk = tiles | {"BLOCK": DRAW_BLOCK}
    return (
        Launch(peaks_kernel, (rows, blocks), rows_of, {"BLOCK": BLOCK}),
        Launch(limits_kernel, (rows,), limited, walk, warps=8),
        Launch(scores_kernel, (rows, blocks), limited | more, tiles),
        Launch(draw_kernel, (rows,), drawn, walk, warps=8),
    )


def sample_on_device(logits: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """``plan_sample``, run; nothing waits for the device. Raises as it does."""
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    for launch in plan_sample(logits.contiguous(), parameters, out):
        launch.run()
    return out


def gumbel_sample(
    logits: torch.Tensor,
    temperature: Sequence[float],
    top_p: Sequence[float],
    seed: Sequence[int],
    choice: Sequence[int],
    index: Sequence[int],
    top_k: Sequence[int] | None = None,
    min_p: Sequence[float] | None = None,
) -> list[int]:
    """See ``kernels.reference.sampling.gumbel_sample``."""
    settings = temperature, top_p, seed, choice, index, top_k, min_p
    parameters = pack_parameters(*settings).to(logits.device)
    tokens: list[int] = sample_on_device(logits, parameters).tolist()
    return tokens
