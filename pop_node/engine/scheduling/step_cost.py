"""What guesses cost a decode step, fitted to the steps that were. Pure.

A step of few rows is bound by reading the weights, so more rows are nearly free; with many rows it
is bound by computing. And the first row beside a full tile may cost as much as a whole one. So a
step of R sequences with e guesses takes ``T(R) (1 + fixed + row e)``: T(R) is a fading average of
the steps without guesses, and the line is fitted to those with, apart for small and large R, by
least squares over fading sums that begin with a guess.
"""

from __future__ import annotations

FADE = 0.98
"""Weight of what was known, per step. Guess: fifty steps to forget."""

PLAIN_WEIGHT = 0.1
"""Weight of the newest step without guesses, once ten are known. Guess."""

GUESSED_ROW = 0.09
"""A row's cost over that of a step of one. Measured: SmolLM2-135M bf16 on one core, steps of 1, 4
and 16 rows (benchmarks/results/invariance.json)."""

FIXED_WEIGHT, ROW_WEIGHT = 2.0, 16.0
"""What the guesses ``fixed = 0`` and ``GUESSED_ROW`` count for, in steps and in (rows)^2."""

OUTLIER = 2.0
"""A step that took longer than so many times what was expected was kept waiting by somebody else,
and counts as that long. Guess."""

MAX_AGE = 32
"""Steps with guesses until one without is taken, so that both are compared under the same load."""


class _Line:
    """Fading sums of what steps with guesses took more than plain ones, over the number of guesses;
    begins as ``row`` per guess."""

    __slots__ = ("_n", "_x", "_xx", "_xy", "_y")

    def __init__(self, row: float) -> None:
        self._n, self._x, self._y = FIXED_WEIGHT, 0.0, 0.0
        self._xx, self._xy = ROW_WEIGHT, ROW_WEIGHT * row

    def add(self, guesses: int, extra: float) -> None:
        fixed, row = self.fit()
        limit = OUTLIER * (1.0 + max(0.0, fixed + row * guesses)) - 1.0
        extra = min(extra, limit)
        self._n = FADE * self._n + 1.0
        self._x = FADE * self._x + guesses
        self._y = FADE * self._y + extra
        self._xx = FADE * self._xx + guesses * guesses
        self._xy = FADE * self._xy + guesses * extra

    def fit(self) -> tuple[float, float]:
        """(fixed, row): neither below 0."""
        spread = self._n * self._xx - self._x * self._x
        row = (self._n * self._xy - self._x * self._y) / spread if spread > 1e-9 else 0.0
        row = max(0.0, min(row, self._y / self._x if self._x > 0.0 else row))
        return max(0.0, (self._y - row * self._x) / self._n), row


class StepCost:
    """Experience with the decode steps of one engine."""

    def __init__(self) -> None:
        self._plain: dict[int, tuple[int, float]] = {}  # sequences -> steps seen, seconds
        self._age: dict[int, int] = {}  # sequences -> steps with guesses since a plain one
        self._lines: dict[int, _Line] = {}

    def step(self, sequences: int, guesses: int, seconds: float) -> None:
        """Count a step in which ``sequences`` decoded with ``guesses`` rows more, and nothing
        else."""
        seen, plain = self._plain.get(sequences, (0, 0.0))
        if guesses == 0:
            if seen > 2:
                seconds = min(seconds, OUTLIER * plain)
            weight = max(PLAIN_WEIGHT, 1.0 / (seen + 1))
            self._plain[sequences] = seen + 1, plain + weight * (seconds - plain)
            self._age[sequences] = 0
        elif plain > 0.0:
            self._age[sequences] += 1
            self._line(sequences).add(guesses, seconds / plain - 1.0)

    def wants_plain(self, sequences: int) -> bool:
        """Is too little known of steps without guesses?"""
        return self._age.get(sequences, MAX_AGE) >= MAX_AGE

    def extra(self, sequences: int) -> tuple[float, float]:
        """(what any guesses add to a step, what each of them adds), over the step without."""
        return self._line(sequences).fit()

    def _line(self, sequences: int) -> _Line:
        line = self._lines.get(sequences.bit_length())
        if line is None:
            row = GUESSED_ROW / (1.0 + GUESSED_ROW * sequences)
            line = self._lines[sequences.bit_length()] = _Line(row)
        return line
