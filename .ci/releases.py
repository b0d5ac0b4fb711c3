"""Print constraints.txt with some packages moved: `releases.py oldest|newest NAME...`, run from the repository's root.

A moved package loses its pin. `oldest` pins it to the lower bound of pyproject.toml instead, if that names the package;
`newest` leaves it to the installer, which takes the newest release that pyproject.toml allows.
"""

import re
import sys
import tomllib
from pathlib import Path

if len(sys.argv) < 3 or sys.argv[1] not in ("oldest", "newest"):
    sys.exit("usage: releases.py oldest|newest NAME...")
which, names = sys.argv[1], sys.argv[2:]

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
requirements = [
    *project["dependencies"],
    *(each for extra in project["optional-dependencies"].values() for each in extra),
]
found = (re.match(r"([\w.-]+)>=([\w.]+)", each) for each in requirements)
lowest = dict(each.groups() for each in found if each)
lines = Path("constraints.txt").read_text().splitlines()
pinned = {line.partition("==")[0] for line in lines}

for name in names:
    if name not in pinned:
        sys.exit(f"{name} has no pin in constraints.txt, so it cannot be moved; add one, or name another package")
print(*(line for line in lines if line.partition("==")[0] not in names), sep="\n")
if which == "oldest":
    print(*(f"{name}=={lowest[name]}" for name in names if name in lowest), sep="\n")
