"""The world's motions are what its clips show, and the point alone does not tell what moves."""

from __future__ import annotations

import numpy as np
import pytest

from tersor.drag.bench.evaluation import layer_track, motion_of
from tersor.drag.bench.world import FRAMES, KINDS, SIDE, Sample, World, with_plain


def samples(kind: str, count: int = 5) -> list[Sample]:
    world = World(count, 5, kind)
    return [world.sample(index) for index in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_clips_show_the_motions_that_their_layers_have(kind: str) -> None:
    found = [motion_of(each, each.clip.frames / 255) for each in samples(kind)]
    assert np.mean([each.epe for each in found]) < 0.3
    still = [motion_of(each, np.repeat(each.clip.frames[:1] / 255, FRAMES, 0)) for each in samples(kind)]
    assert np.mean([each.epe for each in still]) > 1.0


def test_a_wrong_motion_costs_what_it_is_off() -> None:
    """Everything moved by (3, 4) instead of where it should go, from the second frame on."""
    for each in samples("camera", 4):
        layer = each.layers[0]
        frames = np.stack([layer.colours(0.0)] * FRAMES)
        moved = np.roll(frames, (4, 3), axis=(1, 2))
        video = np.concatenate([frames[:1], moved[1:]])
        mask = np.zeros((SIDE, SIDE), bool)
        mask[6:14, 6:14] = True
        np.testing.assert_allclose(layer_track(mask, video)[1:], [[3, 4]] * (FRAMES - 1), atol=0.2)


def test_in_three_kinds_the_path_starts_at_the_same_point() -> None:
    starts = [
        each.clip.scene().entities[0].centers(FRAMES)[0]
        for kind in ("start", "together", "camera")
        for each in samples(kind, 4)
    ]
    assert np.abs(np.array(starts) - 11.0).max() <= 1.0


def test_what_is_asked_to_move_is_what_has_a_mask_and_its_path_is_the_motion() -> None:
    for kind in KINDS:
        for each in samples(kind, 6):
            numbers = sorted({layer.number for layer in each.layers if layer.number})
            assert each.clip.numbers() == numbers
            for entity, number in zip(each.clip.scene().entities, numbers, strict=True):
                motion = next(layer.motion for layer in each.layers if layer.number == number)
                path = entity.centers(FRAMES)
                np.testing.assert_allclose(path[-1] - path[0], motion)
    still = [layer for each in samples("start", 4) for layer in each.layers if not layer.number]
    assert still and all(not layer.motion.any() for layer in still)
    assert {len(each.clip.numbers()) for each in samples("crossing")} == {2, 3}


def test_samples_are_decided_by_seed_and_place() -> None:
    first, again, other = World(4, 1)[2], World(9, 1)[2], World(4, 2)[2]
    assert np.array_equal(first.frames, again.frames) and not np.array_equal(first.frames, other.frames)
    assert [World(8, 1).sample(index).kind for index in range(4)] == [*KINDS]


def test_one_clip_in_eight_loses_what_it_shows_and_keeps_what_it_is_told() -> None:
    clips = [World(200, 3)[index] for index in range(200)]
    mixed = with_plain(clips, 1)
    plain = [place for place, each in enumerate(mixed) if each.name.startswith("plain")]
    assert 12 <= len(plain) <= 40
    for place, (own, made) in enumerate(zip(clips, mixed, strict=True)):
        assert np.ptp(made.frames, axis=(0, 1, 2)).any() == (place not in plain)
        assert made.masks is own.masks and made.motions is own.motions
    assert len({each.name for each in mixed}) == 200, "a training keeps what it knows of a clip by its name"
    assert [each.name for each in with_plain(clips, 1)] == [each.name for each in mixed]
