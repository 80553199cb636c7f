"""Whether guessing ahead pays, and how far: drafts of tokens that one pass verifies. Pure.

A decode row that also computes ``d`` guessed tokens gets logits after each of them. What sampling
draws there is compared with the guesses: the longest beginning that agrees was right, and the first
token that does not is drawn from the right logits all the same. Sampling is a pure function of the
logits and (seed, choice, index), so a draft changes nothing but the number of steps: greedy or not,
every token is the one that would have come, as long as a row has the same bits in any batch.

When it pays. A step of R sequences takes T seconds for R tokens. A guess that is right with
probability q adds q tokens and costs a share t of the step, so it is worth it while ``q > R t``.
The j-th token of a draft is right with about p^j, where p is how often a guess was right when all
before it were; hence drafts are as long as ``p^j`` stays above ``MARGIN`` times that threshold, and
all of a step are dropped when together they do not pay for what the first of them costs. Sequences
for which not even one token is worth it are tried again after a pause, which doubles while that
fails.
"""

from __future__ import annotations

from pop_node.engine.scheduling.drafter import MAX_CHANCE, Drafter
from pop_node.engine.scheduling.sequence import Sequence
from pop_node.engine.scheduling.step_cost import StepCost

LEAST_THRESHOLD = 1e-3
"""Below this a draft is as long as drafts get. Guess."""

MARGIN = 1.25
"""How far guesses must be above what they cost: both are estimates. Guess."""

ENGINE_FADE = 0.99
"""Weight of what all sequences' guesses were like, per draft: from there each begins. Guess."""

FIRST_CHANCE = 0.5
"""How often guesses are right before anything is known. Measured: 0.35 to 0.5 (``lookup``)."""

MAX_DROPPED = 64
"""Steps whose drafts are dropped until some are let through to learn what they cost by now. Guess.
"""


class Speculation:
    """One engine's experience. ``drafted`` and ``accepted`` count tokens since the engine began."""

    def __init__(self) -> None:
        self.drafted = self.accepted = 0
        self._cost = StepCost()
        self._hits, self._tries = FIRST_CHANCE, 1.0  # fading
        self._dropped = 0

    def drafts(self, sequences: list[Sequence], budget: int) -> list[tuple[int, ...]]:
        """Guesses of what follows each of some sequences that decode, ``budget`` of them in all;
        [] when none is made in this step."""
        count = len(sequences)
        if count == 0 or budget < 1 or self._cost.wants_plain(count):
            return []
        fixed, row = self._cost.extra(count)
        threshold = max(LEAST_THRESHOLD, MARGIN * count * row)
        if threshold >= MAX_CHANCE:
            return []
        found, guesses, worth = [], 0, 0.0
        for sequence in sequences:
            drafts = self._draft(sequence, threshold, budget - guesses)
            found.append(drafts)
            if drafts:
                guesses += len(drafts)
                assert sequence.drafter is not None, "it has just guessed"
                worth += sequence.drafter.worth(len(drafts), self._chance)
        if guesses == 0:
            return []
        if worth < MARGIN * count * (fixed + row * guesses) and self._dropped < MAX_DROPPED:
            self._dropped += 1
            return []
        self._dropped = 0
        return found

    @property
    def _chance(self) -> float:
        return self._hits / self._tries

    def _draft(self, sequence: Sequence, threshold: float, room: int) -> tuple[int, ...]:
        room = min(room, sequence.max_tokens - sequence.output_tokens - 1)
        # Who is penalised for repeating does not repeat, and each guess would need its own tally.
        if room < 1 or sequence.leg == "prefill" or sequence.tally is not None:
            return ()
        drafter = sequence.drafter
        if drafter is None:
            drafter = sequence.drafter = Drafter()
        length = drafter.length(threshold, self._chance)
        return drafter.guess(sequence.ids, min(room, length)) if length else ()

    def judge(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """The first ``accepted`` of ``drafted`` guesses were right."""
        assert sequence.drafter is not None, "it was never guessed at"
        sequence.drafter.judge(drafted, accepted)
        self.drafted += drafted
        self.accepted += accepted
        self._hits = ENGINE_FADE * self._hits + accepted
        self._tries = ENGINE_FADE * self._tries + min(drafted, accepted + 1)

    def step(self, sequences: int, guesses: int, seconds: float) -> None:
        """See ``StepCost.step``."""
        self._cost.step(sequences, guesses, seconds)
