"""The control branch: its sizes, how its residuals are added, and the authors' configuration."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from drag_models import branch, unet
from torch import Tensor

from tersor._errors import TersorError
from tersor.drag.controlnet import OFFICIAL_CLASS, SpatioTemporalControlNetModel, accumulated
from tersor.drag.injection import injected

#: How often the authors' UNet adds each residual, by hand: 4 blocks of 2 resnets.
OFFICIAL = (4, 4, 4, 4, 3, 3, 3, 2, 2, 2, 1, 1)


def inputs(batch: int = 2, frames: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    return {
        "sample": torch.randn(batch, frames, 8, 16, 16, generator=generator), "timestep": torch.tensor(0.3),
        "encoder_hidden_states": torch.randn(batch, 1, 32, generator=generator),
        "added_time_ids": torch.tensor([[6.0, 128.0, 0.02]]).repeat(batch, 1),
    }  # fmt: skip


def maps(batch: int = 2, frames: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        "controlnet_cond": torch.rand(batch, frames, 3, 32, 32, generator=generator),
        "entity_cond": torch.rand(batch, frames, 6, 32, 32, generator=generator),
    }


def loop(of: Any, down: tuple[Tensor, ...], mid: Tensor, *, repeatedly: bool = False, **given: Any) -> Tensor:
    """The UNet's forward written down, with residuals added to skips; ``repeatedly`` after every down block."""
    batch, frames = given["sample"].shape[:2]
    emb = of.time_embedding(of.time_proj(given["timestep"].expand(batch)))
    emb = emb + of.add_embedding(of.add_time_proj(given["added_time_ids"].flatten()).reshape(batch, -1))
    shared = {"temb": emb.repeat_interleave(frames, 0), "image_only_indicator": torch.zeros(batch, frames)}
    told = given["encoder_hidden_states"].repeat_interleave(frames, 0)
    hidden = of.conv_in(given["sample"].flatten(0, 1))
    skips = [hidden]
    for block in of.down_blocks:
        crossing = {"encoder_hidden_states": told} if getattr(block, "has_cross_attention", False) else {}
        hidden, found = block(hidden_states=hidden, **crossing, **shared)
        skips += found
        if repeatedly:
            skips = [skip + own for skip, own in zip(skips, down, strict=False)]
    if not repeatedly:
        skips = [skip + own for skip, own in zip(skips, down, strict=True)]
    hidden = of.mid_block(hidden_states=hidden, encoder_hidden_states=told, **shared) + mid
    for block in of.up_blocks:
        count = len(block.resnets)
        own, skips = tuple(skips[-count:]), skips[:-count]
        crossing = {"encoder_hidden_states": told} if getattr(block, "has_cross_attention", False) else {}
        hidden = block(hidden_states=hidden, res_hidden_states_tuple=own, **crossing, **shared)
    out = of.conv_out(of.conv_act(of.conv_norm_out(hidden)))
    return out.unflatten(0, (batch, frames))


@pytest.fixture(scope="module")
def net():
    return unet()


def test_the_published_size() -> None:
    with torch.device("meta"):
        state = SpatioTemporalControlNetModel().state_dict()
    assert len(state) == 685 and sum(each.numel() for each in state.values()) == 684_999_873


def test_the_authors_factors() -> None:
    assert accumulated([2, 2, 2, 2]) == OFFICIAL
    assert accumulated([2, 2]) == (2, 2, 2, 2, 1, 1)


@torch.no_grad()
def test_hooks_add_residuals_as_a_loop_written_down_does(net) -> None:
    own, given = branch(net, seed=5), inputs()
    found = own(**given, **maps())
    down, mid = found.down_block_res_samples, found.mid_block_res_sample
    with injected(net, lambda *args, **keywords: (down, mid)):
        hooked = net(**given).sample
    torch.testing.assert_close(hooked, loop(net, down, mid, **given), atol=1e-5, rtol=1e-5)
    assert (hooked - net(**given).sample).abs().max() > 1e-3


