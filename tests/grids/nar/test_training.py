"""NAR's training: token files, schedules, and runs that are killed and go on."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nar_models import TEXT, config, model

from tersor.grids.llamagen import LlamaGen, LlamaGenConfig
from tersor.grids.nar.heads import NARForImageGeneration
from tersor.grids.nar.tokens import Tokens
from tersor.grids.nar.training import NARTraining, check_tokens, sample_sheet, train
from tersor.training.claim import last_checkpoint


def tokens(n: int = 24, grid: tuple[int, ...] = (3, 4)) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 20, (n, *grid), generator=generator)
    return Tokens(ids, 20, {"class_labels": torch.arange(n) % 5})


def plan(**changes) -> NARTraining:
    settings = {"steps": 6, "batch_size": 4, "learning_rate": 1e-3, "schedule": "cosine", "save_every": 2, "seed": 3}
    return NARTraining(**{**settings, **changes})


def run(out: Path, plan_: NARTraining | None = None, **options) -> tuple[NARForImageGeneration, list[dict]]:
    of = model((3, 4))
    curve = train(of, tokens(), plan_ or plan(), out, held_out=tokens(8), quiet=True, **options)
    return of, curve


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(each, theirs[name]) for name, each in one.state_dict().items())


class Killed(BaseException):
    """What no handler of errors catches."""


class Killer:
    """Draws before the training, and kills at the next picture."""

    drawn = 0

    def __call__(self, of: torch.nn.Module) -> bytes:
        self.drawn += 1
        if self.drawn == 2:
            raise Killed
        return b""


def test_a_killed_run_goes_on_to_the_same_model(tmp_path) -> None:
    whole, curve = run(tmp_path / "whole")
    parts = plan(sample_every=3)
    with pytest.raises(Killed):
        run(tmp_path / "parts", parts, draw=Killer())
    assert last_checkpoint(tmp_path / "parts").name == "checkpoint-2"
    # A checkpoint that the kill has cut off does not count.
    half = tmp_path / "parts" / "checkpoint-3"
    half.mkdir()
    (half / "trainer_state.json").write_text("{", encoding="utf-8")
    drawn = sample_sheet(lambda ids: ids[:, None] / 20, class_labels=torch.tensor([0, 1]))
    resumed, again = run(tmp_path / "parts", parts, draw=drawn)
    assert same(whole, resumed)
    assert curve[-1] == again[-1] and curve[-1]["step"] == 6 and "eval_loss" in curve[-1]
    assert (tmp_path / "parts" / "samples" / "step-0000006.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_takes_no_further_step(tmp_path) -> None:
    first, curve = run(tmp_path)
    again, same_curve = run(tmp_path)
    assert same(first, again) and same_curve == curve
    assert same(first, NARForImageGeneration.from_pretrained(tmp_path / "model"))
    assert json.loads((tmp_path / "curve.json").read_text(encoding="utf-8")) == curve


def test_a_folder_belongs_to_one_training(tmp_path) -> None:
    run(tmp_path)
    for changed in (plan(steps=5), plan(seed=4), plan(steps=8, batch_size=3)):
        with pytest.raises(ValueError, match="another run"):
            run(tmp_path, changed)


def test_a_finished_run_goes_on_with_more_steps(tmp_path) -> None:
    flat = {"schedule": "constant"}
    whole, _ = run(tmp_path / "whole", plan(steps=10, **flat))
    run(tmp_path / "parts", plan(**flat))
    longer, curve = run(tmp_path / "parts", plan(steps=10, **flat))
    assert same(whole, longer) and curve[-1]["step"] == 10
    with pytest.raises(ValueError, match="another run"):
        run(tmp_path / "parts", plan(**flat))  # it is a run of ten steps now


def test_what_cannot_be_drawn_fails_before_the_first_step(tmp_path) -> None:
    of = model((3, 4))
    before = {name: each.clone() for name, each in of.state_dict().items()}

    def draw(shown: torch.nn.Module) -> bytes:
        raise RuntimeError("no such pixels")

    with pytest.raises(RuntimeError, match="no such pixels"):
        train(of, tokens(), plan(sample_every=5), tmp_path, draw=draw, quiet=True)
    assert all(torch.equal(each, before[name]) for name, each in of.state_dict().items())
    assert last_checkpoint(tmp_path) is None


def test_drawing_and_checkpointing_change_nothing(tmp_path) -> None:
    plain, _ = run(tmp_path / "a")
    drawn, _ = run(
        tmp_path / "b",
        plan(sample_every=1, gradient_checkpointing=True),
        draw=sample_sheet(lambda ids: ids[:, None] / 20, class_labels=torch.tensor([0, 1])),
    )
    assert len(list((tmp_path / "b" / "samples").iterdir())) == 7, "before the first step, and after each"
    for name, each in plain.state_dict().items():
        torch.testing.assert_close(each, drawn.state_dict()[name], atol=1e-6, rtol=1e-5)


def test_training_learns_and_takes_a_raster_model_too(tmp_path) -> None:
    raster = LlamaGen(
        LlamaGenConfig(vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_classes=5,
                       grid_size=(3, 4))
    )  # fmt: skip
    ids = torch.arange(12).view(1, 3, 4).expand(16, 3, 4).contiguous()
    data = Tokens(ids, 20, {"class_labels": torch.arange(16) % 5})
    for name, of in (("nar", model((3, 4))), ("raster", raster)):
        quick = plan(steps=60, learning_rate=2e-2, schedule="constant", save_every=0)
        curve = train(of, data, quick, tmp_path / name, held_out=data, quiet=True)
        assert curve[-1]["eval_loss"] < min(0.5, curve[0]["loss"] / 3), name


def test_texts_are_trained_on_too(tmp_path) -> None:
    of, ids = model((3, 4), **TEXT), tokens().ids
    features = torch.randn(24, 7, 10, generator=torch.Generator().manual_seed(1)).half()
    mask = torch.ones(24, 7, dtype=torch.uint8)
    mask[::2, :3] = 0
    curve = train(
        of, Tokens(ids, 20, {"text_features": features, "text_mask": mask}), plan(steps=2), tmp_path, quiet=True
    )
    assert math.isfinite(curve[-1]["loss"])


def test_schedules() -> None:
    paper = NARTraining(steps=600)
    rates = {step: paper.rate(step) for step in (0, 299, 300, 399, 400, 499, 500, 599)}
    expected = [1, 1, 0.2, 0.2, 0.04, 0.04, 0.008, 0.008]
    assert list(rates.values()) == pytest.approx(expected)
    cosine = NARTraining(steps=100, schedule="cosine", warmup_steps=10, final_share=0.1)
    assert [cosine.rate(0), cosine.rate(50), cosine.rate(100)] == pytest.approx([0.1, 0.55, 0.1])
    assert NARTraining(steps=10, schedule="constant").rate(9) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"schedule": "linear"}, {"warmup_steps": 7},
        {"final_share": 2.0}, {"betas": (0.9, 1.0)}, {"weight_decay": -1.0}, {"clip": 0.0}, {"save_every": -1},
    ],
)  # fmt: skip
def test_senseless_settings_are_refused(changes) -> None:
    with pytest.raises(ValueError, match=next(iter(changes)).split("_")[0]):
        plan(**changes)


def test_tokens_that_do_not_fit_are_refused_before_training(tmp_path) -> None:
    bad = {
        "vocabulary": Tokens(tokens().ids, 21, tokens().conditions),
        "grid": tokens(grid=(4, 4)),
        "condition is 'class'": Tokens(tokens().ids, 20, {}),
        "go up to 7": Tokens(tokens().ids, 20, {"class_labels": torch.full((24,), 7)}),
    }
    for message, each in bad.items():
        with pytest.raises(ValueError, match=message):
            train(model((3, 4)), each, plan(), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
    check_tokens(model((3, 4)), tokens())


WORKER = """
import sys
sys.path[:0] = [{support!r}, {here!r}]
import torch
from test_training import model, plan, tokens
from tersor.grids.nar.training import train
of = model((3, 4))
train(of, tokens(), plan(), {out!r}, held_out=tokens(8), quiet=True)
print("checksum", sum(each.double().sum().item() for each in of.state_dict().values()), flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_train_one_model(tmp_path) -> None:
    here = Path(__file__).resolve().parent
    script = tmp_path / "worker.py"
    out = tmp_path / "out"
    script.write_text(
        WORKER.format(support=str(here.parents[1] / "support"), here=str(here), out=str(out)), encoding="utf-8"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29613"]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    sums = {line for line in done.stdout.splitlines() if line.startswith("checksum")}
    assert len(sums) == 1, "both processes hold the same weights"
    curve = json.loads((out / "curve.json").read_text(encoding="utf-8"))
    assert curve[-1]["step"] == 6
    assert NARForImageGeneration.from_pretrained(out / "model").config.grid_size == config((3, 4)).grid_size
