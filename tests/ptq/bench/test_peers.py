"""Other libraries' quantizers: what they give is a quantized form of the same network."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tersor._lazy import MissingExtraError
from tersor.ptq.bench import peers
from tersor.ptq.reparam import merge


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_onnx_runtime_quantizes_the_merged_network(net) -> None:
    """Close to the network, though not it: 8 bits lose something, and ranges are those of the calibration."""
    given = images(24)
    quantized = peers.onnx_runtime(net, given)
    with torch.no_grad():
        exact = merge(net, given[:8])(given)
    found = quantized(given)
    assert found.shape == exact.shape
    error = (found - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.2
    # Beyond the ranges seen, codes saturate.
    with torch.no_grad():
        louder = merge(net, given[:8])(50 * given)
    assert (quantized(50 * given) - louder).norm() / louder.norm() > 3 * error
    assert logging.root.manager.disable == logging.NOTSET


def test_calibration_reads_every_image(net, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime.quantization as quantization

    read: list[torch.Tensor] = []
    library = quantization.quantize_static

    def noting(exact: str, file: str, reader: Any, **options: Any) -> None:
        while (batch := reader.get_next()) is not None:
            read.append(torch.from_numpy(batch["input"]))
        batches = iter([{"input": each.numpy()} for each in read])
        reader.get_next = lambda: next(batches, None)
        library(exact, file, reader, **options)

    monkeypatch.setattr(quantization, "quantize_static", noting)
    given = images(70)
    peers.onnx_runtime(net, given)
    assert [len(each) for each in read] == [64, 6]
    assert torch.equal(torch.cat(read), given)


def test_nncf_gets_the_merged_file_and_every_batch(
    net, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in for the library, which leaves the file as it is."""
    asked: dict[str, Any] = {}

    def quantize(model: Any, dataset: list, *, subset_size: int) -> Any:
        print("a progress bar")
        asked.update(sizes=[len(each["input"]) for each in dataset], subset_size=subset_size)
        return model

    library = ModuleType("nncf")
    library.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    library.quantize, library.Dataset = quantize, list  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nncf", library)
    assert peers.has_nncf()
    given = images(70)
    found = peers.nncf(net, given)(given)
    assert asked == {"sizes": [64, 6], "subset_size": 2}
    with torch.no_grad():
        torch.testing.assert_close(found, net.eval()(given), rtol=1e-3, atol=1e-4)
    captured = capsys.readouterr()
    assert "progress" not in captured.out and "a progress bar" in captured.err


def test_without_nncf_the_command_is_named(net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "installed", lambda name: False)
    assert not peers.has_nncf()
    with pytest.raises(MissingExtraError, match="pip install nncf"):
        peers.nncf(net, images(1))