@torch.no_grad()
def test_factors_are_the_authors_adding_again_and_again_and_may_be_folded(net) -> None:
    """Their UNet adds what is known after each block; ours once, by a factor or by folded weights."""
    once, given = branch(net, seed=5), inputs()
    factors = accumulated([2, 2])
    own = branch(net, seed=5, residual_multipliers=factors)
    plain, scaled = once(**given, **maps()), own(**given, **maps())
    theirs = loop(net, plain.down_block_res_samples, plain.mid_block_res_sample, repeatedly=True, **given)
    with injected(net, lambda *args, **keywords: (scaled.down_block_res_samples, scaled.mid_block_res_sample)):
        ours = net(**given).sample
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    folded = branch(net, seed=5)
    for conv, factor in zip(folded.controlnet_down_blocks, factors, strict=True):
        conv.weight *= factor
        conv.bias *= factor
    again = folded(**given, **maps())
    for one, other in zip(again.down_block_res_samples, scaled.down_block_res_samples, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_an_encoded_condition_gives_the_same_bits(net) -> None:
    own, given, made = branch(net, seed=5), inputs(), maps()
    encoded = own.encode_condition(made["controlnet_cond"].flatten(0, 1), made["entity_cond"].flatten(0, 1))
    whole, cached = own(**given, **made), own(**given, cond_embedding=encoded.unflatten(0, (2, 3)))
    assert torch.equal(whole.mid_block_res_sample, cached.mid_block_res_sample)
    half = own(**given, **made, conditioning_scale=0.5, return_dict=False)
    torch.testing.assert_close(2 * half[1], whole.mid_block_res_sample)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_of_the_branch_learns_and_none_of_the_unet(checkpointing) -> None:
    net = unet().requires_grad_(False).train()
    own = branch(net, seed=5).train()
    if checkpointing:
        net.enable_gradient_checkpointing()
        own.enable_gradient_checkpointing()
    given = inputs(1, 2)
    with injected(net, lambda *args, **keywords: own(**given, **maps(1, 2), return_dict=False)):
        net(**given).sample.square().mean().backward()
    missing = [name for name, each in own.named_parameters() if each.grad is None or not each.grad.abs().sum() > 0]
    assert not missing
    assert all(each.grad is None for each in net.parameters())


def test_a_saved_branch_comes_back_and_the_authors_configuration_is_known(net, tmp_path) -> None:
    own = branch(net, seed=5, entity_features={"kind": "vae", "name": "x", "channels": 12})
    own.save_pretrained(tmp_path)
    again = SpatioTemporalControlNetModel.from_pretrained(tmp_path)
    with torch.no_grad():
        one, other = (each(**inputs(), **maps()).mid_block_res_sample for each in (own, again))
    assert torch.equal(one, other) and again.config.entity_features == own.config.entity_features
    assert again.config.residual_multipliers is None and again.config.map_mode == "exact"
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    values["_class_name"] = OFFICIAL_CLASS
    del values["residual_multipliers"], values["map_mode"]
    file.write_text(json.dumps(values))
    official = SpatioTemporalControlNetModel.from_pretrained(tmp_path)
    assert tuple(official.config.residual_multipliers) == accumulated([2, 2])
    assert official.config.map_mode == "official"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entity_embedding_out_channels": (6, 8, 8)}, "must halve as often"),
        ({"residual_multipliers": (1.0, 2.0)}, "2 factors for 6 skips"),
    ],
)
def test_parts_that_do_not_fit_are_refused(net, changes, message) -> None:
    with pytest.raises(TersorError, match=message):
        branch(net, **changes)


def test_maps_of_another_branch_are_refused(net) -> None:
    own, made = branch(net), maps(1, 1)
    near, what = made["controlnet_cond"][0], made["entity_cond"][0]
    for one, other in ((near, None), (near, what[:, :5]), (near[:, :2], what)):
        with pytest.raises(TersorError, match="this branch takes maps of 3"):
            own.encode_condition(one, other)
    with pytest.raises(TersorError, match="takes maps of 3 and of no channels"):
        branch(net, entity_embedding_out_channels=()).encode_condition(near, what)
    with pytest.raises(TersorError, match="give controlnet_cond, or cond_embedding"):
        own(**inputs())
