"""Gives answers up to routers that ask for them: the shell around ``pop_node.answers.answers``.

Keeps the records, forgets them in time, and has their text made off the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import Executor

from pop_node.answers.answers import Answer, AnswerBook, fullest, text_after
from pop_node.router_link import RouterLink
from pop_node.text.tokenizer import TextCodec
from wire.messages import Attach, Attached, Refused

MAX_TELLING = 64
"""Answers being put into text at once; more are refused. Guess: one is a few milliseconds of a
thread, and routers wait two seconds."""


class AnswerDesk:
    """The answers of one model that have ended lately; live ones are the caller's."""

    def __init__(self, codec: TextCodec, executor: Executor) -> None:
        self._codec = codec
        self._executor = executor
        self._book = AnswerBook()
        self._num_telling = 0
        self._timer: asyncio.TimerHandle | None = None

    def keep(self, answer: Answer | None) -> None:
        """A leg has ended; None: it had said nothing."""
        if answer is None:
            return
        self._book.add(answer, asyncio.get_running_loop().time())
        if self._timer is None:
            self._expire()

    def close(self) -> None:
        """Forget when to forget."""
        if self._timer is not None:
            self._timer.cancel()

    def look_up(self, question: Attach, live: Iterable[Answer | None]) -> Answer | None:
        """The fullest of what is live and what is kept, if it has as much as the client read."""
        now = asyncio.get_running_loop().time()
        kept = self._book.get(question.tenant, question.request_id, now)
        answer = fullest(one for one in (*live, kept) if one is not None)
        if answer is None or len(answer.ids) < question.from_index:
            return None
        return answer

    def tell(
        self, tasks: asyncio.TaskGroup, link: RouterLink, question: Attach, answer: Answer
    ) -> None:
        """Say all of an answer to the router that asked."""
        if self._num_telling >= MAX_TELLING:
            text = "too many answers are being taken over"
            link.say(Refused(question.stream, "overloaded", text, True, 1000))
            return
        self._num_telling += 1
        loop = asyncio.get_running_loop()
        args = (self._codec, answer, question.from_index)
        text_future = loop.run_in_executor(self._executor, text_after, *args)
        tasks.create_task(self._tell(link, question.stream, answer, text_future))

    async def _tell(
        self, link: RouterLink, stream: int, answer: Answer, text: asyncio.Future[bytes]
    ) -> None:
        try:
            attached = Attached(
                stream,
                answer.submit,
                answer.ids,
                await text,
                answer.prompt_tokens,
                answer.cached_tokens,
                answer.reason,
            )
        finally:
            self._num_telling -= 1
        link.say(attached)

    def _expire(self) -> None:
        loop = asyncio.get_running_loop()
        self._book.expire(loop.time())
        at = self._book.next_deadline()
        self._timer = None if at is None else loop.call_at(at, self._expire)
