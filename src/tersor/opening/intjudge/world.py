"""A world in which judges can be trained in minutes: small tasks of opening-mini, generators with known faults, people.

An instance asks for a picture of one thing. Answers are the gold answer with a wrong colour or without its picture;
people prefer fewer faults. All of it is drawn by a seed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tersor import _atomic
from tersor.opening.generators.scripted import ScriptedGenerator
from tersor.opening.intjudge.pairs import Source
from tersor.opening.intjudge.references import referenced
from tersor.opening.judging.base import Question
from tersor.opening.judging.scripted import ScriptedJudge, fewer_faults
from tersor.opening.outputs import Answer
from tersor.opening.pictures import save_jpeg
from tersor.opening.prompts import JudgePrompt
from tersor.opening.records import Battle, Instance, Label, Raw, Step, Verdict, from_one_order
from tersor.opening.sampling import roaming
from tersor.opening.scenes import COLOURS, SHAPES, Scene, describe, draw

#: What a judge of this world is asked with: words that its small tokenizer knows.
PROMPT = JudgePrompt(system="Judge.", question="Which is better?")
STEPS = 1
#: Generators of the battles that judges are trained on, and those that they meet at the end alone.
SEEN = (
    ScriptedGenerator(name="seen 1", p_wrong_colour=0.1),
    ScriptedGenerator(name="seen 2", p_wrong_colour=0.3, p_missing_image=0.05),
    ScriptedGenerator(name="seen 3", p_wrong_colour=0.5, p_missing_image=0.1),
    ScriptedGenerator(name="seen 4", p_wrong_colour=0.7, p_missing_image=0.1),
)
UNSEEN = (
    ScriptedGenerator(name="unseen 1", p_wrong_colour=0.2, p_missing_image=0.05),
    ScriptedGenerator(name="unseen 2", p_wrong_colour=0.6, p_missing_image=0.15),
)
#: Standard deviation of what people add to the difference of faults.
NOISE = 0.3


class World:
    """Instances, answers and battles by a seed; pictures are files of a folder, each kept once.

    Args:
        folder: For the pictures.
        seed: Of everything drawn.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed

    def rng(self, what: str) -> random.Random:
        """A generator for one use."""
        return random.Random(f"{self.seed}:{what}")

    def instances(self, n: int, *, first: int = 0) -> list[Instance]:
        """``n`` tasks; those from ``first`` on are others, whose content may be the same."""
        return [self._instance(first + number) for number in range(n)]

    def _instance(self, number: int) -> Instance:
        rng = self.rng(str(number))
        scenes = [self.scene(rng) for _ in range(STEPS)]
        wish = Step("Draw " + " and then ".join(describe(scene) for scene in scenes))
        gold = self._steps(Answer(tuple((describe(scene), draw(scene)) for scene in scenes)))
        return Instance(f"0101{number:05}", "01", "01", f"{number:05}", "scenes", "scenes", (wish,), gold)

    @staticmethod
    def scene(rng: random.Random) -> Scene:
        """One thing somewhere."""
        return {rng.randrange(9): (rng.choice(list(COLOURS)), rng.choice(SHAPES))}

    def answers(self, generator: ScriptedGenerator, instances: Sequence[Instance]) -> dict[str, tuple[Step, ...]]:
        """What a generator answers, by instance."""
        return {each.uid: self._steps(generator.generate(each, n_steps=STEPS, seed=self.seed)) for each in instances}

    def arena(self, instances: Sequence[Instance], generators: Sequence[ScriptedGenerator], battles: int) -> Source:
        """Battles with the verdicts of people, who see each in one order; equal answers are asked about nobody."""
        answers = {each.name: self.answers(each, instances) for each in generators}
        pairs = len(generators) * (len(generators) - 1) // 2
        sampled = roaming(instances, list(answers), min(pairs, 2 + battles // len(instances)), self.seed)
        known = {each.uid: each for each in instances}
        people = ScriptedJudge(fewer_faults, name="people", noise=NOISE, seed=self.seed)
        verdicts: list[Verdict] = []
        for battle in sampled:
            first, second = answers[battle.a][battle.uid], answers[battle.b][battle.uid]
            label = people.decide(Question(battle, 0, known[battle.uid], first, second))
            if first != second and len(verdicts) < battles and fewer_faults(known[battle.uid], first, second):
                verdicts.append(from_one_order(battle, Raw(battle.id, "human:people", label=label)))
        return Source("arena", list(instances), answers, verdicts)

    def references(self, instances: Sequence[Instance], generators: Sequence[ScriptedGenerator]) -> Source:
        """Each generator's answer with the gold answer at hand against its plain one; nobody is asked."""
        answers: dict[str, dict[str, tuple[Step, ...]]] = {}
        verdicts: list[Verdict] = []
        for plain in generators:
            better = referenced(plain)
            answers |= {each.name: self.answers(each, instances) for each in (plain, better)}
            for instance in instances:
                battle = Battle.of(instance.uid, instance.task, better.name, plain.name)
                verdicts.append(from_one_order(battle, Raw(battle.id, "reference", label="A")))
        return Source("reference", list(instances), answers, verdicts)

    def colours_alone(self, n: int, *, first: int) -> Source:
        """Battles of answers of equal length whose only difference is one wrong colour in one of them."""
        instances, verdicts = self.instances(n, first=first), list[Verdict]()
        answers: dict[str, dict[str, tuple[Step, ...]]] = {"right": {}, "wrong": {}}
        for instance in instances:
            rng = self.rng(f"{instance.uid}:colours")
            worse = replace(UNSEEN[0], p_wrong_colour=1.0, p_missing_image=0.0)
            wrong = self._steps(worse.generate(instance, n_steps=STEPS, seed=self.seed))
            place = rng.randrange(STEPS)
            answers["right"][instance.uid] = instance.gold
            answers["wrong"][instance.uid] = tuple(
                (wrong if number == place else instance.gold)[number] for number in range(STEPS)
            )
            sides = ("right", "wrong") if rng.random() < 0.5 else ("wrong", "right")
            battle = Battle.of(instance.uid, instance.task, *sides)
            label: Label = "A" if battle.a == "right" else "B"
            verdicts.append(from_one_order(battle, Raw(battle.id, "human:people", label=label)))
        return Source("arena", instances, answers, verdicts)

    def _steps(self, answer: Answer) -> tuple[Step, ...]:
        return tuple(Step(text, None if picture is None else self._kept(picture)) for text, picture in answer.steps)

    def _kept(self, picture: object) -> Path:
        data = save_jpeg(picture)
        file = self.folder / f"{hashlib.sha256(data).hexdigest()[:16]}.jpg"
        if not file.is_file():
            _atomic.write_bytes(file, data)
        return file
