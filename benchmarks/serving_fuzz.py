"""Ask a live expert server whatever its OpenAPI document allows, and much that it does not: no answer may be of 500 on.

    python benchmarks/serving_fuzz.py --minutes 10

Schemathesis writes the requests; it reads this file too, for the hook below. The exit code is its own: 0 where nothing
was found.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import schemathesis

from tersor.experts.bench.skills import SKILLS
from tersor.experts.bench.soak import packed, serving
from tersor.experts.server.app import Server
from tersor.experts.server.batching import ContinuousBatcher
from tersor.experts.server.endpoint import ServerSettings
from tersor.experts.server.engine import Engine
from tersor.experts.server.models import Models

NAMES = ("base", *SKILLS)


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Have three of four requests name a model that there is, since the others are refused before all else."""
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        number = zlib.crc32(repr(body).encode())
        if number % 4:
            return {**body, "model": NAMES[number % len(NAMES)]}
    return body


def fuzz(seconds: float) -> int:
    """The exit code of Schemathesis after so many seconds at a server of this process."""
    with tempfile.TemporaryDirectory() as folder:
        host, _ = packed(Path(folder))
        settings = ServerSettings(bank=Path(folder), max_body=100_000)
        with (
            Engine(host, ContinuousBatcher(host, places=16)) as engine,
            serving(Server(Models(host, engine), settings)) as at,
        ):
            command = [Path(sys.executable).parent / "schemathesis", "run", f"{at}openapi.json"]
            limits = ["--max-time", str(int(seconds)), "--max-examples", "1000000", "--request-timeout", "60"]
            more = ["--checks", "not_a_server_error", "--generation-database", "none", "--suppress-health-check", "all"]
            hooks = {"SCHEMATHESIS_HOOKS": Path(__file__).stem, "PYTHONPATH": os.pathsep.join([HERE, *sys.path])}
            return subprocess.run([*command, *limits, *more], env={**os.environ, **hooks}, cwd=folder).returncode


HERE = str(Path(__file__).parent)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    sys.exit(fuzz(60 * parser.parse_args().minutes))
