"""The table's rows and groups, on a base that has learned nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drag.base import new_pipeline

from tersor.bench.records import read_jsonl
from tersor.cli import run
from tersor.drag.bench import table
from tersor.drag.bench.arms import ARMS, POINT, new_arm, videos
from tersor.drag.bench.pictures import side_by_side
from tersor.drag.bench.table import Outcome, Plan, against, figure, groups, outcome
from tersor.drag.bench.world import FRAMES, SIDE, World
from tersor.drag.maps import Tracks, entity_vectors


@pytest.fixture(scope="module")
def svd() -> Any:
    return new_pipeline(0)


def maps_of(svd: Any, arm: str) -> tuple[torch.Tensor, torch.Tensor]:
    pipe = new_arm(svd, arm, name="new", seed=0)
    tracks = Tracks.of(World(4, 0, "together")[0].scene())
    vectors = entity_vectors(torch.ones(1, 8))
    return pipe.control_maps(tracks, vectors, range(FRAMES), "exact")


def test_arms_differ_in_what_their_maps_hold(svd: Any) -> None:
    near, what = maps_of(svd, "entity + Gaussian")
    assert near.any() and what.any()
    only = {arm: maps_of(svd, arm) for arm in ARMS}
    assert not only["entity only"][0].any() and torch.equal(only["entity only"][1], what)
    assert torch.equal(only["Gaussian only"][0], near) and not only["Gaussian only"][1].any()
    point, nothing = only["point only"]
    assert not nothing.any() and 0 < (point[0, 0] > 0).sum() <= (2 * POINT + 1) ** 2 < (near[0, 0] > 0).sum()


def test_a_branch_that_has_learned_nothing_gives_the_videos_of_the_base(svd: Any) -> None:
    samples = [World(2, 0).sample(index) for index in range(2)]
    free = videos(svd, samples, steps=2, seed=3)
    dragged = videos(new_arm(svd, "entity + Gaussian", name="new", seed=0), samples, steps=2, seed=3, batch=2)
    assert free[0].shape == (FRAMES, SIDE, SIDE, 3) and np.array_equal(free, dragged)
    assert not np.array_equal(free, videos(svd, samples, steps=2, seed=4))


def test_the_true_video_has_the_least_error_and_a_still_one_its_motion() -> None:
    samples = [World(8, 0).sample(index) for index in range(4)]
    true = outcome(samples, [each.clip.frames / 255 for each in samples])
    still = outcome(samples, [np.repeat(each.clip.frames[:1] / 255, FRAMES, 0) for each in samples])
    assert np.mean(true.objmc) < 0.5 < np.mean(still.objmc) and min(true.psnr) == 60.0


def test_figures_are_means_over_trainings_with_intervals_over_scenes() -> None:
    rows = {
        "a / 0": Outcome([1.0, 3.0], [0.0, 0.0], [0.0, 0.0]), "a / 1": Outcome([3.0, 5.0], [0.0, 0.0], [0.0, 0.0]),
        "b / 0": Outcome([4.0, 8.0], [0.0, 0.0], [0.0, 0.0]),
    }  # fmt: skip
    value = figure(rows, "a", "objmc", [0, 1])
    assert (value.value, value.low, value.high) == (3.0, 2.0, 4.0)
    less = against(rows, "a", "b", "objmc", [0, 1])
    assert less.value == pytest.approx(0.5) and less.low == pytest.approx(2 / 6) and less.high == pytest.approx(4 / 6)


def test_groups_are_all_by_kind_and_by_number_of_entities() -> None:
    found = groups([World(24, 0).sample(index) for index in range(24)])
    assert [*found][:5] == ["all", "start", "together", "crossing", "camera"] and len(found["all"]) == 24
    counted = [place for count in (1, 2, 3) for place in found[f"{count} moved"]]
    assert sorted(counted) == found["all"]


def test_pictures_hold_a_video_for_each_row_and_the_paths() -> None:
    samples = [World(3, 0).sample(index) for index in range(3)]
    true = [each.clip.frames / 255 for each in samples]
    svg = side_by_side(samples, {"asked for": true, "made <here>": true}, "two rows")
    assert svg.startswith("<svg") and svg.count("data:image/gif") == 6 and "made &lt;here&gt;" in svg
    assert svg.count("<polyline") == sum(len(each.clip.numbers()) for each in samples)


def test_the_command_trains_measures_and_goes_on(svd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    svd.save_pretrained(tmp_path / "base")
    plan = Plan.__init__.__kwdefaults__
    monkeypatch.setitem(plan, "clips", 4)
    monkeypatch.setitem(plan, "batch_size", 2)
    monkeypatch.setitem(plan, "passes", 2)
    out, calls = tmp_path / "drag.jsonl", []
    whole = table.train

    def counted(*args: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args, **keywords)

    monkeypatch.setattr(table, "train", counted)
    command = ["bench", "drag", "--model", str(tmp_path / "base"), "--arm", "entity + Gaussian", "--arm", "point only",
               "--seeds", "1", "--scenes", "4", "--steps", "1", "--out", str(out)]  # fmt: skip
    assert run(command) == 130
    assert run(command) == 0
    assert len(calls) == 3, "the training that was done is not done again"
    records = read_jsonl(out)
    assert {"the true video: all", "still picture: all", "no control: start", "point only: camera"} <= {
        each.item for each in records
    }
    assert any(each.quantity == "less ObjMC than point only" for each in records)
    assert run([*command[:-2], "--arm", "everything"]) == 2
