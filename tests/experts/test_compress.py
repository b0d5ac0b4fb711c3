"""From two models to a delta: exactness, calibration, outliers, distillation, and what is stored complete."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build
from torch import nn
from tuned_models import IDS, logits, tuned

from tersor.experts.calibration import input_energy
from tersor.experts.compress import compress_expert, compress_linear
from tersor.experts.config import ConfigMismatchError, DeltaConfig
from tersor.experts.distill import closed_form_step
from tersor.experts.host import merge_expert

FEW = "ignore:only .* calibration tokens"
BLIND = "ignore:no calibration data"
pytestmark = [pytest.mark.filterwarnings(FEW), pytest.mark.filterwarnings(BLIND)]
ALL = {"num_salient": 1.0, "salient_dtype": "float32"}


@pytest.fixture(scope="module")
def base() -> Any:
    return build("llama")


@pytest.fixture(scope="module")
def expert(base: Any) -> Any:
    return tuned(base, 1)


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


def test_padding_changes_nothing(base: Any, expert: Any) -> None:
    """Padding within a batch: its tokens, whatever they are, count for nothing."""
    names = list(compress_expert(base, expert, calibration=IDS).manifest.modules)
    plain, tokens = input_energy(expert, names, [(IDS, torch.ones_like(IDS))])
    wide = torch.cat([IDS, torch.full_like(IDS, 5)], dim=1)
    mask = torch.cat([torch.ones_like(IDS), torch.zeros_like(IDS)], dim=1)
    padded, counted = input_energy(expert, names, [(wide, mask)])
    assert tokens == counted == IDS.numel()
    for name in names:
        assert torch.allclose(plain[name], padded[name], rtol=1e-5)
        delta = expert.get_submodule(name).weight.detach() - base.get_submodule(name).weight.detach()
        one = compress_linear(delta, DeltaConfig(), plain[name], name=name)
        other = compress_linear(delta, DeltaConfig(), padded[name], name=name)
        assert one[0] == other[0]
        assert all(torch.equal(one[1][part], other[1][part]) for part in one[1])


def test_energies_are_those_of_the_inputs(expert: Any) -> None:
    seen = []
    name = "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        handle = expert.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        expert(input_ids=IDS)
        handle.remove()
    found, _ = input_energy(expert, [name], [(IDS[:3], torch.ones_like(IDS[:3])), (IDS[3:], torch.ones_like(IDS[3:]))])
    assert torch.allclose(found[name], seen[0].double().square().sum((0, 1)), rtol=1e-5)
    assert not expert.get_submodule(name)._forward_pre_hooks


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


def held_out_loss(base: Any, expert: Any, delta: Any) -> float:
    return float((logits(merge_expert(base, delta)) - logits(expert)).square().mean())


@pytest.mark.parametrize("grid", ["signed", "midrise"])
def test_distillation_helps_and_changes_steps_only(base: Any, expert: Any, grid: str) -> None:
    text = torch.randint(2, 190, (32, 32), generator=torch.Generator().manual_seed(5))
    plain = compress_expert(base, expert, DeltaConfig(grid=grid, step_init="lsq"), calibration=text)
    for kind in ("codes", "closed_form"):
        config = DeltaConfig(grid=grid, step_init="lsq", distill=kind, distill_steps=30)
        better = compress_expert(base, expert, config, calibration=text)
        assert held_out_loss(base, expert, better) < held_out_loss(base, expert, plain)
        changed = {
            name.rpartition(".")[2] for name, t in better.tensors.items() if not torch.equal(t, plain.tensors[name])
        }
        # On the mid-rise grid a salient channel's code stands for half a step, which its residual takes back.
        assert changed == ({"step"} if grid == "signed" else {"step", "salient_weight"})


def test_distillation_never_makes_it_worse(base: Any, expert: Any) -> None:
    wild = DeltaConfig(distill="codes", distill_rate=0.99, distill_steps=3)
    plain = compress_expert(base, expert, DeltaConfig(), calibration=IDS)
    delta = compress_expert(base, expert, wild, calibration=IDS)
    held = IDS[:1]  # a quarter of one batch, which the loss is checked on
    errors = [
        float((logits(merge_expert(base, d), held) - logits(expert, held)).square().mean()) for d in (plain, delta)
    ]
    assert errors[1] <= errors[0] * (1 + 1e-3)


def test_the_closed_form_is_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    x, delta = torch.randn(50, 12, generator=generator), torch.randn(5, 12, generator=generator)
    v = delta.sign() + 0.5
    step = closed_form_step(delta, v, x.T @ x, torch.ones(5))
    for row in range(5):
        solved = torch.linalg.lstsq((x @ v[row])[:, None], (x @ delta[row])[:, None]).solution
        assert float(step[row]) == pytest.approx(float(solved), rel=1e-4)
    assert torch.equal(closed_form_step(delta, torch.zeros_like(v), x.T @ x, torch.ones(5)), torch.ones(5))


def test_unfinished_work_is_taken_up_again(base: Any, expert: Any, tmp_path: Path) -> None:
    work, seen = tmp_path / "work", []

    def stop(doing: str) -> None:
        seen.append(doing)
        if len(seen) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_expert(base, expert, work=work, say=stop)
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

    resumed = compress_expert(base, expert, work=work, say=look)
    plain = compress_expert(base, expert)
    assert all(torch.equal(t, plain.tensors[name]) for name, t in resumed.tensors.items())
    assert not work.exists()


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


def test_models_that_do_not_belong_together(base: Any) -> None:
    other = build("mistral")
    with pytest.raises(ConfigMismatchError, match="differ in"):
        compress_expert(base, other)
    config = copy.deepcopy(base.config)
    config.intermediate_size = 64
    with pytest.raises(ConfigMismatchError, match="intermediate_size"):
        compress_expert(base, type(base)(config))
    broken = tuned(base, 1)
    with torch.no_grad():
        broken.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj\.weight .*NaN"):
        compress_expert(base, broken)
    with pytest.raises(ValueError, match="needs calibration"):
        compress_expert(base, base, DeltaConfig(distill="codes"))
    with pytest.raises(ValueError, match="list of decoder layers"):
        compress_expert(Plain(base.config), Plain(base.config))


class Plain(nn.Module):
    """A model without decoder layers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(4, 4)


def test_folders_give_what_models_give(base: Any, expert: Any, tmp_path: Path) -> None:
    base.save_pretrained(tmp_path / "base")
    expert.save_pretrained(tmp_path / "expert")
    plain = compress_expert(base, expert, calibration=IDS)
    read = compress_expert(tmp_path / "base", tmp_path / "expert", calibration=IDS)
    assert read.manifest.base_fingerprint == plain.manifest.base_fingerprint
    assert all(torch.equal(t, read.tensors[name]) for name, t in plain.tensors.items())
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="merge it first"):
        compress_expert(tmp_path / "base", tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"no config\.json"):
        compress_expert(tmp_path / "base", tmp_path)
    half = tmp_path / "expert" / "model.safetensors"
    half.write_bytes(half.read_bytes()[:5000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        compress_expert(tmp_path / "base", tmp_path / "expert")


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
