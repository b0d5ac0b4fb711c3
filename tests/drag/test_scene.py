"""Scenes: paths in time, circles in masks, files, and errors that name the entity."""

from __future__ import annotations

import json

import numpy as np
import pytest
from drag_models import square
from PIL import Image

from tersor._errors import TersorError
from tersor.drag.paths import frame_points, point_times
from tersor.drag.scene import Circle, Entity, Scene


def test_paths_go_through_their_points_and_never_beyond_them() -> None:
    path = np.array([(0, 0), (10, 0), (10, 5)])
    found = frame_points(path, 5)
    assert found[[0, 2, 4]].tolist() == path.tolist()
    assert (np.diff(found[:, 0]) >= 0).all() and found.max(0).tolist() == [10, 5], "monotone cubic: no overshoot"
    assert np.allclose(frame_points(path[:2], 6), np.linspace(path[0], path[1], 6))
    assert np.array_equal(frame_points(path, 3), path)
    assert frame_points(path[:1], 4).tolist() == [[0, 0]] * 4
    assert frame_points(np.array([(3, 3), (3, 3)]), 3, "uniform_speed").tolist() == [[3, 3]] * 3
    assert frame_points(path, 1).tolist() == [[0, 0]]


def test_time_may_follow_the_way_or_be_given() -> None:
    path = np.array([(0, 0), (8, 0), (10, 0)])
    assert point_times(path, "uniform_speed").tolist() == [0, 0.8, 1]
    assert np.allclose(np.diff(frame_points(path, 6, "uniform_speed")[:, 0]), 2), "the same speed everywhere"
    assert frame_points(path, 11, [0, 0.1, 1])[1].tolist() == [8, 0]
    for timing in ("fast", [0, 1], [0, 0.5, 0.5], [0.1, 0.5, 1], [0, 0.5, 0.9]):
        with pytest.raises(TersorError, match="timing="):
            point_times(path, timing)


def test_the_circle_is_the_largest_in_the_mask() -> None:
    assert Entity(square(4, 8, 9), [(0, 0)]).circle() == Circle(12.0, 8.0, 5)
    rows, columns = np.mgrid[:64, :64]
    disc = (rows - 30) ** 2 + (columns - 20) ** 2 <= 12**2
    disc[30, 33:60] = True  # a thin tail moves neither centre nor radius
    found = Entity(disc, [(0, 0)]).circle()
    assert abs(found.x - 20) <= 1 and abs(found.y - 30) <= 1 and found.radius in (12, 13)
    assert Entity(disc, [(0, 0)]).circle(7.5).radius == 7
    whole = Entity(np.ones((20, 40), bool), [(0, 0)]).circle()
    assert whole.radius == 10 and whole.y in (9.0, 10.0), "the frame is the border of what fills it"


def test_a_path_is_a_displacement_of_the_centre_or_the_place_itself() -> None:
    mask, path = square(4, 8, 9), [(100, 50), (104, 58)]
    assert Entity(mask, path).centers(2).tolist() == [[12, 8], [16, 16]]
    assert np.array_equal(Entity(mask, path, anchor="path").centers(2), np.array(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": np.zeros((4, 4), bool)}, "mask is empty"),
        ({"mask": np.ones((4, 4, 3), bool)}, "mask must be true or false"),
        ({"mask": np.full((4, 4), 255, np.uint8)}, "mask must be true or false"),
        ({"path": []}, "points in pixels, one at least"),
        ({"path": [(1, 2, 3)]}, "points in pixels"),
        ({"path": [(1, float("nan"))]}, "points in pixels"),
        ({"path": "up"}, "points in pixels"),
        ({"anchor": "top"}, "anchor='top'"),
        ({"timing": "fast"}, "timing='fast'"),
    ],
)
def test_errors_name_the_entity(changes, message) -> None:
    with pytest.raises(TersorError, match=f"entity 'cat': .*{message}"):
        Entity(**{"mask": square(1, 1, 2, side=4), "path": [(0, 0)], "name": "cat", **changes})


def test_scenes_are_checked() -> None:
    cat = Entity(square(1, 1, 2, side=8), [(0, 0)], "cat")
    with pytest.raises(TersorError, match="an entity at least"):
        Scene(8, 8, 2, ())
    with pytest.raises(TersorError, match=r"entity 'cat': mask is \(8, 8\), the scene \(8, 9\)"):
        Scene(9, 8, 2, (cat,))
    with pytest.raises(TersorError, match="num_frames=0"):
        Scene(8, 8, 0, (cat,))


def test_another_size_is_the_same_scene() -> None:
    scene = Scene(8, 8, 3, (Entity(square(2, 4, 4, side=8), [(4, 2), (8, 6)]),))
    large = scene.resized(16, 32)
    assert np.array_equal(large.entities[0].mask, scene.entities[0].mask.repeat(4, 0).repeat(2, 1))
    assert large.entities[0].path.tolist() == [[8, 8], [16, 24]]
    thin = Scene(8, 8, 1, (Entity(square(3, 3, 1, side=8), [(0, 0)]),)).resized(2, 2)
    assert thin.entities[0].mask.sum() == 1, "a thin entity does not vanish"
    assert scene.resized(8, 8) is scene


def test_a_saved_scene_comes_back(tmp_path) -> None:
    cat = Entity(square(1, 1, 3, side=8), [(0, 0), (4, 4.5)], "cat", "path", [0.0, 1.0])
    dog = Entity(square(4, 4, 3, side=8), [(0, 0)], "dog", timing="uniform_speed")
    Scene(8, 8, 5, (cat, dog)).save(tmp_path / "a" / "scene.json")
    again = Scene.load(tmp_path / "a" / "scene.json")
    assert (again.width, again.height, again.num_frames) == (8, 8, 5)
    for one, other in zip((cat, dog), again.entities, strict=True):
        assert np.array_equal(one.mask, other.mask) and np.array_equal(one.path, other.path)
        assert (one.name, one.anchor, one.timing) == (other.name, other.anchor, other.timing)
    assert Scene.load(tmp_path / "a" / "scene.json", num_frames=9).num_frames == 9


def test_the_authors_demo_file_is_read(tmp_path) -> None:
    Image.fromarray(square(2, 2, 4, side=16).astype(np.uint8) * 255).save(tmp_path / "m.jpg", quality=100)
    values = {"1": {"comment": "bird", "mask_name": "m.jpg", "trajectory": [[n, 2 * n] for n in range(20)]}}
    (tmp_path / "demo.json").write_text(json.dumps(values))
    scene = Scene.load(tmp_path / "demo.json")
    assert (scene.width, scene.num_frames) == (16, 20)
    bird = scene.entities[0]
    assert (bird.name, bird.anchor) == ("bird", "path") and np.array_equal(bird.mask, square(2, 2, 4, side=16))
    assert bird.centers(20)[3].tolist() == [3, 6]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "holds no scene"),
        ('{"entities": [{"path": [[0, 0]]}]}', "holds no whole scene: KeyError 'mask'"),
        ('{"entities": [{"mask": "no.png", "path": [[0, 0]]}], "width": 2, "height": 2, "num_frames": 1}', "no.png"),
        ('{"1": 3}', "holds no whole scene"),
    ],
)
def test_broken_files_are_named(tmp_path, text, message) -> None:
    file = tmp_path / "scene.json"
    file.write_text(text)
    with pytest.raises(TersorError, match=f"scene.json.*{message}"):
        Scene.load(file)
    with pytest.raises(TersorError, match="no such scene"):
        Scene.load(tmp_path / "other.json")
