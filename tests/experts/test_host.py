"""Experts on a base: exact answers by row, switching that leaves the base alone, residency, memory and merging."""

from __future__ import annotations

import copy
import json
import random
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build
from tuned_models import IDS, logits, tuned, weights_hash

from tersor.experts.compress import compress_expert
from tersor.experts.config import (
    BaseMismatchError,
    ConfigMismatchError,
    DeltaConfig,
    DeltaFormatError,
    ExpertBusyError,
    UnknownExpertError,
)
from tersor.experts.delta import MANIFEST, ExpertDelta
from tersor.experts.host import ExpertHost, merge_expert

pytestmark = pytest.mark.filterwarnings("ignore:no calibration data")
NAMES = ("math", "code", "chat")


@pytest.fixture(scope="module")
def deltas() -> dict[str, ExpertDelta]:
    base = build("llama")
    return {
        name: compress_expert(base, tuned(base, seed), DeltaConfig(bits=bits, grid=grid, num_salient=2))
        for seed, (name, bits, grid) in enumerate(zip(NAMES, (2, 1, 4), ("signed", "signed", "midrise"), strict=True))
    }


@pytest.fixture(scope="module")
def merged(deltas: dict[str, ExpertDelta]) -> dict[str | None, Any]:
    base = build("llama")
    return {None: base} | {name: merge_expert(base, delta) for name, delta in deltas.items()}


@pytest.fixture
def host(deltas: dict[str, ExpertDelta]) -> ExpertHost:
    host = ExpertHost(build("llama"))
    for name, delta in deltas.items():
        host.load_expert(name, delta)
    return host


def test_each_expert_answers_as_its_merged_model(host: ExpertHost, merged: dict[str | None, Any]) -> None:
    for name in (*NAMES, None):
        with host.use(name) as model:
            found = logits(model)
        wanted = logits(merged[name])
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    assert not torch.allclose(logits(merged["math"]), logits(merged[None]), atol=0.1)


@pytest.mark.parametrize("name", ["qwen2", "phi", "mistral", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_class_and_precision(name: str, dtype: torch.dtype) -> None:
    """Biases, normed queries, fused and other names of linears; one row the base's, two of two experts."""
    base = build(name, dtype=dtype)
    host = ExpertHost(base)
    wanted = [logits(base)[:1]]
    for seed in (1, 2):
        delta = compress_expert(base, tuned(base, seed), DeltaConfig(num_salient=3))
        wanted.append(logits(merge_expert(base, delta))[seed : seed + 1])
        host.load_expert(f"e{seed}", delta)
    with host.use([None, "e1", "e2"]) as model:
        found = logits(model, IDS[:3])
    wanted_all = torch.cat(wanted)
    error = (found - wanted_all).float().norm() / wanted_all.float().norm()
    assert float(error) < (1e-5 if dtype == torch.float32 else 4e-2)


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


def test_beams_and_returned_sequences_stay_with_their_row(host: ExpertHost, merged: dict[str | None, Any]) -> None:
    rows = ["math", None, "chat"]
    mask = torch.ones_like(IDS[:3])
    kwargs = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "num_return_sequences": 2, "pad_token_id": 0}
    found = host.generate(input_ids=IDS[:3], attention_mask=mask, expert_names=rows, **kwargs)
    for row, name in enumerate(rows):
        alone = merged[name].generate(input_ids=IDS[row : row + 1], attention_mask=mask[:1], **kwargs)
        assert found[2 * row : 2 * row + 2].tolist() == alone.tolist()


def test_an_expert_whose_final_norm_alone_differs_switches(merged: dict[str | None, Any]) -> None:
    base = build("llama")
    expert = tuned(base, 5, only="model.norm", size=1.0)
    delta = compress_expert(base, expert)
    assert delta.manifest.full == ["model.norm.weight"]
    host = ExpertHost(base)
    host.load_expert("norm", delta)
    with host.use(["norm", None]) as model:
        found = logits(model, IDS[:2])
    assert torch.allclose(found[0], logits(expert)[0], atol=1e-5)
    assert torch.allclose(found[1], logits(merged[None])[1], atol=1e-5)


def test_vocabularies_of_two_sizes_in_one_batch() -> None:
    base = build("llama")
    expert = tuned(base, 3)
    expert.resize_token_embeddings(203, mean_resizing=False)
    host = ExpertHost(base)
    host.load_expert("more", compress_expert(base, expert, DeltaConfig(num_salient=1.0, salient_dtype="float32")))
    ids = IDS[:2].clone()
    ids[0, 3] = 201
    with host.use(["more", None]) as model:
        found = logits(model, ids)
    assert found.shape[-1] == 203
    assert torch.allclose(found[0], logits(expert, ids[:1])[0], atol=1e-3)
    assert bool((found[1, :, 199:] == -torch.inf).all())


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


def test_gradients_reach_the_inputs_through_a_delta(host: ExpertHost, merged: dict[str | None, Any]) -> None:
    embedded = merged["math"].get_input_embeddings()(IDS[:1]).detach().requires_grad_()
    other = embedded.detach().clone().requires_grad_()
    with host.use("math") as model:
        model(inputs_embeds=embedded).logits.square().sum().backward()
    merged["math"](inputs_embeds=other).logits.square().sum().backward()
    assert torch.allclose(embedded.grad, other.grad, rtol=1e-3, atol=1e-3 * float(other.grad.abs().max()))
