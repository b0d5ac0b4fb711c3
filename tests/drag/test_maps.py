"""Control maps: discs where paths say, vectors of their entities, and the Gaussian by its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drag_models import square

from tersor._errors import TersorError
from tersor.drag.maps import (
    MAP_MODES,
    MOST_RADIUS,
    Tracks,
    chunks,
    entity_maps,
    entity_vectors,
    gaussian_maps,
    template,
)
from tersor.drag.scene import Entity, Scene


def scene(*entities: Entity, side: int = 64, frames: int = 5) -> Scene:
    return Scene(side, side, frames, entities)


def tracks_of(moved: Scene, **options) -> Tracks:
    """With circles as large as they are."""
    return Tracks.of(moved, max_radius=None, **options)


def box(row: int, column: int, size: int, path, **options) -> Entity:
    return Entity(square(row, column, size, side=64), path, **options)


def test_a_disc_holds_the_pair_means_of_its_entity_and_the_rest_is_zero() -> None:
    moved = scene(box(4, 4, 9, [(0, 0), (20, 0)]), box(40, 40, 11, [(0, 0), (0, -8)]))
    tracks = Tracks.of(moved)
    vectors = torch.tensor([[1.0, 3.0, 5.0, 5.0], [10.0, 10.0, 0.0, 2.0]])
    drawn = entity_vectors(vectors)
    assert drawn.tolist() == [[2.0, 5.0], [10.0, 1.0]]
    found = entity_maps(tracks, drawn, range(5))
    rows, columns = np.mgrid[:64, :64]
    for frame, share in enumerate(np.linspace(0, 1, 5)):
        wanted = np.zeros((2, 64, 64))
        for entity, (x, y, radius) in enumerate(((8 + 20 * share, 8, 5), (45, 45 - 8 * share, 6))):
            wanted[:, (columns - x) ** 2 + (rows - y) ** 2 <= radius**2] = drawn[entity].numpy()[:, None]
        assert np.array_equal(found[frame].numpy(), wanted)
    scalar = entity_maps(tracks, entity_vectors(vectors, "demo_scalar"), range(1))
    assert scalar[0, 0].equal(scalar[0, 1]), "the authors' demo feeds maps that are the same in every channel"
    assert found[0].std(0).max() > 0


@pytest.mark.parametrize("mode", MAP_MODES)
def test_a_gaussian_is_255_in_the_middle_and_11_at_the_rim(mode) -> None:
    found = gaussian_maps(tracks_of(scene(box(20, 20, 25, [(0, 0)]))), range(1), mode)[0]
    assert found.shape == (3, 64, 64) and torch.equal(found[0], found[2])
    radius = 13
    rows, columns = np.mgrid[:64, :64]
    squared = (rows - 32.0) ** 2 + (columns - 32.0) ** 2
    wanted = 255 * np.exp(-squared / (2 * (0.4 * radius) ** 2)) * (squared <= radius**2)
    inside = squared <= (radius - 2) ** 2
    near = found[0].numpy()
    # The template is rounded, and its pixels lie half a pixel beside ours.
    assert np.abs(near - wanted)[inside].max() <= (0.01 if mode == "exact" else 22)
    assert near.max() >= (254.99 if mode == "exact" else 248) and not near[squared > (radius + 1) ** 2].any()


def test_the_authors_template() -> None:
    made = template()
    assert made[100, 100] == 255 and made[100, 0] == 11 and made[0, 0] == 0
    assert torch.equal(made, made.floor())


def test_at_the_border_the_authors_squeeze_and_the_formula_cuts() -> None:
    tracks = tracks_of(scene(box(0, 20, 21, [(30, 0)], anchor="path")))
    official, exact = (gaussian_maps(tracks, range(1), mode)[0, 0] for mode in MAP_MODES)
    assert exact[0].argmax() == 30 and exact[0, 30] == 255
    assert official[0, 30] < 30 and official.max() > 240, "the whole template lies in the half that is in the frame"
    away = tracks_of(scene(box(0, 20, 21, [(-40, 10)], anchor="path")))
    assert not any(gaussian_maps(away, range(1), mode).any() for mode in MAP_MODES)


@pytest.mark.parametrize("mode", MAP_MODES)
def test_a_shifted_path_shifts_its_maps(mode) -> None:
    first, second = (
        tracks_of(scene(box(24, 16, 9, [(column, 28), (column + 10, 28)], anchor="path"))) for column in (20, 28)
    )
    vectors = torch.ones(1, 2)
    for one, other in (
        (gaussian_maps(first, range(5), mode), gaussian_maps(second, range(5), mode)),
        (entity_maps(first, vectors, range(5)), entity_maps(second, vectors, range(5))),
    ):
        assert torch.equal(one[..., :, :-8], other[..., :, 8:])


def test_small_entities_lie_on_large_ones_and_the_given_order_may_be_kept() -> None:
    large, small = box(10, 10, 41, [(0, 0)], name="large"), box(26, 26, 9, [(0, 0)], name="small")
    vectors = torch.tensor([[1.0], [2.0]])
    for listed in ((large, small), (small, large)):
        drawn = entity_maps(tracks_of(scene(*listed)), vectors, range(1))[0, 0]
        assert drawn[30, 30] == vectors[listed.index(small)] and drawn[14, 30] == vectors[listed.index(large)]
    kept = entity_maps(tracks_of(scene(small, large), order="given"), vectors, range(1))[0, 0]
    assert kept[30, 30] == 2.0, "drawn last, the large one covers it"
    apart = [box(2, 2, 9, [(0, 0)]), box(40, 40, 9, [(0, 0)])]
    one, other = (
        entity_maps(tracks_of(scene(*listed)), values, range(1))
        for listed, values in ((apart, vectors), (apart[::-1], vectors.flip(0)))
    )
    assert torch.equal(one, other), "the order of entities that do not meet says nothing"


def test_radii_have_a_limit_that_grows_with_the_picture() -> None:
    tracks = Tracks.of(Scene(640, 640, 1, (Entity(square(100, 100, 400, side=640), [(0, 0)]),)), max_radius=MOST_RADIUS)
    assert tracks.radii == (100,)
    assert Tracks.of(
        Scene(640, 640, 1, (Entity(square(100, 100, 400, side=640), [(0, 0)]),)), max_radius=None
    ).radii == (200,)


def test_maps_in_parts_are_the_maps() -> None:
    tracks = Tracks.of(scene(box(4, 4, 9, [(0, 0), (20, 0)])))
    assert [*map(len, chunks(5, 2))] == [2, 2, 1]
    parts = torch.cat([gaussian_maps(tracks, part) for part in chunks(5, 2)])
    assert torch.equal(parts, gaussian_maps(tracks, range(5)))


def test_other_modes_are_refused() -> None:
    tracks = Tracks.of(scene(box(4, 4, 9, [(0, 0)])))
    for call in (
        lambda: gaussian_maps(tracks, range(1), "soft"),
        lambda: entity_vectors(torch.ones(1, 2), "none"),
        lambda: Tracks.of(scene(box(4, 4, 9, [(0, 0)])), order="name"),
    ):
        with pytest.raises(TersorError, match="must be one of"):
            call()
