"""A file of SQLite with one writing thread, safe against a kill at any moment.

The thread takes whatever waits in its queue into one transaction; who wrote is told after it is on the disk.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from tersor._errors import TersorError

T = TypeVar("T")
#: Jobs that share a transaction at most.
_MOST_JOBS = 1000


class Database:
    """An open file; several threads may use it, and several processes at once.

    Args:
        file: Made where it is not there.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._local = threading.local()
        self._readers: list[sqlite3.Connection] = []
        self._jobs: queue.SimpleQueue[tuple[Callable[[sqlite3.Connection], Any], Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        self._writer: threading.Thread | None = None
        self._guard = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """Write what waits, and close every connection."""
        with self._guard:
            self._closed = True
            if self._writer is not None:
                self._jobs.put(None)
                self._writer.join()
                self._writer = None
            for reader in self._readers:
                reader.close()
            self._readers.clear()

    def read(self, query: str, *values: Any) -> list[Any]:
        """Rows of a query."""
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._connect()
            with self._guard:
                self._readers.append(connection)
        rows: list[Any] = connection.execute(query, values).fetchall()
        return rows

    def write(self, query: str, rows: Sequence[Sequence[Any]]) -> None:
        """Run a statement for each of ``rows``, and wait until it is on the disk."""
        if rows:
            self.submit_rows(query, rows).result()

    def submit_rows(self, query: str, rows: Sequence[Sequence[Any]]) -> Future[None]:
        """`write` without waiting; the future is done when the rows are on the disk."""

        def job(connection: sqlite3.Connection) -> None:
            # The cursor must end in the thread that made it, so it is not handed on as a result.
            connection.executemany(query, rows)

        return self.submit(job)

    def transact(self, job: Callable[[sqlite3.Connection], T]) -> T:
        """What ``job`` returns, run in one transaction that nobody else writes in."""
        result: T = self.submit(job).result()
        return result

    def submit(self, job: Callable[[sqlite3.Connection], Any]) -> Future[Any]:
        """Have ``job`` run in a transaction by the writing thread; the future is done when that is on the disk."""
        done: Future[Any] = Future()
        with self._guard:
            if self._closed:
                raise RuntimeError(f"{self.file} is closed")
            if self._writer is None:
                self._writer = threading.Thread(target=self._keep_writing, name="arena-writer", daemon=True)
                self._writer.start()
            self._jobs.put((job, done))
        return done

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.file, timeout=30, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    def _keep_writing(self) -> None:
        connection: sqlite3.Connection | None = None
        waiting = True
        while waiting:
            batch = [self._jobs.get()]
            while len(batch) < _MOST_JOBS and batch[-1] is not None:
                with suppress(queue.Empty):
                    batch.append(self._jobs.get_nowait())
                    continue
                break
            waiting = batch[-1] is not None
            jobs = [each for each in batch if each is not None]
            if not jobs:
                continue
            try:
                connection = connection or self._connect()
                self._commit(connection, jobs)
            except Exception as error:
                said = self._explained(error)
                for _, done in jobs:
                    if not done.done():
                        done.set_exception(said)
        if connection is not None:
            connection.close()

    def _commit(
        self, connection: sqlite3.Connection, jobs: list[tuple[Callable[[sqlite3.Connection], Any], Future[Any]]]
    ) -> None:
        """All jobs in one transaction; where one of them fails, each in its own."""
        try:
            connection.execute("BEGIN IMMEDIATE")
            results = [job(connection) for job, _ in jobs]
            connection.execute("COMMIT")
        except Exception:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if len(jobs) == 1:
                raise
            for each in jobs:
                try:
                    self._commit(connection, [each])
                except Exception as error:
                    each[1].set_exception(self._explained(error))
            return
        for (_, done), result in zip(jobs, results, strict=True):
            done.set_result(result)

    def _explained(self, error: Exception) -> Exception:
        """A fault of the disk as an `OSError` that names the file."""
        if isinstance(error, sqlite3.OperationalError):
            return OSError(None, f"cannot be written ({error}); what was recorded before is kept", str(self.file))
        return error

    @contextmanager
    def exclusive(self, what: str) -> Iterator[None]:
        """While this lasts, no other process may do ``what`` on this file.

        Raises:
            TersorError: At once, if another one does.
        """
        # A lock of SQLite ends with the process that holds it, however that ends.
        lock = sqlite3.connect(self.file.with_name(f".{what}.lock"), timeout=0, isolation_level=None)
        try:
            try:
                lock.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError:
                raise TersorError(f"another process does {what} on {self.file}; wait for it, or end it") from None
            yield
        finally:
            lock.close()
