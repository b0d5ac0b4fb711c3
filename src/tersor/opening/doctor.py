"""Everything that is wrong with a data root or a run, at once."""

from __future__ import annotations

from pathlib import Path

from tersor.opening.data import Problem, read_data
from tersor.opening.judging.base import Question, Reply
from tersor.opening.judging.endpoint import EndpointJudge
from tersor.opening.judging.runner import changed_answers
from tersor.opening.outputs import ANSWERS, folders, model_folder, read_outputs
from tersor.opening.pictures import fault
from tersor.opening.records import Battle, Instance, Step
from tersor.opening.store import FILE, Store


def examine(path: Path, *, strict: bool = False) -> list[Problem]:
    """The problems of a run, or of a folder or file of instances.

    Args:
        path: What to look at.
        strict: Count pictures that are missing or broken as errors.
    """
    if path.is_dir() and (path / FILE).is_file():
        with Store.open(path) as store:
            return _run(store, strict)
    return read_data(path, skip_bad=True, strict=strict).problems


def ask_once(judge: EndpointJudge, store: Store | None) -> Reply:
    """One call to a judge, about the first battle of a run if it has one, else about two short texts.

    Raises:
        TersorError: If there is no verdict; the message says what is wrong.
    """
    if store is not None:
        instances = {each.uid: each for each in store.instances()}
        for battle in store.battles():
            answers = [store.outputs(model).get(battle.uid) for model in (battle.a, battle.b)]
            if battle.uid in instances and answers[0] is not None and answers[1] is not None:
                return judge.check(Question(battle, 0, instances[battle.uid], answers[0], answers[1]))
    instance = Instance("0000000", "0", "0", "0", "", "", (Step("Count to three in words."),), ())
    battle = Battle.of(instance.uid, instance.task, "x", "y")
    return judge.check(Question(battle, 0, instance, (Step("One, two, three."),), (Step("One, two."),)))


def _run(store: Store, strict: bool) -> list[Problem]:
    found, instances = [], store.instances()
    for instance in instances:
        for part, steps in (("input", instance.inputs), ("output", instance.gold)):
            for number, step in enumerate(steps):
                if step.image is not None and (said := fault(step.image)) is not None:
                    field = f"conversations.{part}[{number}].image"
                    found.append(Problem(instance.uid, field, f"{step.image} {said}"))
    uids = [each.uid for each in instances]
    for folder in folders(store.folder / ANSWERS):
        outputs = read_outputs(folder, uids, strict=strict)
        found += outputs.problems
        found += [Problem(str(folder), "", f"answers {uid}, which the run lacks", "warning") for uid in outputs.unknown]
    for model in store.models():
        lacking = len(set(uids) - set(store.outputs(model)))
        if lacking:
            said = f"has no answer to {lacking} of {len(uids)} instances"
            found.append(Problem(str(model_folder(store.folder / ANSWERS, model)), "", said, "warning"))
    for model, uid in changed_answers(store):
        found.append(
            Problem(str(model_folder(store.folder / ANSWERS, model)), uid, "was changed after it was recorded")
        )
    return found
