"""Calibration images as users have them give what a tensor of the same images gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from rep_models import images, small
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tersor.ptq import inputs
from tersor.ptq.calibration import quantize
from tersor.ptq.config import RepAPQConfig
from tersor.ptq.inputs import as_images

GIVEN = images(6)
FORMS: dict[str, Any] = {
    "a tensor": GIVEN,
    "a tensor of doubles": GIVEN.double(),
    "an array": GIVEN.numpy(),
    "a list of images": list(GIVEN),
    "a list of arrays": [each.numpy() for each in GIVEN],
    "images with labels": [(each, 3) for each in GIVEN],
    "batches": list(torch.split(GIVEN, 4)),
    "a loader": DataLoader(TensorDataset(GIVEN, torch.zeros(6)), batch_size=4),
    "batches by name": [{"pixel_values": part, "labels": 0} for part in torch.split(GIVEN, 4)],
    "a generator": (part for part in torch.split(GIVEN, 4)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_images(form: str) -> None:
    found = as_images(FORMS[form], small())
    assert found.dtype == torch.float32
    assert torch.equal(found, GIVEN.float())


def test_pictures_of_eight_bits_are_normalized_as_the_model_says() -> None:
    pixels = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    timms = nn.Conv2d(3, 3, 1)
    timms.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)}
    wanted = (pixels / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.1, 0.2, 0.3])[
        :, None, None
    ]
    pictures = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in pixels]
    for given in (pixels, pixels.permute(0, 2, 3, 1).numpy(), pictures):
        assert torch.allclose(as_images(given, timms), wanted)
    net = small()
    assert torch.equal(as_images(pixels, net), net.normalize(pixels))
    with pytest.raises(ValueError, match="does not say how pictures of uint8"):
        as_images(pixels, nn.Conv2d(3, 3, 1))


def test_what_holds_no_images_is_refused_in_one_line() -> None:
    sizes = (torch.zeros(3, 4, 4), torch.zeros(3, 5, 5))
    for given, says in (("photos/", "not str"), ((), r"got \(0,\)"), ((1, 2), "yields int"), (sizes, "one size")):
        with pytest.raises((ValueError, TypeError), match=says):
            as_images(given, small())
    with pytest.raises(TypeError, match=r"torch\.int64; give floats"):
        as_images(torch.zeros(2, 3, 4, 4, dtype=torch.int64), small())
    with pytest.raises(ValueError, match=r"\[n, channels, height, width\], got \(3, 4, 4\)"):
        as_images(torch.zeros(3, 4, 4), small())


def test_a_loader_without_end_is_read_until_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MOST", 10)
    told: list[str] = []
    endless = iter(lambda: GIVEN[:4], None)
    assert len(as_images(endless, small(), told.append)) == 10
    assert told == ["the first 10 images are taken"]


def test_a_loader_calibrates_as_its_tensor_does() -> None:
    config = RepAPQConfig(iterations=2)
    net = small().eval()
    one, other = (quantize(net, FORMS[form], config).model for form in ("a tensor", "a loader"))
    assert all(torch.equal(each, other.state_dict()[name]) for name, each in one.state_dict().items())
