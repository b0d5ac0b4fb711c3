"""Invariant 14: the published accounting to the digit, and the byte formula against encoded tensors."""

from __future__ import annotations

import pytest

from tersor.kv.zipcache import ZipCache
from tersor.lowbit.bytes import nominal_compression_ratio, parameter_count

UNIFORM = {"bits": 4, "batch": 8, "tokens": 4096, "width": 4096}


def check_published_ratios(nominal) -> None:
    assert nominal("mixed", bits=0.6 * 4 + 0.4 * 2, batch=8, tokens=840, width=4096) == pytest.approx(4.985, abs=5e-4)
    assert nominal("mixed", bits=0.7 * 4 + 0.3 * 2, batch=8, tokens=840, width=4096) == pytest.approx(4.692, abs=5e-4)
    assert nominal("groupwise", **UNIFORM) == pytest.approx(3.20, abs=5e-3)
    assert nominal("tokenwise", **UNIFORM) == pytest.approx(3.99, abs=5e-3)
    assert nominal("channel_separable", **UNIFORM) == pytest.approx(4.00, abs=5e-3)


def test_published_ratios() -> None:
    check_published_ratios(nominal_compression_ratio)
    assert ZipCache(saliency_ratio=0.6).nominal_compression_ratio() == pytest.approx(4.985, abs=5e-4)
    assert ZipCache(saliency_ratio=0.7).nominal_compression_ratio() == pytest.approx(4.692, abs=5e-4)


def test_the_ratios_catch_free_parameters() -> None:
    def without_parameters(scheme, *, bits, **shape):
        return 16 / bits

    with pytest.raises(AssertionError):
        check_published_ratios(without_parameters)


def test_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of"):
        parameter_count("rowwise", batch=1, tokens=1, width=1)  # type: ignore[arg-type]
