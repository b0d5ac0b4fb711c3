"""Ask a live expert server whatever its OpenAPI document allows, and much that it does not: no answer may be of 500 on.

    python benchmarks/serving_fuzz.py --minutes 10

Schemathesis writes the requests; it reads this file too, for the hook below. The exit code is its own: 0 where nothing
was found.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import schemathesis

from tersor.experts.bench.skills import SKILLS
from tersor.experts.bench.soak import packed, serving
from tersor.experts.server.app import Server
from tersor.experts.server.batching import ContinuousBatcher
from tersor.experts.server.endpoint import ServerSettings
from tersor.experts.server.engine import Engine
from tersor.experts.server.fields import CHAT, COMPLETIONS
from tersor.experts.server.models import Models

NAMES = ("base", *SKILLS)
PROMPT = "bdac>"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
KNOWN = CHAT.honoured | COMPLETIONS.honoured


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Mend three of four requests for text, since one that is refused at its first fault says nothing of what comes
    after: they name a model that there is, leave unknown fields out, and half of them ask for a short answer.
    """
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        return body
    number = zlib.crc32(repr(body).encode())
    if number % 4 == 0:
        return body
    mended = {key: value for key, value in body.items() if key in KNOWN} | {"model": NAMES[number % len(NAMES)]}
    if number % 8 < 4:
        asked = {"messages": [{"role": "user", "content": PROMPT}]} if "messages" in body else {"prompt": PROMPT}
        mended |= {**asked, "max_tokens": 8, "logit_bias": {str(number % 64): 3.5}}
    return mended


def fuzz(seconds: float) -> tuple[int, Counter[int]]:
    """The exit code of Schemathesis after so many seconds at a server of this process, and the answers by status."""
    with tempfile.TemporaryDirectory() as folder:
        host, _ = packed(Path(folder))
        for name in SKILLS:
            (Path(folder) / name / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
        settings = ServerSettings(bank=Path(folder), max_body=100_000)
        with (
            Engine(host, ContinuousBatcher(host, places=16)) as engine,
            serving(Server(Models(host, engine), settings)) as at,
        ):
            command = [Path(sys.executable).parent / "schemathesis", "run", f"{at}openapi.json"]
            limits = ["--max-time", str(int(seconds)), "--max-examples", "1000000", "--request-timeout", "60"]
            limits += ["--phases", "coverage,fuzzing", "--include-path-regex", "/v1/"]
            more = ["--checks", "not_a_server_error", "--generation-database", "none", "--suppress-health-check", "all"]
            hooks = {"SCHEMATHESIS_HOOKS": Path(__file__).stem, "PYTHONPATH": os.pathsep.join([HERE, *sys.path])}
            code = subprocess.run([*command, *limits, *more], env={**os.environ, **hooks}, cwd=folder).returncode
            statuses: Counter[int] = Counter()
            text = httpx2.get(f"{at}metrics").text
            for status, count in re.findall(r'^tersor_requests_total{.*status="(\d+)"} (\S+)', text, re.MULTILINE):
                statuses[int(status)] += int(float(count))
            return code, statuses


HERE = str(Path(__file__).parent)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    found, answers = fuzz(60 * parser.parse_args().minutes)
    print("answers of the endpoints for text:", dict(sorted(answers.items())))
    sys.exit(found)
