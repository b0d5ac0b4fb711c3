"""Authors' checkpoints: found in their files, and loaded only if every name and shape is right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tersor.grids.original import check_tensors, load_strictly, read_weights

WEIGHTS = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.tensor([1.0, -1.0])}


@pytest.fixture
def model() -> nn.Linear:
    return nn.Linear(3, 2, device="meta")


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {"model": WEIGHTS, "step": 3},
        {"ema": WEIGHTS, "model": {"weight": torch.zeros(1)}},
        {"optimizer": {}, "model": WEIGHTS},
    ],
)
def test_weights_are_found_under_the_first_key_that_is_there(tmp_path: Path, content) -> None:
    torch.save(content, tmp_path / "c.pt")
    found = read_weights(tmp_path / "c.pt", ("ema", "model"))
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[name], each) for name, each in WEIGHTS.items())


@pytest.mark.parametrize(
    "content", [{"step": 3}, {"other": WEIGHTS}, [1], {"ema": {"model": WEIGHTS}}, WEIGHTS["bias"]]
)
def test_what_holds_no_tensors_is_refused(tmp_path: Path, content) -> None:
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt holds no state dict"):
        read_weights(tmp_path / "c.pt", ("ema", "model"))


def test_a_state_dict_is_passed_on_as_it_is() -> None:
    assert check_tensors(WEIGHTS, "c.pt") is WEIGHTS


def test_the_model_gets_copies(tmp_path: Path, model: nn.Linear) -> None:
    torch.save(WEIGHTS, tmp_path / "c.pt")
    weights = read_weights(tmp_path / "c.pt", ())
    load_strictly(model, weights, tmp_path / "c.pt", "linear")
    for name, each in model.state_dict().items():
        assert torch.equal(each, WEIGHTS[name])
        assert each.untyped_storage().data_ptr() != weights[name].untyped_storage().data_ptr()
        assert each.untyped_storage().filename is None, "not mapped from the file"


def test_every_difference_is_listed(model: nn.Linear) -> None:
    wrong = {"weight": torch.zeros(3, 2), "extra": torch.zeros(1)}
    message = (
        r"^c\.pt is no linear: missing \['bias'\], unknown \['extra'\], "
        r"other shapes \['weight: \(3, 2\), not \(2, 3\)'\]$"
    )
    with pytest.raises(ValueError, match=message):
        load_strictly(model, wrong, "c.pt", "linear")
    with pytest.raises(ValueError, match=r"missing \[\], unknown \[\], other shapes \['bias: \(3,\), not \(2,\)'\]"):
        load_strictly(model, {**WEIGHTS, "bias": torch.zeros(3)}, "c.pt", "linear")
    assert model.weight.is_meta, "nothing was loaded"
