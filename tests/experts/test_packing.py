"""`pack` gives what is there for the same content, whatever it is called, and refuses any other content."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
from tuned_models import IDS, tuned

from tersor.experts import packing
from tersor.experts.config import DeltaConfig
from tersor.experts.delta import MANIFEST, ExpertDelta
from tersor.experts.packing import pack_expert
from tersor.training.claim import alone

pytestmark = [
    pytest.mark.filterwarnings("ignore:only .* calibration tokens"),
    pytest.mark.filterwarnings("ignore:no calibration data"),
]


@pytest.fixture(scope="module")
def folders(base: Any, expert: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, model in {"base": base, "expert": expert, "other": tuned(base, 7)}.items():
        model.save_pretrained(root / name)
    return root


def packed(folders: Path, out: Path, **changes: Any) -> ExpertDelta:
    what = {"base": folders / "base", "expert": folders / "expert", "config": DeltaConfig(), "calibration": IDS}
    what |= {"on_progress": lambda doing: None} | changes
    base, expert, config = (what.pop(name) for name in ("base", "expert", "config"))
    return pack_expert(base, expert, out / "math", config, **what)


def test_the_same_content_under_another_path_is_done(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed(folders, tmp_path / "bank")
    stamp = (tmp_path / "bank" / "math" / MANIFEST).stat().st_mtime_ns
    shutil.copytree(folders / "expert", tmp_path / "copy")
    (tmp_path / "link").symlink_to(folders / "base")
    monkeypatch.chdir(folders)
    packed(folders, tmp_path / "bank", base=Path("base"), expert=Path("./expert"))
    packed(folders, tmp_path / "bank", base=tmp_path / "link", expert=tmp_path / "copy")
    assert (tmp_path / "bank" / "math" / MANIFEST).stat().st_mtime_ns == stamp
    assert [path.name for path in (tmp_path / "bank").iterdir()] == ["math"]


def test_other_content_under_the_same_path_is_refused_by_name(folders: Path, tmp_path: Path) -> None:
    for name in ("base", "expert"):
        shutil.copytree(folders / name, tmp_path / name)
    packed(tmp_path, tmp_path / "bank")
    for name, changes in {"calibration": {"calibration": IDS[:2]}, "config": {"config": DeltaConfig(bits=4)}}.items():
        with pytest.raises(ValueError, match=f"holds another delta, of another {name}; "):
            packed(tmp_path, tmp_path / "bank", **changes)
    for name in ("expert", "base"):
        shutil.copyfile(folders / "other" / "model.safetensors", tmp_path / name / "model.safetensors")
        with pytest.raises(ValueError, match=f"another {name}"):
            packed(tmp_path, tmp_path / "bank")
        shutil.copyfile(folders / name / "model.safetensors", tmp_path / name / "model.safetensors")
    packed(tmp_path, tmp_path / "bank")


def test_finished_work_stays_until_the_delta_is_in_place(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(packing.ExpertDelta, "save_pretrained", full)
        with pytest.raises(OSError, match="disk full"):
            packed(folders, tmp_path)
    work = tmp_path / ".math.unfinished"
    times = {file.name: file.stat().st_mtime_ns for file in work.glob("*.safetensors")}
    assert len(times) == 14
    seen = []

    def look(doing: str) -> None:
        seen.append({file.name: file.stat().st_mtime_ns for file in work.glob("*.safetensors")})

    pack_expert(
        folders / "base", folders / "expert", tmp_path / "math", DeltaConfig(), calibration=IDS, on_progress=look
    )
    assert all(each == times for each in seen)
    assert not work.exists()


def test_a_cut_file_of_unfinished_work_is_named(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(packing.ExpertDelta, "save_pretrained", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            packed(folders, tmp_path)
    work = tmp_path / ".math.unfinished"
    file = sorted(work.glob("*.safetensors"))[3]
    for broken in (file, file.with_suffix(".json")):
        whole = broken.read_bytes()
        broken.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=f"{broken.name}.* remove"):
            packed(folders, tmp_path)
        broken.write_bytes(whole)
    file.with_suffix(".json").write_text(json.dumps({"shape": [3]}))
    with pytest.raises(ValueError, match=f"{file.with_suffix('.json').name}.* remove"):
        packed(folders, tmp_path)


def _hold(folder: str, ready: Any, over: Any) -> None:
    with alone(Path(folder)):
        ready.set()
        over.wait(60)


def test_a_second_run_into_one_folder_is_refused(folders: Path, tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn")
    ready, over = process.Event(), process.Event()
    other = process.Process(target=_hold, args=(str(tmp_path), ready, over))
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(ValueError, match="another run writes into"):
            packed(folders, tmp_path)
    finally:
        over.set()
        other.join()
    packed(folders, tmp_path)  # it let go when it ended
