"""The pipeline on a real SVD of tiny sizes: nothing changes where nothing should, and hooks come off."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from drag_models import FRAMES, SIDE, branch, entities, features, picture, square, svd

from tersor._errors import TersorError
from tersor.drag.controlnet import SpatioTemporalControlNetModel
from tersor.drag.features import VaeFeatures
from tersor.drag.pipeline import MAP_FRAMES, DragAnythingPipeline
from tersor.drag.scene import Entity, Scene


@pytest.fixture(scope="module")
def plain():
    return svd()


def drag(plain: Any, **made: Any) -> DragAnythingPipeline:
    pipe = DragAnythingPipeline.from_pipe(plain, controlnet=branch(plain.unet, **made))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shown(pipe: Any, *given: Any, image: Any = None, **options: Any) -> torch.Tensor:
    defaults = {"num_inference_steps": 2, "output_type": "pt", "decode_chunk_size": FRAMES, "num_frames": FRAMES}
    options = {**defaults, "generator": torch.manual_seed(3), **options}
    return pipe(picture() if image is None else image, *given, height=SIDE, width=SIDE, **options).frames


def hooks(unet: Any) -> int:
    parts = [unet, unet.mid_block, *unet.up_blocks]
    return sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in parts)


@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_a_new_branch_changes_nothing_whatever_moves(plain, scale) -> None:
    pipe = drag(plain)
    found = shown(pipe, entities(), features=features(), max_guidance_scale=scale)
    assert torch.equal(found, shown(plain, max_guidance_scale=scale))


def test_a_trained_branch_changes_the_video_and_none_of_it_without_its_scale(plain) -> None:
    pipe, before = drag(plain, seed=5), shown(plain)
    told = features()
    found = shown(pipe, entities(), features=told)
    assert (found - before).abs().max() > 0.01
    assert torch.equal(shown(pipe, entities(), features=told, controlnet_conditioning_scale=0.0), before)
    assert not torch.equal(shown(pipe, entities(), features=told * 2), found), "what the entities are matters"
    assert not torch.equal(shown(pipe, entities()[::-1], features=told), found), "and which of them moves where"
    assert torch.equal(shown(plain), before) and hooks(plain.unet) == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_hooks_come_off_after_an_interrupt(plain, error) -> None:
    def stop(*_: Any) -> None:
        raise error

    before = shown(plain)
    with pytest.raises(error):
        shown(drag(plain, seed=5), entities(), features=features(), callback_on_step_end=stop)
    assert hooks(plain.unet) == 0 and torch.equal(shown(plain), before)


@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_a_batch_is_its_videos_alone(plain, scale) -> None:
    pipe = drag(plain, seed=5)
    pictures, told = [picture(0), picture(1)], [features(2), features(1)]
    moved = [entities(2), entities(1)]
    options = {"max_guidance_scale": scale, "noise_aug_strength": 0.0}
    latents = torch.randn(2, FRAMES, 4, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(9))
    together = shown(pipe, moved, features=told, image=pictures, latents=latents, **options)
    for number in range(2):
        alone = shown(
            pipe, moved[number], features=told[number], image=pictures[number],
            latents=latents[number : number + 1], **options,
        )  # fmt: skip
        torch.testing.assert_close(together[number], alone[0], atol=1e-4, rtol=1e-4)


def test_maps_are_encoded_once_a_frame(plain) -> None:
    pipe, seen = drag(plain, seed=5), []
    pipe.controlnet.controlnet_cond_embedding.register_forward_hook(lambda part, args, out: seen.append(len(args[0])))
    frames = 2 * MAP_FRAMES + 1
    shown(pipe, entities(), features=features(), num_frames=frames, num_inference_steps=3)
    assert seen == [MAP_FRAMES, MAP_FRAMES, 1]


def test_control_may_be_for_some_steps_and_for_one_half_of_guidance(plain) -> None:
    pipe, told = drag(plain, seed=5), features()
    calls: list[int] = []
    pipe.controlnet.register_forward_pre_hook(lambda part, args: calls.append(len(args[0])))
    whole = shown(pipe, entities(), features=told, num_inference_steps=4)
    assert calls == [2] * 4
    part = shown(pipe, entities(), features=told, num_inference_steps=4, control_guidance_end=0.5)
    assert calls[4:] == [2] * 2 and not torch.equal(part, whole)
    half = shown(pipe, entities(), features=told, num_inference_steps=4, guess_mode=True)
    assert calls[6:] == [1] * 4 and not torch.equal(half, whole)


def test_features_come_from_an_extractor_of_the_branchs_kind(plain) -> None:
    vae = VaeFeatures(plain.vae, "tiny")
    pipe = drag(plain, seed=5, entity_embedding_out_channels=(2, 8), entity_features=vae.record)
    pipe.entity_feature_extractor = vae
    first = shown(pipe, entities())
    assert torch.equal(shown(pipe, entities()), first)
    pipe.entity_feature_extractor = VaeFeatures(plain.vae, "the same in another folder")
    assert torch.equal(shown(pipe, entities()), first)
    other = copy.deepcopy(plain.vae)
    torch.nn.init.normal_(other.quant_conv.weight)
    pipe.entity_feature_extractor = VaeFeatures(other, "another")
    with pytest.raises(TersorError, match="trained on the features of tiny, and those of another are others"):
        shown(pipe, entities())


def test_a_saved_pipeline_comes_back(plain, tmp_path) -> None:
    pipe = drag(plain, seed=5, residual_multipliers=(2.0, 2.0, 2.0, 2.0, 1.0, 1.0))
    first = shown(pipe, entities(), features=features())
    pipe.save_pretrained(tmp_path)
    again = DragAnythingPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert tuple(again.controlnet.config.residual_multipliers) == (2.0, 2.0, 2.0, 2.0, 1.0, 1.0)
    assert torch.equal(shown(again, entities(), features=features()), first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": features(3)}, r"features are \(3, 12\); the branch takes \(2, 12\)"),
        ({"features": features(2, 10)}, r"the branch takes \(2, 12\)"),
        ({"features": None}, "give features, or an entity_feature_extractor"),
        ({"control_guidance_start": 0.5, "control_guidance_end": 0.5}, "the first below the second"),
        ({"map_mode": "round"}, "map_mode='round' must be one of"),
        ({"embedding_mode": "half"}, "embedding_mode='half'"),
        ({"order": "size"}, "order='size'"),
    ],
)
def test_what_cannot_be_met_is_refused_before_the_first_step(plain, changes, message) -> None:
    calls: list[int] = []
    plain.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(TersorError, match=message):
            shown(drag(plain, seed=5), entities(), **{"features": features(), **changes})
    finally:
        plain.unet._forward_pre_hooks.clear()
    assert not calls


def test_scenes_must_be_as_many_as_pictures_and_of_their_size(plain) -> None:
    with pytest.raises(TersorError, match="1 scenes for 2 pictures"):
        shown(drag(plain), entities(), image=[picture(), picture()], features=features())
    with pytest.raises(TersorError, match=r"entity 'box 0': mask is \(32, 32\), the scene \(32, 16\)"):
        shown(drag(plain), entities(), image=picture().crop((0, 0, 16, 32)), features=features())


def test_one_frame_of_maps_is_in_memory_at_once_at_full_size(plain, monkeypatch) -> None:
    """25 frames of 576 by 1,024 pixels on the branch of the published size, counted without any numbers."""
    with torch.device("meta"):
        full = SpatioTemporalControlNetModel()
    pipe, sizes = drag(plain), []

    def counted(self: Any, tracks: Any, vectors: Any, frames: range, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
        found = [torch.empty(len(frames), width, 576, 1024, device="meta") for width in (3, vectors.shape[1])]
        sizes.append(sum(each.nbytes for each in found))
        return found[0], found[1]

    monkeypatch.setattr(DragAnythingPipeline, "control_maps", counted)
    monkeypatch.setattr(DragAnythingPipeline, "_execution_device", torch.device("meta"))
    pipe.register_modules(controlnet=full)
    scene = Scene(1024, 576, 25, (Entity(square(100, 200, 90, side=1024)[:576], [(0, 0), (40, 8)]),))
    found = pipe.encode_scene(scene, torch.zeros(1, 320))
    assert found.shape == (25, 320, 72, 128) and len(sizes) == 25
    assert max(sizes) == (3 + 160) * 576 * 1024 * 4
