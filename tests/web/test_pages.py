from __future__ import annotations

import jinja2
import pytest

from tersor.web.pages import templates


def test_what_is_filled_in_is_text_and_a_missing_name_is_an_error() -> None:
    environment = templates("tersor.opening.page")
    assert environment.from_string("{{ x }}").render(x="<b>") == "&lt;b&gt;"
    with pytest.raises(jinja2.UndefinedError):
        environment.from_string("{{ x }}").render()
