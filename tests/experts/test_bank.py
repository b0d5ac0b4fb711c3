"""Experts on disk, in memory and on the device: budgets, files that change, threads."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build
from tuned_models import NAMES, logits

from tersor.experts.config import (
    DeltaFormatError,
    ExpertBusyError,
    UnknownExpertError,
)
from tersor.experts.delta import MANIFEST, ExpertDelta
from tersor.experts.host import ExpertHost

pytestmark = pytest.mark.filterwarnings("ignore:no calibration data")


def test_the_least_recently_used_goes_first(deltas: dict[str, ExpertDelta], tmp_path: Path) -> None:
    host = ExpertHost(build("llama"), max_resident=2, max_cpu=2)
    for name, delta in deltas.items():
        delta.save_pretrained(tmp_path / name)
        host.load_expert(name, tmp_path / name)
    assert set(host.list_experts().values()) == {"disk"}
    for name in ("math", "code", "math", "chat"):
        host.set_expert(name)
    assert host.list_experts() == {"math": "device", "code": "disk", "chat": "device"}
    host.pin("math")
    for name in ("code", "chat", "code"):
        host.set_expert(name)
    assert host.list_experts()["math"] == "device"
    host.pin("code")
    with pytest.raises(ExpertBusyError, match="no room for expert 'chat'"):
        host.set_expert("chat")
    with host.use("code") as model:
        assert torch.isfinite(logits(model)).all(), "the one that was set goes on"
    host.pin("math", pinned=False)
    host.set_expert("chat")
    assert host.list_experts()["math"] != "device"


def test_one_place_is_enough_to_switch(deltas: dict[str, ExpertDelta], merged: dict[str | None, Any]) -> None:
    host = ExpertHost(build("llama"), max_resident=1)
    for name in NAMES:
        host.load_expert(name, deltas[name])
    for name in (*NAMES, *NAMES):
        host.set_expert(name)
        assert [each for each, tier in host.list_experts().items() if tier == "device"] == [name]
    with pytest.raises(UnknownExpertError):
        host.set_expert("maths")
    assert torch.allclose(logits(host.model), logits(merged["chat"]), atol=1e-3)
    with pytest.raises(ExpertBusyError):
        host.unload_expert("chat")


def test_budgets_in_bytes(deltas: dict[str, ExpertDelta]) -> None:
    most = max(delta.nbytes for delta in deltas.values())
    host = ExpertHost(build("llama"), max_resident_bytes=most)
    for name, delta in deltas.items():
        host.load_expert(name, delta)
        host.set_expert(None)
        host.set_expert(name)
        assert sum(tier == "device" for tier in host.list_experts().values()) == 1
        host.disable_experts()
    small = ExpertHost(build("llama"), max_resident_bytes=100)
    small.load_expert("math", deltas["math"])
    with pytest.raises(ExpertBusyError, match="max_resident_bytes"):
        small.set_expert("math")
    for wrong in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="at least 1"):
            ExpertHost(build("llama"), max_resident=wrong)


def test_files_that_changed_are_refused_and_a_reload_is_a_new_generation(
    deltas: dict[str, ExpertDelta], merged: dict[str | None, Any], tmp_path: Path
) -> None:
    deltas["math"].save_pretrained(tmp_path / "x")
    host = ExpertHost(build("llama"))
    host.load_expert("x", tmp_path / "x")
    first = host.generation("x")
    manifest = json.loads((tmp_path / "x" / MANIFEST).read_text())
    (tmp_path / "x" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DeltaFormatError, match="changed since"):
        host.set_expert("x")
    host.unload_expert("x")
    deltas["chat"].save_pretrained(tmp_path / "x")
    host.load_expert("x", tmp_path / "x")
    assert host.generation("x") != first
    with host.use("x") as model:
        assert torch.allclose(logits(model), logits(merged["chat"]), atol=1e-4)


def test_two_threads_that_want_one_expert_share_one_load(
    deltas: dict[str, ExpertDelta], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deltas["math"].save_pretrained(tmp_path / "math")
    host = ExpertHost(build("llama"))
    host.load_expert("math", tmp_path / "math")
    reads, start = [], threading.Barrier(4)
    original = ExpertDelta.from_pretrained
    monkeypatch.setattr(ExpertDelta, "from_pretrained", lambda folder: reads.append(folder) or original(folder))
    found = []

    def want() -> None:
        start.wait()
        found.append(host._bank.acquire("math"))

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1
    assert len(found) == 4
    assert all(each is found[0] for each in found)


def test_a_copy_to_the_device_holds_nobody_else_up(
    deltas: dict[str, ExpertDelta], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one expert is on its way, others are released and held, and what it will take is counted already."""
    host = ExpertHost(build("llama"), max_resident=2)
    for name in NAMES:
        host.load_expert(name, deltas[name])
    host.hold(NAMES[0])
    begun, go_on, place = threading.Event(), threading.Event(), host._bank._place

    def slow(delta: ExpertDelta) -> Any:
        begun.set()
        assert go_on.wait(20)
        return place(delta)

    monkeypatch.setattr(host._bank, "_place", slow)
    loading = threading.Thread(target=host.hold, args=(NAMES[1],))
    loading.start()
    assert begun.wait(20)
    host.hold(NAMES[0])
    host.release(NAMES[0])
    with pytest.raises(ExpertBusyError, match="no room"):
        host.hold(NAMES[2])
    go_on.set()
    loading.join(20)
    assert host.list_experts()[NAMES[1]] == "device"
    for name in NAMES[:2]:
        host.release(name)
