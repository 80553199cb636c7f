"""What a step drew becomes the answers of its sequences. Pure; the scheduler owns what follows."""

from __future__ import annotations

from pop_node.engine.messages import Declined, Token
from pop_node.engine.scheduling.schedule import NO_TOKEN, Effect, Row

BROKEN = "broken"
"""In place of a finish: no token could be drawn."""

BROKEN_IN_A_ROW = 16
"""Sequences that broke with no token drawn in between, after which the engine gives up: another one
reads its weights anew and checks them. Guess: four requests that break every engine, each of which
routers try four times."""


def book(row: Row, drawn: list[int], effects: list[Effect]) -> tuple[int, str]:
    """Take the tokens ``drawn`` after a row as long as the drafts before them were right.

    Returns how many drafts were, and the finish, as in ``messages.Token``, or ``BROKEN``.
    """
    sequence, _, _, drafts = row
    for accepted, token in enumerate(drawn):
        if token == NO_TOKEN:
            return accepted, BROKEN
        sequence.ids.append(token)
        finish = sequence.finish()
        index = len(sequence.ids) - sequence.prompt_tokens - 1
        effects.append(Token(sequence.seq, index, token, finish))
        if finish or accepted == len(drafts) or drafts[accepted] != token:
            return accepted, finish
    raise AssertionError("a token is drawn after each draft and after the last")


class Breakages:
    """Tells a request that breaks from an engine that is broken."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def drew(self) -> None:
        """A token could be drawn."""
        self._in_a_row = 0

    def broke(self, seq: int) -> Declined:
        """What to say of sequence ``seq``, for which none could.

        Raises ``ArithmeticError`` when it is the last of ``BROKEN_IN_A_ROW``.
        """
        self._in_a_row += 1
        if self._in_a_row == BROKEN_IN_A_ROW:
            raise ArithmeticError(f"{BROKEN_IN_A_ROW} sequences in a row had no finite logits")
        return Declined(seq, "internal_error", "the model's numbers for this answer are not finite")
