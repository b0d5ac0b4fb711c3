"""Experts on a base: exact answers by row, switching that leaves the base alone, residency, memory and merging."""

from __future__ import annotations

import copy
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build
from tuned_models import IDS, NAMES, logits, tuned, weights_hash

from tersor.experts.config import (
    BaseMismatchError,
    ConfigMismatchError,
    ExpertBusyError,
    UnknownExpertError,
)
from tersor.experts.delta import ExpertDelta
from tersor.experts.host import ExpertHost

pytestmark = pytest.mark.filterwarnings("ignore:no calibration data")


def test_each_expert_answers_as_its_merged_model(host: ExpertHost, merged: dict[str | None, Any]) -> None:
    for name in (*NAMES, None):
        with host.use(name) as model:
            found = logits(model)
        wanted = logits(merged[name])
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    assert not torch.allclose(logits(merged["math"]), logits(merged[None]), atol=0.1)


def test_rows_of_a_batch_are_each_their_own_expert(host: ExpertHost, merged: dict[str | None, Any]) -> None:
    rng = random.Random(0)
    for _ in range(12):
        rows = rng.choices([*NAMES, None], k=rng.randint(1, 6))
        ids = IDS[[rng.randrange(4) for _ in rows]]
        with host.use(rows) as model:
            found = logits(model, ids)
        for row, name in enumerate(rows):
            wanted = logits(merged[name], ids[row : row + 1])[0]
            assert torch.allclose(found[row], wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


def test_one_prompt_for_all_experts_under_left_padding(host: ExpertHost, merged: dict[str | None, Any]) -> None:
    rows = [*NAMES, None]
    prompt = torch.cat([torch.zeros(4, 3, dtype=torch.int64), IDS[:1].expand(4, -1)], dim=1)
    mask = (torch.arange(27) >= 3).long().expand(4, -1)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found = host.generate(input_ids=prompt, attention_mask=mask, expert_names=rows, **kwargs)
    answers = []
    for row, name in enumerate(rows):
        alone = merged[name].generate(input_ids=IDS[:1], attention_mask=torch.ones(1, 24).long(), **kwargs)
        assert found[row, 27:].tolist() == alone[0, 24:].tolist()
        answers.append(tuple(alone[0, 24:].tolist()))
    assert len(set(answers)) == 4, "experts must disagree, or nothing was shown"


def shuffle(host: ExpertHost, folders: dict[str, Path], steps: int, seed: int) -> None:
    """Random sets, loads, unloads and forwards, as a server might see them."""
    rng, current = random.Random(seed), None
    pinned: set[str | None] = set()
    for _ in range(steps):
        name = rng.choice(NAMES)
        action = rng.random()
        known = host.list_experts()
        if action < 0.7:
            wanted = rng.choice([*known, None])
            try:
                host.set_expert(wanted)
                current = wanted
            except ExpertBusyError:
                assert len(pinned) == 2, "only pinned experts may keep another one out"
                assert wanted not in pinned
        elif name not in known:
            pin = rng.random() < 0.2
            try:
                host.load_expert(name, folders[name], pin=pin)
                pinned |= {name} if pin else set()
            except ExpertBusyError:
                assert pin
                assert len((pinned | {current}) - {None}) == 2
        elif name == current:
            with pytest.raises(ExpertBusyError):
                host.unload_expert(name)
            assert host.list_experts()[name] == "device"
        else:
            host.unload_expert(name)
            pinned -= {name}
        if action < 0.01:
            host.model(input_ids=IDS[:1, :4])
    host.disable_experts()


def check_switching(deltas: dict[str, ExpertDelta], tmp_path: Path, steps: int) -> None:
    for name, delta in deltas.items():
        delta.save_pretrained(tmp_path / name)
    model = build("llama")
    before, own = weights_hash(model), logits(model)
    host = ExpertHost(model, max_resident=2, max_cpu=2)
    start = host.memory_report().total
    with torch.no_grad():
        shuffle(host, {name: tmp_path / name for name in NAMES}, steps, seed=1)
    assert weights_hash(model) == before
    assert torch.equal(logits(model), own)
    for name in list(host.list_experts()):
        host.unload_expert(name)
    assert host.memory_report().total == start
    host.close()
    assert torch.equal(logits(model), own)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_switching_leaves_the_base_bit_for_bit(deltas: dict[str, ExpertDelta], tmp_path: Path) -> None:
    check_switching(deltas, tmp_path, steps=400)


@pytest.mark.slow
def test_ten_thousand_switches(deltas: dict[str, ExpertDelta], tmp_path: Path) -> None:
    check_switching(deltas, tmp_path, steps=10_000)


def test_the_report_is_the_sum_of_live_tensors(deltas: dict[str, ExpertDelta]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base = build("llama", dtype=dtype)
        host = ExpertHost(base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, delta in deltas.items():
                host.load_expert(name, delta, pin=True, allow_mismatch=True)
        live = {t.data_ptr(): t.nbytes for t in (*base.parameters(), *base.buffers())}
        for entry in host._bank.entries():
            assert entry.resident is not None
            live |= {t.data_ptr(): t.nbytes for t in entry.resident.tensors()}
            for module in entry.resident.replaced.values():
                live |= {t.data_ptr(): t.nbytes for t in module.parameters(recurse=False)}
        report = host.memory_report()
        assert report.total == sum(live.values())
        assert report.experts["math"]["codes"] == deltas["math"].bytes_by_part()["codes"]
        assert (report.experts["math"]["derived"] > 0) == (dtype == torch.bfloat16)
        assert set(report.tiers.values()) == {"device"}


def test_merging_leaves_the_base_alone_and_repeats(
    host: ExpertHost, merged: dict[str | None, Any], tmp_path: Path
) -> None:
    before = weights_hash(host.model)
    with host.use("code"):
        first, second = host.merge("math"), host.merge("math")
    assert weights_hash(first) == weights_hash(second) == weights_hash(merged["math"])
    assert weights_hash(host.model) == before
    first.save_pretrained(tmp_path)
    read = type(first).from_pretrained(tmp_path)
    assert torch.equal(logits(read), logits(merged["math"]))
    host.model.save_pretrained(tmp_path / "base")
    assert torch.equal(logits(type(first).from_pretrained(tmp_path / "base")), logits(merged[None]))


def test_names_and_rows_that_do_not_fit(host: ExpertHost, deltas: dict[str, ExpertDelta]) -> None:
    with pytest.raises(UnknownExpertError, match=r"'maths' is not registered; known are \['math'"):
        host.set_expert("maths")
    with pytest.raises(ValueError, match="registered already"):
        host.load_expert("math", deltas["math"])
    for wrong in ("../x", "", "a/b", ".hidden", "a" * 200):
        with pytest.raises(ValueError, match="is not possible"):
            host.load_expert(wrong, deltas["math"])
    with pytest.raises(ValueError, match="2 expert names for 4 rows"):
        host.generate(input_ids=IDS, expert_names=["math", None], max_new_tokens=1)
    with pytest.raises(ValueError, match="is empty"), host.use([]):
        pass
    with pytest.raises(ValueError, match="3 rows"), host.use(["math", None]) as model:
        logits(model, IDS[:3])
    with pytest.raises(NotImplementedError, match="prompt_lookup"):
        host.generate(input_ids=IDS, expert_names="math", prompt_lookup_num_tokens=3)
    assert host.list_experts().keys() == set(NAMES)


def test_after_an_error_the_base_answers(host: ExpertHost, merged: dict[str | None, Any]) -> None:
    with pytest.raises(RuntimeError, match="stop"), host.use("math"):
        raise RuntimeError("stop")
    assert torch.equal(logits(host.model), logits(merged[None]))
    host.unload_expert("math")


def test_another_base_is_refused(deltas: dict[str, ExpertDelta], tmp_path: Path) -> None:
    other = ExpertHost(tuned(build("llama"), 9))
    with pytest.raises(BaseMismatchError, match="this base is another one"):
        other.load_expert("math", deltas["math"])
    with pytest.warns(UserWarning, match="will differ"):
        other.load_expert("math", deltas["math"], allow_mismatch=True)
    config = copy.deepcopy(build("llama").config)
    config.intermediate_size = 64
    shaped = ExpertHost(type(other.model)(config))
    with pytest.raises(ConfigMismatchError, match="gate_proj"):
        shaped.load_expert("math", deltas["math"])
    assert shaped.list_experts() == {}
    host = ExpertHost(build("llama"))
    broken = copy.deepcopy(deltas["math"])
    broken.tensors["model.norm.weight"] = torch.ones(7, 3)
    with pytest.raises(ConfigMismatchError, match=r"replaces weight \[32\]"):
        host.load_expert("math", broken, pin=True)
    assert host.list_experts() == {}
