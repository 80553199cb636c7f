"""Who may start a request now: bounds on requests in flight, and on retries.

Synchronous counters; the caller pairs every ``enter`` with one ``leave``.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from wire.errors import OverloadError

MAX_BODY_BYTES = 10 * 1024 * 1024
"""Largest request body; what the mesh wire can carry follows from it."""

RETRY_RATIO = 0.2
RETRIES_PER_S = 10.0
RETRY_MEMORY_S = 10.0
MAX_RETRIES_SAVED = 1000.0
"""Retries may add 20 % to the load, and ten a second are always allowed: a mesh in trouble must not
be given several times its load. What time earned is remembered for ten seconds. Source: the retry
budgets of finagle and linkerd, their defaults; the most that is saved is a guess."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one router.

    ``in_flight`` requests at once over all tenants (each holds some 20 KB); ``per_tenant`` keeps
    one tenant from taking them all. Times are seconds: for a request's head, for its body, and for
    the whole request.
    """

    in_flight: int = 2048
    per_tenant: int = 1024
    head_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    request_timeout_s: float = 600.0
    shutdown_s: float = 30.0


class Admission:
    """Counts requests in flight."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._total = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._by_tenant: dict[str, int] = {}

    @property
    def in_flight(self) -> int:
        """Requests now."""
        return self._total

    def enter(self, tenant: str) -> None:
        """Count one request in; raises ``OverloadError`` (429 the tenant's, 503 the router's)."""
        if self._total >= self._limits.in_flight:
            raise OverloadError(
                f"this router already serves {self._total} requests", retry_after_s=1.0
            )
        held = self._by_tenant.get(tenant, 0)
        if held >= self._limits.per_tenant:
            raise OverloadError(
                f"{held} requests of this tenant are in flight, the most it may have",
                code="too_many_requests",
                retry_after_s=1.0,
            )
        self._total += 1
        self._idle.clear()
        self._by_tenant[tenant] = held + 1

    def leave(self, tenant: str) -> None:
        """Count one request out."""
        self._total -= 1
        if not self._total:
            self._idle.set()
        left = self._by_tenant[tenant] - 1
        if left:
            self._by_tenant[tenant] = left
        else:
            del self._by_tenant[tenant]

    async def wait_idle(self) -> None:
        """Until no request is in flight."""
        await self._idle.wait()


class RetryBudget:
    """A balance that requests and time pay into and retries draw from. Times are seconds."""

    def __init__(self) -> None:
        self._balance = RETRIES_PER_S * RETRY_MEMORY_S
        self._at = 0.0

    def deposit(self) -> None:
        """A request came in."""
        self._balance = min(self._balance + RETRY_RATIO, MAX_RETRIES_SAVED)

    def withdraw(self, now: float) -> bool:
        """Take one retry; False when the budget is spent."""
        earned, self._at = (now - self._at) * RETRIES_PER_S, now
        reserve = RETRIES_PER_S * RETRY_MEMORY_S
        if self._balance < reserve:
            self._balance = min(self._balance + earned, reserve)
        if self._balance < 1.0:
            return False
        self._balance -= 1.0
        return True
