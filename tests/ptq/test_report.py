"""What `tersor quantize` reports: tallies of files on the same images, records by hand, and the page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tersor.ptq import report
from tersor.ptq.blocks import BlockReport
from tersor.ptq.config import RepAPQConfig
from tersor.ptq.onnx_export import OnnxFile
from tersor.ptq.report import FLOAT, OURS, PLAIN, Comparison, compare_files, file_records, report_section

#: What each file answers to four images.
GUESSES = {FLOAT: [0, 1, 2, 0], OURS: [0, 1, 2, 1], PLAIN: [0, 0, 0, 0]}


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, OnnxFile]:
    """Files whose sessions answer as `GUESSES` says; an image is its number."""

    def run(name: str, images: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor([GUESSES[name][int(i)] for i in images.flatten()]), 3).float()

    monkeypatch.setattr(report, "session", lambda path: path.name)
    monkeypatch.setattr(report, "run", run)
    sizes = {FLOAT: 400, OURS: 100, PLAIN: 90}
    return {name: OnnxFile(Path(name), size, {"QLinearConv": 3}, False) for name, size in sizes.items()}


def test_agreement_is_counted_without_classes(files: dict[str, OnnxFile]) -> None:
    found = compare_files(files, torch.arange(4)[:, None])
    assert not found.labelled
    assert {name: (tally.n, tally.same, tally.right) for name, tally in found.tallies.items()} == {
        FLOAT: (4, 4, 0), OURS: (4, 3, 0), PLAIN: (4, 2, 0),
    }  # fmt: skip


def test_accuracy_is_counted_over_batches_with_classes(files: dict[str, OnnxFile]) -> None:
    batches = iter([(torch.tensor([[0], [1]]), torch.tensor([0, 1])), (torch.tensor([[2], [3]]), torch.tensor([1, 1]))])
    found = compare_files(files, batches)
    assert found.labelled
    assert {name: (tally.n, tally.same, tally.right) for name, tally in found.tallies.items()} == {
        FLOAT: (4, 4, 2), OURS: (4, 3, 3), PLAIN: (4, 2, 1),
    }  # fmt: skip


def test_records_have_the_plain_quantizer_beside_ours(files: dict[str, OnnxFile]) -> None:
    images = [(torch.arange(4)[:, None], torch.tensor([0, 1, 1, 1]))]
    accuracy, agreement, size = file_records("net", "w8a8", compare_files(files, iter(images)), seed=5)
    assert (accuracy.measured, accuracy.baseline, accuracy.peer, accuracy.n) == (0.75, 0.5, 0.25, 4)
    assert (agreement.measured, agreement.baseline, agreement.peer) == (0.75, 1.0, 0.5)
    assert (size.measured, size.peer, size.low) == (0.25, 90 / 400, None)
    assert {each.peer_name for each in (accuracy, agreement, size)} == {PLAIN}
    assert {(each.item, each.seed, each.system) for each in (accuracy, size)} == {("net, w8a8", 5, "quantize")}
    unlabelled = file_records("net", "w8a8", compare_files(files, torch.arange(4)[:, None]), seed=5)
    assert [each.quantity for each in unlabelled] == [agreement.quantity, size.quantity]


def test_the_page_says_what_is_simulated_and_names_every_layer(files: dict[str, OnnxFile]) -> None:
    facts = {
        "weight_bits": 4, "activation_bits": 8, "a_scale": 0.5, "w_scale_least": 0.1, "w_scale_largest": 0.2,
        "rows_cut_off": 0.25,
    }  # fmt: skip
    blocks = [BlockReport("stem", 0.2, 0.1, {"conv": facts, "": facts})]
    found = compare_files(files, torch.arange(4)[:, None])
    section = report_section(RepAPQConfig(), blocks, found, "the calibration")
    assert "100 bytes instead of 400" in section.intro and "simulated" not in section.intro
    assert [answer.method for answer in section.samples[0].answers] == ["stem.conv", "stem"]
    assert "weights 4 bits, scales 0.1 to 0.2, 25 % of rows cut off" in section.samples[0].answers[0].text
    assert len(section.figures) == 2
    tallies = dict(found.tallies)
    tallies[OURS] = report.Tally(OnnxFile(Path(OURS), 100, {}, True), 4, 0, 3)
    assert "no gain over 8 bits" in report_section(RepAPQConfig(), blocks, Comparison(tallies), "x").intro
