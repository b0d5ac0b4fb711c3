"""Delta folders that are made once: whoever asks again for the same content gets what is there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tersor._errors import TersorError
from tersor.bench.runs import OnProgress
from tersor.experts.compress import Job
from tersor.experts.config import DeltaConfig
from tersor.experts.delta import MANIFEST, ExpertDelta
from tersor.training.claim import alone


def pack_expert(
    base: Any, expert: Any, folder: Path, config: DeltaConfig, *, calibration: Any, on_progress: OnProgress
) -> ExpertDelta:
    """The delta in ``folder``, which is made unless it is there; an interrupted run goes on beside it.

    Args:
        base: As `compress_expert` takes it, and so are ``expert``, ``calibration`` and ``on_progress``.
        folder: The delta's own, in a folder that no other run writes into meanwhile.
        config: Settings of the delta.

    Raises:
        TersorError: If ``folder`` holds a delta of another content, or another run is at work.
    """
    work = folder.with_name(f".{folder.name}.unfinished")
    with alone(folder.parent), Job.of(base, expert, config, calibration=calibration) as job:
        if (folder / MANIFEST).is_file():
            delta = ExpertDelta.from_pretrained(folder)
            known = delta.manifest.identity
            if other := [name for name, value in job.identity.items() if known[name] != value]:
                raise TersorError(
                    f"{folder} holds another delta, of another {' and another '.join(other)}; "
                    "remove it or give another --out"
                )
        else:
            delta = job.run(work, on_progress)
            delta.save_pretrained(folder)
        shutil.rmtree(work, ignore_errors=True)  # only now is it of no use
        return delta
