"""A lock that nobody holds must not stop a command for ever."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from tersor._errors import TersorError
from tersor.kv.bench.peers.builtin import quanto_locks, wait_for_locks


def test_a_lock_that_stays_is_named(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    wait_for_locks([lock], seconds=0)
    lock.touch()
    start = time.monotonic()
    with pytest.raises(TersorError, match=str(lock)):
        wait_for_locks([tmp_path / "other", lock], seconds=0.2)
    assert 0.2 <= time.monotonic() - start < 2


def test_a_lock_that_goes_is_waited_for(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    timer = threading.Timer(0.2, lock.unlink)
    timer.start()
    wait_for_locks([lock], seconds=20)
    assert not lock.exists()
    timer.join()


def test_the_locks_of_quanto_lie_where_it_builds() -> None:
    pytest.importorskip("optimum.quanto")
    from optimum.quanto.library.extensions import extension

    waiting = [each for each in extension._extensions.values() if each._lib is None]
    assert quanto_locks() == [Path(each.build_directory) / "lock" for each in waiting]
