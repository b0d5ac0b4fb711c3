"""How many requests may be open: halved when the server is too busy, one more after twenty that went well."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

#: Requests that must go well for one more at a time.
_PATIENCE = 20


class Limiter:
    """Slots for requests (additive increase, multiplicative decrease).

    Args:
        most: Open requests at most, at any time.
    """

    def __init__(self, most: int) -> None:
        self.most = self.limit = most
        self.open = 0
        self._good = 0
        self._round = 0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[int]:
        """Wait for a slot, and hold it while the block lasts; gives the number of the round, for `throttled`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.open < self.limit)
            self.open += 1
        try:
            yield self._round
        finally:
            self.open -= 1
            async with self._changed:
                self._changed.notify_all()

    def throttled(self, began: int) -> None:
        """The server asked for patience; requests of one round halve the limit once."""
        if began == self._round:
            self._round += 1
            self.limit, self._good = max(1, self.limit // 2), 0

    def succeeded(self) -> None:
        """A request went well."""
        self._good += 1
        if self._good >= _PATIENCE and self.limit < self.most:
            self.limit, self._good = self.limit + 1, 0
