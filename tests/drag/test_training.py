from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from drag_models import branch, svd

from tersor._errors import TersorError
from tersor.drag.batches import Encoder, kept_numbers, planned, seeded
from tersor.drag.controlnet import SpatioTemporalControlNetModel
from tersor.drag.data import Clip
from tersor.drag.features import VaeFeatures
from tersor.drag.pipeline import DragAnythingPipeline
from tersor.drag.training import DragTraining, batch_loss, checkpoints, train

FRAMES, SIDE = 2, 16
PLAN = DragTraining(max_train_steps=4, train_batch_size=2, learning_rate=1e-3, lr_warmup_steps=0, checkpointing_steps=0)


def clips(count: int = 5) -> list[Clip]:
    found = []
    for number in range(count):
        rng = np.random.default_rng(number)
        masks = np.zeros((FRAMES, SIDE, SIDE), np.int32)
        for frame in range(FRAMES):
            masks[frame, 2:8, 2 + frame : 8 + frame], masks[frame, 10:15, 4:11] = 1, 2
        found.append(Clip(f"clip {number}", rng.integers(0, 255, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8), masks))
    return found


def pipeline(**changes: Any) -> DragAnythingPipeline:
    own = svd()
    features = VaeFeatures(own.vae, "tiny")
    made = branch(own.unet, entity_embedding_out_channels=(2, 8), entity_features=features.record, **changes)
    pipe = DragAnythingPipeline(**own.components, controlnet=made, entity_feature_extractor=features)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(SpatioTemporalControlNetModel.from_pretrained(folder).state_dict())


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def loss_of(pipe: DragAnythingPipeline, plan: DragTraining = PLAN, seed: int = 3) -> torch.Tensor:
    encoder = Encoder(pipe, plan.entity_dropout, plan.fps, plan.motion_bucket_id, plan.noise_aug_strength)
    batch = encoder(clips(2), seeded(seed))
    return batch_loss(pipe.unet, pipe.controlnet, batch, plan, seeded(seed, 1))


def test_only_the_branch_is_trained_and_it_is_saved_as_a_pipeline_loads_it(tmp_path: Path) -> None:
    pipe = pipeline()
    before = {name: each.clone() for name, each in pipe.unet.state_dict().items()}
    begun = {name: each.clone() for name, each in pipe.controlnet.state_dict().items()}
    losses = train(pipe, clips(), PLAN, tmp_path)
    assert len(losses) == PLAN.max_train_steps
    assert same(before, dict(pipe.unet.state_dict()))
    saved = weights(tmp_path / "controlnet")
    assert not same(begun, saved) and same(saved, dict(pipe.controlnet.state_dict()))
    loaded = SpatioTemporalControlNetModel.from_pretrained(tmp_path / "controlnet")
    assert loaded.config.entity_features == pipe.controlnet.config.entity_features


def test_training_makes_the_loss_of_a_clip_smaller(tmp_path: Path) -> None:
    pipe = pipeline()
    plan = dataclasses.replace(
        PLAN, max_train_steps=20, learning_rate=3e-3, entity_dropout=0.0, conditioning_dropout_prob=0.0
    )
    before = sum(loss_of(pipe, plan, seed).item() for seed in range(4))
    train(pipe, clips(2), plan, tmp_path)
    assert sum(loss_of(pipe, plan, seed).item() for seed in range(4)) < 0.95 * before


