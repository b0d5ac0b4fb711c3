from __future__ import annotations

import pytest
import torch
from drag_models import svd

from tersor.drag.objective import Scalings, draw_sigmas, latent_masks, masked_loss


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    predicted, latents = torch.randn(2, 2, 3, 4, 6, 6, generator=generator)
    masks = torch.zeros(2, 3, 6, 6)
    masks[:, :, 1:3, 2:5] = 1
    return predicted.requires_grad_(), latents, masks


@pytest.mark.parametrize("kind", ["area", "mean"])
def test_outside_the_entities_the_gradient_is_exactly_zero(kind: str) -> None:
    predicted, latents, masks = inputs()
    masked_loss(predicted, latents, torch.ones(2), masks, kind).backward()
    assert predicted.grad is not None
    outside = masks[:, :, None].expand_as(predicted) == 0
    assert not predicted.grad[outside].any() and predicted.grad[~outside].abs().min() > 0


def test_the_loss_by_area_does_not_know_how_large_an_entity_is() -> None:
    latents = torch.zeros(1, 2, 4, 8, 8)
    small, large = torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8)
    small[..., :2, :2], large[..., :4, :4] = 1, 1
    losses = {
        kind: [masked_loss(latents + 0.5, latents, torch.ones(1), mask, kind).item() for mask in (small, large)]
        for kind in ("area", "mean", "none")
    }
    assert losses["area"] == pytest.approx([0.25, 0.25])
    assert losses["mean"][1] == pytest.approx(4 * losses["mean"][0])
    assert losses["none"] == pytest.approx([0.25, 0.25])


def test_without_a_mask_the_loss_is_over_everything_and_weights_count() -> None:
    predicted, latents, masks = inputs()
    weight = torch.tensor([1.0, 3.0])
    each = (predicted - latents).square().mean((1, 2, 3, 4))
    assert masked_loss(predicted, latents, weight, masks, "none").item() == pytest.approx((weight * each).mean().item())


def test_a_latent_counts_where_an_entity_covers_any_of_it() -> None:
    masks = torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    masks[0, 1, 3, 5] = True
    found = latent_masks(masks, (4, 4))
    assert found.shape == (1, 2, 4, 4) and found.sum() == 1 and found[0, 1, 1, 2] == 1


def test_the_scalings_are_those_of_the_scheduler_that_samples() -> None:
    scheduler = svd().scheduler
    scheduler.set_timesteps(7)
    sample, out = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    for number, timestep in enumerate(scheduler.timesteps):
        known = Scalings(scheduler.sigmas[number])
        assert known.timestep.item() == pytest.approx(timestep.item(), rel=1e-4)
        scaled = scheduler.scale_model_input(sample, timestep)
        torch.testing.assert_close(scaled, known.c_in * sample)
        step = scheduler.step(out, timestep, sample)
        torch.testing.assert_close(step.pred_original_sample, known.c_out * out + known.c_skip * sample)


def test_the_weight_makes_every_noise_as_hard() -> None:
    """EDM, equation 8: the weight times c_out squared is one."""
    known = Scalings(torch.tensor([0.01, 1.0, 50.0]))
    torch.testing.assert_close(known.weight * known.c_out**2, torch.ones(3))


def test_noise_is_log_normal() -> None:
    logs = draw_sigmas(20_000, 0.7, 1.6, torch.Generator().manual_seed(0)).log()
    assert logs.mean().item() == pytest.approx(0.7, abs=0.05) and logs.std().item() == pytest.approx(1.6, abs=0.05)
