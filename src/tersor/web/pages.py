"""Templates that are filled with text from anywhere."""

from __future__ import annotations

import jinja2


def templates(package: str) -> jinja2.Environment:
    """The templates of a package: everything filled in is escaped, and a name that is missing is an error."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