def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, max_train_steps=5, checkpointing_steps=2, gradient_accumulation_steps=2)
    whole = train(pipeline(), clips(), plan, tmp_path / "whole")

    def stop(step: int, steps: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(pipeline(), clips(), plan, tmp_path / "killed", on_step=stop)
    assert [each.name for each in checkpoints(tmp_path / "killed")] == ["checkpoint-2"]
    assert train(pipeline(), clips(), plan, tmp_path / "killed") == whole
    assert same(weights(tmp_path / "killed" / "controlnet"), weights(tmp_path / "whole" / "controlnet"))
    assert [each.name for each in checkpoints(tmp_path / "whole")] == ["checkpoint-4", "checkpoint-5"]


def test_a_finished_run_goes_on_with_more_updates_and_no_other_run_goes_on_in_its_folder(tmp_path: Path) -> None:
    longer = dataclasses.replace(PLAN, max_train_steps=6, lr_scheduler="constant")
    first = train(pipeline(), clips(), dataclasses.replace(longer, max_train_steps=4), tmp_path / "a")
    assert train(pipeline(), clips(), longer, tmp_path / "a")[:4] == first
    assert train(pipeline(), clips(), longer, tmp_path / "a") == train(pipeline(), clips(), longer, tmp_path / "b")
    with pytest.raises(TersorError, match="belongs to another run"):
        train(pipeline(), clips(), dataclasses.replace(longer, seed=1), tmp_path / "a")
    with pytest.raises(TersorError, match="belongs to another run"):
        train(pipeline(), clips(), longer, tmp_path / "a", facts={"data": "elsewhere"})


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointed in (False, True):
        pipe = pipeline(seed=1)
        pipe.unet.requires_grad_(False)
        pipe.controlnet.train()
        if checkpointed:
            pipe.controlnet.enable_gradient_checkpointing()
            pipe.unet.enable_gradient_checkpointing()
        loss_of(pipe).backward()
        gradients.append({name: each.grad for name, each in pipe.controlnet.named_parameters()})
    assert all(each is not None for each in gradients[0].values())
    for name, each in gradients[0].items():
        torch.testing.assert_close(each, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_adapters_end_in_the_weights_of_an_ordinary_branch(tmp_path: Path) -> None:
    pipe = pipeline()
    begun = {name: each.clone() for name, each in pipe.controlnet.state_dict().items()}
    train(pipe, clips(), dataclasses.replace(PLAN, rank=2, max_train_steps=3), tmp_path)
    saved = weights(tmp_path / "controlnet")
    moved = {name for name in begun if not torch.equal(begun[name], saved[name])}
    assert saved.keys() == begun.keys()
    assert any(name.endswith("to_q.weight") for name in moved)
    assert any(name.startswith("controlnet_down_blocks") for name in moved)
    assert not any("resnets" in name or name.startswith("conv_in") for name in moved)


def test_videos_of_the_first_clip_are_made_before_and_at_the_end(tmp_path: Path) -> None:
    train(pipeline(), clips(2), dataclasses.replace(PLAN, max_train_steps=2, validation_steps=5), tmp_path)
    assert sorted(each.name for each in (tmp_path / "validation").iterdir()) == [
        "step-0000000.gif", "step-0000002.gif"
    ]  # fmt: skip


def test_in_half_precision_the_branch_stays_in_float32_and_videos_are_made(tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        pipe = pipeline()
        plan = dataclasses.replace(
            PLAN, max_train_steps=1, mixed_precision="bf16", gradient_checkpointing=True, validation_steps=1
        )
        assert np.isfinite(train(pipe, clips(2), plan, tmp_path)).all()
        assert (pipe.unet.dtype, pipe.controlnet.dtype, pipe.vae.dtype) == (
            torch.bfloat16,
            torch.float32,
            torch.float32,
        )
        assert len([*(tmp_path / "validation").iterdir()]) == 2
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_what_cannot_be_trained_is_refused_before_it_starts(tmp_path: Path) -> None:
    pipe = pipeline()
    with pytest.raises(TersorError, match="there are no clips"):
        train(pipe, [], PLAN, tmp_path)
    pipe.entity_feature_extractor = None
    with pytest.raises(TersorError, match="needs an entity_feature_extractor"):
        train(pipe, clips(1), PLAN, tmp_path)
    other = svd()
    wide = branch(other.unet)  # of 12 channels, where the autoencoder has 4
    wrong = DragAnythingPipeline(
        **other.components, controlnet=wide, entity_feature_extractor=VaeFeatures(other.vae, "tiny")
    )
    with pytest.raises(TersorError, match="takes features of 12 channels, the extractor gives 4"):
        train(wrong, clips(1), PLAN, tmp_path)
    changed = pipeline()
    vae = copy.deepcopy(changed.vae)
    torch.nn.init.normal_(vae.quant_conv.weight)
    changed.entity_feature_extractor = VaeFeatures(vae, "another")
    with pytest.raises(TersorError, match="trained on the features of tiny, and those of another are others"):
        train(changed, clips(1), PLAN, tmp_path)
    for changes, said in (
        ({"max_train_steps": 0}, "max_train_steps=0 must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"entity_dropout": 1.0}, "entity_dropout=1.0 must be from 0 to below 1"),
        ({"conditioning_dropout_prob": 0.4}, "conditioning_dropout_prob=0.4 must be at most a third"),
        ({"loss_mask": "all"}, "loss_mask='all' must be one of"),
        ({"lr_scheduler": "step"}, "lr_scheduler='step' must be one of"),
    ):
        with pytest.raises(TersorError, match=said):
            dataclasses.replace(PLAN, **changes)
    assert not [*tmp_path.iterdir()]


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    pipe = pipeline()
    with torch.no_grad():
        pipe.controlnet.conv_in.weight[0, 0, 0, 0] = float("nan")
        pipe.controlnet.controlnet_mid_block.weight.fill_(1.0)
    with pytest.raises(TersorError, match="the loss of update 1 is no number"):
        train(pipe, clips(), PLAN, tmp_path)


def test_every_clip_is_drawn_once_a_pass_by_one_of_the_processes() -> None:
    taken = [
        number for rank in range(2) for batch in planned(8, 2, 0, 4, seed=1, rank=rank, ranks=2) for number in batch
    ]
    assert sorted(taken) == sorted([*range(8)] * 2)
    later = [*planned(8, 2, 2, 4, seed=1, rank=1, ranks=2)]
    assert later == [*planned(8, 2, 0, 4, seed=1, rank=1, ranks=2)][2:]


def test_some_entities_are_left_out_and_never_all() -> None:
    clip, generator = clips(1)[0], seeded(0)
    drawn = [tuple(kept_numbers(clip, 0.5, generator)) for _ in range(400)]
    assert {*drawn} == {(1,), (2,), (1, 2)}
    assert 0.2 < drawn.count((1, 2)) / 400 < 0.3
    assert kept_numbers(clip, 0.0, generator) == [1, 2]


def test_what_is_left_out_is_neither_drawn_nor_in_the_loss() -> None:
    pipe = pipeline()
    told = {"fps": 7, "motion_bucket_id": 128, "noise_aug_strength": 0.02}
    batch = Encoder(pipe, 0.999999, **told)([clips(1)[0]], seeded(0))
    whole = Encoder(pipe, 0.0, **told)([clips(1)[0]], seeded(0))
    first, second = (each.masks[0, 0].bool() for each in (batch, whole))
    assert first.any() and (first & ~second).sum() == 0 and second.sum() > first.sum()
    assert (batch.entities != 0).sum() < (whole.entities != 0).sum()


def test_features_are_computed_once_a_clip() -> None:
    pipe, calls = pipeline(), []

    class Counted(VaeFeatures):
        def __call__(self, image: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
            calls.append(1)
            return super().__call__(image, generator)

    pipe.entity_feature_extractor = Counted(pipe.vae, "tiny")
    encoder = Encoder(pipe, 0.0, 7, 128, 0.02)
    encoder(clips(2), seeded(0))
    encoder(clips(2), seeded(1))
    assert len(calls) == 2
