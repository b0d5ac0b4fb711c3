"""Battles and verdicts as a log of Inspect AI, whose viewer and tables then read them.

The format is version 2 of its JSON logs (https://inspect.aisi.org.uk/eval-logs.html): a battle is a sample, its score
is that of the model called A, and the win rates are the results. Nothing of Inspect is needed to write it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from tersor.opening.pictures import as_jpeg
from tersor.opening.ranking import METRICS, rate, tallies
from tersor.opening.records import Battle, Instance, Raw, Step, Verdict
from tersor.opening.store import Store

#: Longest side of a picture in pixels.
SIDE = 512
_SCORES = {"A": 1.0, "B": 0.0}


def inspect_log(store: Store, judge: str, *, prompt: str | None = None) -> str:
    """The log of one judge's run as JSON.

    Args:
        store: The run.
        judge: Its id; 'human' is the consensus of all people.
        prompt: Hash of a prompt, needed where the judge was asked with several.

    Raises:
        TersorError: If there is no such judge, or it was asked with several prompts and none is named.
    """
    verdicts = {each.battle: each for each in store.verdicts(judge, prompt=prompt)}
    raw: dict[str, list[Raw]] = {}
    for row in (row for who in store.members(judge) for row in store.raw(who, prompt=prompt, rep=0)):
        raw.setdefault(row.battle, []).append(row)
    instances = {each.uid: each for each in store.instances()}
    outputs = {model: store.outputs(model) for model in store.models()}
    asked = [each for each in store.battles() if each.id in raw and each.uid in instances]
    samples = [
        _sample(each, instances[each.uid], [outputs.get(m, {}).get(each.uid, ()) for m in (each.a, each.b)],
                verdicts.get(each.id), raw[each.id])
        for each in asked
    ]  # fmt: skip
    times = sorted(row.time for rows in raw.values() for row in rows)
    log = {
        "version": 2,
        "status": "success" if len(verdicts) == len(store.battles()) else "cancelled",
        "eval": {
            "run_id": store.folder.name, "created": _time(times[:1]), "task": "opening", "task_id": "opening",
            "task_version": 0, "dataset": {"name": "opening", "samples": len(samples),
                                           "sample_ids": [each.id for each in asked], "shuffled": False},
            "model": judge, "config": {},
            "metadata": {"prompt_hash": prompt or next(iter(store.prompts(judge)), "")},
        },
        "plan": {"name": "plan", "steps": [], "config": {}},
        "results": _results(list(verdicts.values()), len(asked)),
        "stats": {"started_at": _time(times[:1]), "completed_at": _time(times[-1:]), "model_usage": {}},
        "samples": samples,
    }  # fmt: skip
    return json.dumps(log, allow_nan=False, indent=1)


def _sample(
    battle: Battle, instance: Instance, answers: Sequence[Sequence[Step]], verdict: Verdict | None, raw: Sequence[Raw]
) -> dict[str, Any]:
    content = [*_parts("Task", instance.inputs), *_parts("Answer A", answers[0]), *_parts("Answer B", answers[1])]
    said = "\n".join(f"{'B' if row.order else 'A'} first: {row.text or row.label or row.status}" for row in raw)
    about = {"uid": battle.uid, "task": battle.task, "a": battle.a, "b": battle.b}
    sample: dict[str, Any] = {
        "id": battle.id, "epoch": 1, "input": [{"role": "user", "content": content}], "target": "",
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": said}],
        "metadata": about, "store": {}, "events": [], "model_usage": {}, "attachments": {},
    }  # fmt: skip
    if verdict is not None:
        verdict = verdict if verdict.a == battle.a else verdict.flipped()
        sample["scores"] = {"pairwise": {
            "value": _SCORES.get(verdict.label, 0.5), "answer": verdict.label, "explanation": said,
            "metadata": about | {"probability": verdict.probability, "consistent": verdict.consistent},
        }}  # fmt: skip
    return sample


def _parts(title: str, steps: Sequence[Step]) -> list[dict[str, str]]:
    found = [{"type": "text", "text": f"{title}:"}]
    for step in steps:
        found.append({"type": "text", "text": step.text})
        if step.image is not None and step.image.is_file():
            picture = base64.b64encode(as_jpeg(step.image, SIDE)).decode()
            found.append({"type": "image", "image": f"data:image/jpeg;base64,{picture}"})
    return found


def _results(verdicts: Sequence[Verdict], asked: int) -> dict[str, Any]:
    standing = tallies(verdicts)
    return {
        "total_samples": asked,
        "completed_samples": len(verdicts),
        "scores": [
            {
                "name": metric, "scorer": "pairwise", "params": {},
                "metrics": {
                    model: {"name": model, "value": value, "params": {}}
                    for model, tally in standing.items() if (value := rate(tally, metric)) is not None
                },
            }
            for metric in METRICS
        ],
    }  # fmt: skip


def _time(times: Sequence[float]) -> str:
    return datetime.fromtimestamp(times[0] if times else 0, UTC).isoformat(timespec="seconds")
