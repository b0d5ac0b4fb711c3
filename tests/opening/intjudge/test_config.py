"""Settings that would train something else are refused."""

from __future__ import annotations

import pytest
from judges import config

from tersor._errors import TersorError


def test_the_defaults_are_those_of_the_docs(tmp_path) -> None:
    made = config(tmp_path)
    assert (made.max_length, made.packing, made.rank_weight, made.swap_weight) == (None, False, 0.0, 0.0)
    assert made.both_orders and made.lr_scheduler_type == "cosine"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank_weight": -1.0}, "rank_weight=-1.0 must not be negative"),
        ({"swap_weight": float("nan")}, "swap_weight=nan must not be negative"),
        ({"max_length": 1024}, "would part pictures"),
        ({"per_device_train_batch_size": 3}, "must be even"),
        ({"swap_weight": 1.0, "both_orders": False}, "needs both_orders=True"),
    ],
)
def test_what_would_train_something_else_is_refused(tmp_path, changes, said) -> None:
    with pytest.raises(TersorError, match=said):
        config(tmp_path, **changes)
