"""From two models to a delta: exactness, calibration, outliers, distillation, and what is stored complete."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build
from tuned_models import IDS, logits, tuned

from tersor.experts.compress import Job, compress_expert, compress_linear
from tersor.experts.config import DeltaConfig
from tersor.experts.host import merge_expert
from tersor.experts.sources import Source

FEW = "ignore:only .* calibration tokens"
BLIND = "ignore:no calibration data"
pytestmark = [pytest.mark.filterwarnings(FEW), pytest.mark.filterwarnings(BLIND)]
ALL = {"num_salient": 1.0, "salient_dtype": "float32"}


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-5), ("float16", 1e-3)])
@pytest.mark.parametrize("bits", [1, 2])
def test_with_all_channels_salient_the_expert_comes_back(
    base: Any, expert: Any, bits: int, dtype: str, error: float
) -> None:
    delta = compress_expert(base, expert, DeltaConfig(bits=bits, num_salient=1.0, salient_dtype=dtype))
    wanted = logits(expert)
    assert float((logits(merge_expert(base, delta)) - wanted).abs().max() / wanted.abs().max()) < error


def test_eight_bits_are_almost_exact(base: Any, expert: Any) -> None:
    delta = compress_expert(base, expert, DeltaConfig(bits=8, num_salient=0))
    assert max(linear.error for linear in delta.manifest.modules.values()) < 2e-2
    worse = compress_expert(base, expert, DeltaConfig(bits=2, num_salient=0))
    assert min(linear.error for linear in worse.manifest.modules.values()) > 0.2
    name = next(iter(delta.manifest.modules))
    difference = expert.get_submodule(name).weight.detach() - base.get_submodule(name).weight.detach()
    found = float((delta.dense(name) - difference).norm() / difference.norm())
    assert delta.manifest.modules[name].error == pytest.approx(found, rel=1e-4)


def test_an_expert_that_is_the_base_stores_nothing(base: Any, tmp_path: Path) -> None:
    delta = compress_expert(base, copy.deepcopy(base))
    assert delta.nbytes == 0
    assert not delta.manifest.modules
    assert torch.equal(logits(merge_expert(base, delta)), logits(base))
    delta.save_pretrained(tmp_path / "same")
    assert sum(file.stat().st_size for file in (tmp_path / "same").iterdir()) < 20_000


def rescaled(model: Any, channels: dict[int, list[int]]) -> Any:
    """The same function with large activations: ``v`` to ``o`` and ``up`` to ``down`` of some channels times 16."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer, chosen in channels.items():
            mlp = model.model.layers[layer].mlp
            mlp.up_proj.weight[chosen] *= 16
            mlp.down_proj.weight[:, chosen] /= 16
    return model


def test_channels_that_only_activations_make_salient_are_found(base: Any) -> None:
    chosen = {0: [5, 31], 1: [2, 47]}
    plain = tuned(base, 1, only="down_proj")
    old, new = rescaled(base, chosen), rescaled(plain, chosen)
    assert torch.equal(logits(new), logits(plain))
    # Fine-tuning writes ordinary deltas into these columns; here the rescaled ones get them.
    with torch.no_grad():
        for layer, channels in chosen.items():
            one, other = (m.model.layers[layer].mlp.down_proj.weight for m in (old, new))
            other[:, channels] = one[:, channels] + 16 * (other[:, channels] - one[:, channels])
    wanted = {f"model.layers.{layer}.mlp.down_proj": channels for layer, channels in chosen.items()}
    for selection, found_all in (("reconstruction", True), ("magnitude", False)):
        config = DeltaConfig(num_salient=2, selection=selection)
        delta = compress_expert(old, new, config, calibration=IDS)
        found = [delta.packed(name).salient_index.tolist() == channels for name, channels in wanted.items()]
        assert all(found) == found_all, selection
    error = {}
    for k in (0, 2):
        merged = merge_expert(old, compress_expert(old, new, DeltaConfig(num_salient=k), calibration=IDS))
        error[k] = float((logits(merged) - logits(new)).square().mean())
    assert error[2] < 0.5 * error[0]


def test_dead_channels_are_never_salient() -> None:
    energy = torch.ones(20)
    energy[:15] = 0
    delta = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    linear, parts = compress_linear(delta, DeltaConfig(num_salient=8), energy, name="x")
    assert linear.salient == 5
    assert parts["salient_index"].tolist() == [15, 16, 17, 18, 19]


def test_a_huge_column_is_salient_and_not_its_victims() -> None:
    delta = 0.01 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    delta[:, 7] = 3.0
    _, parts = compress_linear(delta, DeltaConfig(num_salient=1, step_init="minmax"), None, name="x")
    assert parts["salient_index"].tolist() == [7]
    assert float(parts["step"].max()) < 0.1


