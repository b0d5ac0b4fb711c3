"""Where experts are: on disk, in host memory, or on the base's device, within budgets; least recently used out first.

An expert that answers requests stays. On a CPU, host memory and device are one: an expert that is no longer resident
gives back only what it does not share.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tersor._errors import TersorError
from tersor.experts.config import DeltaFormatError, ExpertBusyError, UnknownExpertError
from tersor.experts.delta import MANIFEST, ExpertDelta, Manifest
from tersor.experts.linear import ResidentExpert

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def is_name(name: object) -> bool:
    """Whether an expert can have this name: it is also a folder's, so it leads nowhere else."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many experts, and how many bytes of them, one tier holds; None is no limit."""

    count: int | None = None
    nbytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("count", "nbytes"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise TersorError(f"a budget's {name}={value!r} must be an integer of at least 1, or None")

    def holds(self, count: int, nbytes: int) -> bool:
        """Whether so much fits."""
        return (self.count is None or count <= self.count) and (self.nbytes is None or nbytes <= self.nbytes)


@dataclass(eq=False)
class Entry:
    """One registered expert. ``generation`` differs between two contents that had the same name."""

    name: str
    manifest: Manifest
    source: Path | ExpertDelta
    generation: int
    stamp: tuple[tuple[str, int, int], ...] = ()
    cached: ExpertDelta | None = None
    resident: ResidentExpert | None = None
    reserved: int = 0
    """Bytes on the device that are kept free for it while it is copied there."""
    running: int = 0
    pinned: bool = False
    used: int = 0
    loading: threading.Lock = field(default_factory=threading.Lock)

    @property
    def on_device(self) -> int:
        """Bytes on the device, those that are on the way there included."""
        return self.reserved if self.resident is None else self.resident.delta.nbytes

    @property
    def tier(self) -> str:
        """ "disk", "cpu" or "device"."""
        return "device" if self.resident is not None else "disk" if self.cached is None else "cpu"


class ExpertBank:
    """Registered experts and their tiers; safe to use from several threads."""

    def __init__(self, place: Callable[[ExpertDelta], ResidentExpert], *, resident: Budget, cached: Budget) -> None:
        """``place`` puts a delta on the device."""
        self._place, self._resident, self._cached = place, resident, cached
        self._entries: dict[str, Entry] = {}
        self._lock = threading.RLock()
        self._clock = 0
        self._generations = 0

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """Registered names in order of registration."""
        return list(self._entries)

    def entries(self) -> Iterable[Entry]:
        """All entries."""
        return list(self._entries.values())

    def entry(self, name: str) -> Entry:
        """One entry; raises `UnknownExpertError`."""
        try:
            return self._entries[name]
        except KeyError:
            known = self.names() or "none yet"
            raise UnknownExpertError(f"expert {name!r} is not registered; known are {known}") from None

    def register(self, name: str, source: Path | ExpertDelta, manifest: Manifest) -> Entry:
        """Make a name known; nothing is read until it is used.

        Raises:
            ValueError: If the name is taken, or is not a plain name.
        """
        if not is_name(name):
            raise TersorError(
                f"expert name {name!r} is not possible; use letters, digits, '.', '_' and '-', a letter or digit first"
            )
        with self._lock:
            if name in self._entries:
                raise TersorError(f"expert {name!r} is registered already; unload it first")
            self._generations += 1
            entry = Entry(name, manifest, source, self._generations)
            if isinstance(source, ExpertDelta):
                entry.cached = source
            else:
                entry.stamp = _stamp(source)
            self._entries[name] = entry
            return entry

    def remove(self, name: str) -> None:
        """Forget an expert; its tensors are free once nobody else holds them.

        Raises:
            ExpertBusyError: If it answers requests.
        """
        with self._lock:
            entry = self.entry(name)
            if entry.running:
                raise ExpertBusyError(
                    f"expert {name!r} has {entry.running} running requests; try again when it is idle"
                )
            del self._entries[name]
            entry.cached = entry.resident = None

    def pin(self, name: str, *, pinned: bool = True) -> None:
        """Keep an expert on the device, or let it go again."""
        with self._lock:
            self.entry(name).pinned = pinned

    def acquire(self, name: str) -> ResidentExpert:
        """The expert on the device, loaded if need be, and kept there until as many `release` calls.

        Two threads that ask for one name wait for one load; others go on, as no lock is held while files are read or
        tensors are copied.

        Raises:
            ExpertBusyError: If everything that could make room is in use.
            DeltaFormatError: If files changed since they were registered, or are broken.
        """
        with self._lock:
            entry = self.entry(name)
            entry.running += 1
            self._clock += 1
            entry.used = self._clock
        try:
            with entry.loading:
                if entry.resident is None:
                    delta = entry.cached or _read(entry)
                    with self._lock:
                        self._make_room(entry, delta.nbytes)
                        entry.reserved = delta.nbytes
                    try:
                        resident = self._place(delta)
                    except BaseException:
                        entry.reserved = 0
                        raise
                    with self._lock:
                        entry.resident, entry.cached, entry.reserved = resident, delta, 0
                        self._trim_cache()
                return entry.resident
        except BaseException:
            self.release(name)
            raise

    def release(self, name: str) -> None:
        """Undo one `acquire`."""
        with self._lock:
            self._entries[name].running -= 1

    def _make_room(self, entry: Entry, needed: int) -> None:
        """Drop idle experts from the device until ``entry`` fits, the least recently used first."""
        while True:
            there = [each for each in self._entries.values() if each.resident is not None or each.reserved]
            held = sum(each.on_device for each in there)
            if self._resident.holds(len(there) + 1, held + needed):
                return
            idle = [each for each in there if not each.running and not each.pinned]
            if not idle:
                raise ExpertBusyError(
                    f"no room for expert {entry.name!r}: it needs {needed:,} bytes, and {len(there)} experts that are "
                    f"in use or pinned hold {held:,}; raise max_resident or max_resident_bytes"
                )
            min(idle, key=lambda each: each.used).resident = None

    def _trim_cache(self) -> None:
        """Drop copies in host memory that have files to come back from, the least recently used first."""
        while True:
            there = [each for each in self._entries.values() if each.cached is not None]
            if self._cached.holds(len(there), sum(each.cached.nbytes for each in there if each.cached is not None)):
                return
            spare = [each for each in there if not isinstance(each.source, ExpertDelta)]
            if not spare:
                return
            min(spare, key=lambda each: each.used).cached = None


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Sizes and times of a delta's files."""
    files = sorted(p for p in folder.iterdir() if p.name == MANIFEST or p.name.startswith("delta_model"))
    return tuple((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files)


def _read(entry: Entry) -> ExpertDelta:
    assert isinstance(entry.source, Path)  # a delta given as an object stays cached
    if not entry.source.is_dir() or _stamp(entry.source) != entry.stamp:
        raise DeltaFormatError(f"the files of expert {entry.name!r} changed since it was registered; load it again")
    return ExpertDelta.from_pretrained(entry.source)
