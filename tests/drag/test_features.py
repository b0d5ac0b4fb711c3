"""Entity features: pooled under masks, from real classes of tiny sizes, and known by what made them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from drag_models import square
from transformers import CLIPTextConfig, CLIPTextModel, Dinov2Config, Dinov2Model

from tersor._errors import TersorError
from tersor.drag.features import DiffusionFeatures, DinoFeatures, VaeFeatures, check_record, entity_features
from tersor.drag.scene import Entity, Scene


def scene(*masks: np.ndarray) -> Scene:
    return Scene(masks[0].shape[1], masks[0].shape[0], 1, tuple(Entity(mask, [(0, 0)]) for mask in masks))


def test_a_mask_counts_by_how_much_of_a_cell_it_covers() -> None:
    features = torch.arange(32.0).view(2, 4, 4)
    whole = entity_features(features, scene(square(4, 0, 4, side=16), np.ones((16, 16), bool)))
    assert torch.allclose(whole, torch.tensor([[4.0, 20.0], [7.5, 23.5]]))
    part = np.zeros((16, 16), bool)
    part[0:4, 2:5] = True  # half of the first cell, a quarter of the second
    assert torch.allclose(entity_features(features, scene(part))[0], torch.tensor([1 / 3, 16 + 1 / 3]))
    tiny = entity_features(features, scene(square(15, 15, 1, side=16)))
    assert torch.equal(tiny[0], features[:, 3, 3]), "the smallest mask has features, too"


class Words:
    model_max_length = 5

    def __call__(self, text, **options):
        return SimpleNamespace(input_ids=torch.zeros(1, 5, dtype=torch.long))


def small_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[8, 8], down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, norm_num_groups=4,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def diffusion():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8,
                       max_position_embeddings=5)
    )  # fmt: skip
    pipe = SimpleNamespace(vae=small_vae(), unet=unet.eval(), text_encoder=text.eval(), tokenizer=Words(),
                           scheduler=DDIMScheduler(num_train_timesteps=1000))  # fmt: skip
    return pipe


def drawn(of: DiffusionFeatures, image: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return of(image, torch.Generator().manual_seed(seed))


def test_diffusion_features_are_of_the_block_and_steady_with_more_draws(diffusion) -> None:
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    one, eight = (DiffusionFeatures(diffusion, "tiny", up_block_index=1, ensemble_size=count) for count in (1, 8))
    assert eight.record["channels"] == 8 and drawn(eight, image).shape == (8, 16, 16)
    assert torch.equal(drawn(eight, image), drawn(eight, image))
    assert DiffusionFeatures(diffusion, "tiny", up_block_index=0).record["channels"] == 16
    assert not diffusion.unet.up_blocks[1]._forward_hooks

    def spread(of: DiffusionFeatures) -> float:
        return torch.stack([drawn(of, image, seed) for seed in range(12)]).var(0).mean().item()

    assert 0.06 < spread(eight) / spread(one) < 0.25, "about an eighth of the variance"
    with pytest.raises(TersorError, match="up_block_index=2 must be from 0 to 1"):
        drawn(DiffusionFeatures(diffusion, "tiny", up_block_index=2), image)


def test_what_is_under_the_mask_matters_more_than_what_is_far_away(diffusion) -> None:
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    moved = scene(square(4, 4, 16, side=64))
    own = DiffusionFeatures(diffusion, "tiny", up_block_index=1)
    before = entity_features(drawn(own, image), moved)
    inside, outside = image.clone(), image.clone()
    inside[:, 4:20, 4:20] = 1 - inside[:, 4:20, 4:20]
    outside[:, 44:60, 44:60] = 1 - outside[:, 44:60, 44:60]
    near, far = ((entity_features(drawn(own, each), moved) - before).norm() for each in (inside, outside))
    assert far < 0.5 * near


def test_patches_and_latents_lie_where_they_belong() -> None:
    torch.manual_seed(0)
    dino = Dinov2Model(Dinov2Config(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, patch_size=8,
                                    image_size=32)).eval()  # fmt: skip
    found = DinoFeatures(dino, "tiny")(torch.rand(3, 30, 41))
    assert found.shape == (12, 4, 5) and DinoFeatures(dino, "tiny").record["channels"] == 12
    assert VaeFeatures(small_vae(), "tiny")(torch.rand(3, 32, 32)).shape == (4, 16, 16)


def test_a_branch_takes_the_features_that_it_was_trained_with() -> None:
    known = {"kind": "diffusion", "name": "a", "timestep": 261, "seen": [1.0, -2.0]}
    check_record(None, known)
    check_record(known, {**known, "name": "the same in another folder", "seen": [1.01, -2.02]})
    for changed, message in (
        ({"timestep": 1}, "timestep=261"), ({"kind": "dino"}, "kind='diffusion'"),
        ({"name": "b", "seen": [1.2, -2.0]}, "trained on the features of a, and those of b are others"),
    ):  # fmt: skip
        with pytest.raises(TersorError, match=message):
            check_record(known, {**known, **changed})