def test_what_float16_cannot_hold_gets_another_dtype() -> None:
    delta = torch.full((4, 8), 0.1)
    delta[:, 2] = 1e6
    for k, dtype in ((8, "bfloat16"), (0, "float16")):
        linear, parts = compress_linear(delta, DeltaConfig(num_salient=k), None, name="x")
        assert linear.salient_dtype == dtype
        assert linear.error < 0.01
        assert all(bool(torch.isfinite(parts[part]).all()) for part in ("step", "salient_weight"))


def test_unfinished_work_is_taken_up_again(base: Any, expert: Any, tmp_path: Path) -> None:
    work, seen = tmp_path / "work", []

    def stop(doing: str) -> None:
        seen.append(doing)
        if len(seen) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_expert(base, expert, work=work, on_progress=stop)
    kept = sorted(work.glob("*.safetensors"))
    assert len(kept) == 5
    times = [file.stat().st_mtime_ns for file in kept]
    with pytest.raises(ValueError, match="another run"):
        compress_expert(base, expert, DeltaConfig(bits=4), work=work)
    with pytest.raises(ValueError, match="another run"):
        compress_expert(base, expert, calibration=IDS, work=work)

    def look(doing: str) -> None:
        if doing.endswith("(6 of 14)"):
            assert [file.stat().st_mtime_ns for file in kept] == times

    resumed = compress_expert(base, expert, work=work, on_progress=look)
    plain = compress_expert(base, expert)
    assert all(torch.equal(t, plain.tensors[name]) for name, t in resumed.tensors.items())
    assert len(list(work.glob("*.safetensors"))) == 14, "the delta is saved nowhere yet"


@pytest.mark.parametrize("name", ["qwen2", "phi"])
def test_biases_travel(name: str) -> None:
    base = build(name)
    expert = tuned(base, 2)
    delta = compress_expert(base, expert, DeltaConfig(**ALL))
    assert any(full.endswith(".bias") for full in delta.manifest.full)
    wanted = logits(expert)
    assert torch.allclose(logits(merge_expert(base, delta)), wanted, atol=1e-4 * float(wanted.abs().max()))


def test_vocabulary_of_another_size(base: Any) -> None:
    expert = tuned(base, 3)
    expert.resize_token_embeddings(203, mean_resizing=False)
    delta = compress_expert(base, expert, DeltaConfig(**ALL))
    merged = merge_expert(base, delta)
    assert logits(merged).shape[-1] == 203
    assert torch.allclose(logits(merged), logits(expert), atol=1e-3)


@pytest.mark.parametrize(("tie_base", "tie_expert"), [(True, True), (True, False), (False, True)])
def test_tied_and_untied_heads(base: Any, tie_base: bool, tie_expert: bool) -> None:
    def model(tie: bool, seed: int) -> Any:
        config = copy.deepcopy(base.config)
        config.tie_word_embeddings = tie
        torch.manual_seed(seed)
        made = type(base)(config).eval()
        made.model.load_state_dict(base.model.state_dict())
        return made

    old, new = model(tie_base, 1), tuned(model(tie_expert, 2), 4, only="layers")
    merged = merge_expert(old, compress_expert(old, new, DeltaConfig(**ALL)))
    assert torch.allclose(logits(merged), logits(new), atol=1e-4)


def test_few_tokens_and_none_are_said(base: Any, expert: Any) -> None:
    with pytest.warns(UserWarning, match="only 96 calibration tokens"):
        compress_expert(base, expert, calibration=IDS)
    with pytest.warns(UserWarning, match="by weights alone"):
        compress_expert(base, expert)
    with pytest.raises(ValueError, match="holds no token"):
        compress_expert(base, expert, calibration=[])
    with pytest.raises(ValueError, match="tokenizer"):
        compress_expert(base, expert, calibration=["some text"])
    with pytest.warns(UserWarning, match=r"torch\.float32 and torch\.bfloat16"):
        compress_expert(base, tuned(base, 1).bfloat16(), DeltaConfig(num_salient=0))


@pytest.mark.parametrize("broken", ["base", "expert"])
def test_each_tensor_is_read_once_before_the_work_and_a_broken_one_is_found(
    base: Any, expert: Any, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    read: Counter[tuple[Source, str]] = Counter()
    honest = Source.find

    def find(self: Source, name: str) -> torch.Tensor:
        read[self, name] += 1
        return honest(self, name)

    monkeypatch.setattr(Source, "find", find)
    models = {"base": copy.deepcopy(base), "expert": copy.deepcopy(expert)}
    with Job.of(models["base"], models["expert"], None, calibration=None):
        assert set(read.values()) == {1} and len(read) >= len(base.state_dict())
    with torch.no_grad():
        models[broken].model.norm.weight[3] = torch.nan
    with (
        pytest.raises(ValueError, match=r"norm\.weight of .* holds NaN"),
        Job.of(models["base"], models["expert"], None, calibration=None),
    ):
        pytest.fail("the work began")
