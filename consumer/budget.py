"""The byte budget: a bound on the memory that records, payloads and responses hold (``limits.in_flight_bytes``).

Contract 4. Charged are a record's bytes from fetch to acknowledgement, and response payloads until acknowledged.

1. *Fetching* stops when half of the budget is charged and goes on below three eighths, so that stopping and
   going on do not alternate with every record. The other half stays free for responses.
2. A *read* (get) reserves the largest payload it may bring back before it starts, and waits where that does not fit.
   Answered, it holds what its answer takes until that is acknowledged (:meth:`ByteBudget.answer_read`): so a slow
   output topic keeps further reads waiting.
3. A read never waits where no other one holds a charge: so one charge above the whole budget runs alone, and records
   that wait in buffers can never keep the reads waiting that would drain them.
"""

from __future__ import annotations

import asyncio

FETCH_SHARE = 0.5
"""Fetched records may hold half of the budget: reads must find room though every buffer is full."""
RESUME_SHARE = 0.375
"""A quarter less than :data:`FETCH_SHARE`: pausing drops what the client has prefetched (hazard H7)."""


class ByteBudget:
    """Bytes charged against a fixed limit.

    Args:
        limit: Bytes, at least 1.

    Raises:
        ValueError: *limit* is below 1.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError("a byte budget is at least 1 byte")
        self.limit = limit
        self._used = 0
        self._reads = 0
        self._waiters: asyncio.Event | None = None
        # At least 1: an empty budget never stops fetching, or nothing would be left to set it going again.
        self._fetch_stop = max(1, int(limit * FETCH_SHARE))
        self._fetch_resume = int(limit * RESUME_SHARE)

    @property
    def used(self) -> int:
        """Bytes charged now; over the limit only by a single charge that is larger than what was free."""
        return self._used

    @property
    def fetching_stopped(self) -> bool:
        """True where no more records should be fetched."""
        return self._used >= self._fetch_stop

    @property
    def fetching_may_resume(self) -> bool:
        """True where fetching, once stopped, may go on."""
        return self._used <= self._fetch_resume

    def charge(self, size: int) -> None:
        """Charge *size* bytes without waiting."""
        self._used += size

    def release(self, size: int) -> None:
        """Give *size* bytes back and let waiting reads look again."""
        self._used -= size
        assert self._used >= 0, "more bytes given back than were charged"
        if self._waiters is not None:
            self._waiters.set()
            self._waiters = None

    async def reserve_read(self, size: int) -> None:
        """Charge *size* bytes for a read, waiting for room; :meth:`release_read` gives them back.

        Cancellation: nothing is charged.
        """
        while not self.reserve_read_nowait(size):
            if self._waiters is None:
                self._waiters = asyncio.Event()
            await self._waiters.wait()

    def reserve_read_nowait(self, size: int) -> bool:
        """As :meth:`reserve_read` where there is room; False, and nothing is charged, where there is none."""
        if self._reads and self._used + size > self.limit:
            return False
        self._reads += 1
        self._used += size
        return True

    def answer_read(self, reserved: int, size: int) -> None:
        """A read is answered: charge the *size* of its answer, instead of what was *reserved*, until it is released."""
        self.charge(size)
        self.release(reserved)

    def release_read(self, size: int) -> None:
        """Give back what a read has reserved, or what its answer has held until it was acknowledged."""
        self._reads -= 1
        assert self._reads >= 0, "more reads given back than were reserved"
        self.release(size)
