"""A router's settings, and folders that hold none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from router_models import EXPERTS, rules, trained

from tersor.experts.router.config import RouterConfig
from tersor.experts.router.routing import Router


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "magic"}, "router kind"),
        ({"experts": {"one": "alone"}}, "at least two"),
        ({"experts": {"../x": "a", "b": "b"}}, "plain name"),
        ({"experts": {"a": "", "b": "b"}}, "description"),
        ({"experts": {"a": "two\nlines", "b": "b"}}, "description"),
        ({"threshold": 1.5}, "threshold"),
        ({"fallback": "../x"}, "fallback"),
        ({"max_tokens": 2}, "max_tokens"),
    ],
)
def test_impossible_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouterConfig(**{"kind": "rules", "experts": EXPERTS, **change})


def test_broken_folders(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"no router\.json"):
        Router.from_pretrained(tmp_path)
    rules().save_pretrained(tmp_path)
    file = tmp_path / "router.json"
    values = json.loads(file.read_text())
    for change, message in (
        ({"format_version": 2}, "upgrade"),
        ({"format_version": 1, "colour": "red"}, "describes no router"),
        ({"format_version": 1, "kind": "encoder"}, r"no config\.json"),
    ):
        file.write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=message):
            Router.from_pretrained(tmp_path)
    file.write_text("{")
    with pytest.raises(ValueError, match="describes no router"):
        Router.from_pretrained(tmp_path)
    router = trained(folders, "embedding", steps=1)
    router.save_pretrained(tmp_path / "head")
    (tmp_path / "head" / "router_head.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="no head"):
        Router.from_pretrained(tmp_path / "head")
