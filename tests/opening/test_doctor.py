"""The doctor finds everything at once."""

from __future__ import annotations

import shutil

import pytest
from arena import fill
from mock_judge import running

from tersor._errors import TersorError
from tersor.opening.doctor import ask_once, examine
from tersor.opening.judging.endpoint import EndpointJudge
from tersor.opening.outputs import ANSWERS, model_folder


def test_all_problems_of_a_data_root_are_listed(mini_root, tmp_path) -> None:
    assert examine(mini_root) == []
    shutil.copytree(mini_root, tmp_path / "data")
    file = tmp_path / "data" / "test_data.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(["{", *lines[1:], "[]", lines[5]]))
    sorted((tmp_path / "data" / "images").rglob("*.jpg"))[9].unlink()
    found = examine(tmp_path / "data")
    assert sorted(each.level for each in found) == ["error", "error", "warning", "warning"]


def test_all_problems_of_a_run_are_listed(store, mini_root, tmp_path) -> None:
    shutil.copytree(mini_root, tmp_path / "data")
    fill(store, tmp_path / "data", ["x", "y"], count=4)
    assert examine(store.folder) == []
    folder, uids = model_folder(store.folder / ANSWERS, "y"), [each.uid for each in store.instances()]
    (folder / f"{uids[0]}-o-0.jpg").write_bytes(b"")
    (folder / f"{uids[1]}.json").unlink()
    (folder / "8888888.json").write_text('{"conversations": [{"input": []}, {"output": []}]}')
    store.instances()[2].gold[0].image.unlink()
    said = [str(each) for each in examine(store.folder)]
    for part in (f"{uids[0]}-o-0.jpg is no picture", "8888888, which the run lacks", "was changed after", "is missing"):
        assert any(part in each for each in said), (part, said)


def test_one_question_tells_whether_a_judge_works(store, mini_root) -> None:
    with running() as server:
        judge = EndpointJudge(server.base, "mock")
        assert ask_once(judge, None).label is not None
        fill(store, mini_root, ["x", "y"], count=2)
        assert ask_once(judge, store).label is not None
        assert server.stats()["requests"] == 2
    with running(always="prose") as server, pytest.raises(TersorError, match="unparsed: Both answers"):
        ask_once(EndpointJudge(server.base, "mock"), None)
    with pytest.raises(TersorError, match="ConnectError"):
        ask_once(EndpointJudge(server.base, "mock"), None)
