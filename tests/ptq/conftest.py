"""An untrained network with unruly kernels."""

from __future__ import annotations

import pytest
from rep_models import unruly

from tersor.ptq.networks import RepNet


@pytest.fixture(scope="module")
def net() -> RepNet:
    return unruly()
