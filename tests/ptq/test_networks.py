"""Networks of parallel branches: shapes, what a checkpoint keeps, and settings that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rep_models import SMALL, images, small

from tersor import zoo
from tersor.ptq.networks import RepNet, RepNetConfig, load_network


@pytest.mark.parametrize("kind", ["repvgg", "mobileone"])
def test_a_network_comes_back_from_its_folder(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = small(kind).eval()
    net.save_pretrained(tmp_path)
    again = RepNet.from_pretrained(tmp_path)
    assert again.config == net.config and not again.training
    with torch.no_grad():
        torch.testing.assert_close(again(images(3)), net(images(3)), rtol=0, atol=0)
    assert net(images(3)).shape == (3, len(net.config.classes))


def test_strides_are_those_of_each_stage_s_first_block() -> None:
    net = RepNet(RepNetConfig(kind="repvgg", **{**SMALL, "stem_stride": 2, "strides": (2, 1)})).eval()
    x, sides = images(1), []
    with torch.no_grad():
        for part in (net.stem, *net.stages):
            x = part(x)
            sides.append(x.shape[-1])
    assert sides == [8, 4, 4]


def test_pixels_are_shifted_and_divided() -> None:
    net = small()
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = (pixels.float() / 255 - net.config.mean) / net.config.deviation
    torch.testing.assert_close(net.normalize(pixels), expected)


@pytest.mark.parametrize(
    "settings", [{"kind": "resnet"}, {"widths": (16,)}, {"depths": (1, 2, 3)}, {"strides": (1,)}], ids=str
)
def test_settings_that_do_not_belong_together_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"kind|widths|depths|strides"):
        RepNetConfig(**{"kind": "repvgg", **SMALL, **settings})


def test_other_models_of_the_zoo_are_refused() -> None:
    assert load_network is zoo.load_network
    with pytest.raises(ValueError, match="tiny-lm classifies no images; tiny-repvgg"):
        load_network("tiny-lm")
    with pytest.raises(ValueError, match="no model 'resnet50'"):
        load_network("resnet50")
