"""Reference-augmented generation: a generator answers once plainly and once with the gold answer at hand.

The second answer counts as the better one, so such pairs need no votes (OpenING, arXiv 2411.18499, section 4.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar, overload

from tersor._errors import TersorError
from tersor.opening.generators.base import Family, InterleavedGenerator, generate_all
from tersor.opening.generators.scripted import GoldGenerator, ScriptedGenerator
from tersor.opening.outputs import Answer
from tersor.opening.records import Battle, Instance, Raw, Step
from tersor.opening.store import Store

#: Behind the name of a generator that has the gold answer at hand.
SUFFIX = "+reference"
#: Who says that it is better.
JUDGE = "reference"
#: What the gold answer leaves of a scripted generator's error rates.
LEFT = 0.2
#: Stands before the gold answer.
TOLD = "For reference, this is a very good answer to the request above; make your own as good as it:"

G = TypeVar("G", bound=InterleavedGenerator)


class WithReference:
    """A generator that is shown the gold answer behind the request.

    Args:
        generator: Who answers.
    """

    def __init__(self, generator: InterleavedGenerator) -> None:
        self.generator, self.name = generator, generator.name + SUFFIX

    @property
    def family(self) -> Family:
        """Of the generator."""
        return self.generator.family

    def generate(self, instance: Instance, *, n_steps: int | None, seed: int) -> Answer:
        """See `InterleavedGenerator`.

        Raises:
            TersorError: If the instance has no gold answer.
        """
        if not instance.gold:
            raise TersorError(f"instance {instance.uid} has no gold answer, so there is no reference to show")
        shown = replace(instance, inputs=(*instance.inputs, Step(TOLD), *instance.gold))
        return self.generator.generate(shown, n_steps=n_steps, seed=seed)


@overload
def referenced(generator: ScriptedGenerator) -> ScriptedGenerator: ...
@overload
def referenced(generator: InterleavedGenerator) -> InterleavedGenerator: ...
def referenced(generator: InterleavedGenerator) -> InterleavedGenerator:
    """The same generator with the gold answer at hand; a scripted one errs at `LEFT` of its rates.

    Raises:
        TersorError: For the gold answer itself.
    """
    if isinstance(generator, GoldGenerator):
        raise TersorError("the gold answer cannot be made better by itself; give --model another generator")
    if isinstance(generator, ScriptedGenerator):
        rates = ("p_wrong_colour", "p_missing_step", "p_missing_image")
        fewer = {name: LEFT * getattr(generator, name) for name in rates}
        return replace(generator, name=generator.name + SUFFIX, **fewer)
    return WithReference(generator)


def write_references(
    store: Store, generator: InterleavedGenerator, *, seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> int:  # fmt: skip
    """Have a generator answer every instance of a run both ways, and record the battles; goes on where it stopped.

    Args:
        store: The run; its battles are of such pairs alone.
        generator: Who answers.
        seed: Of everything drawn.
        on_progress: Told how many answers are done, and of how many.

    Returns:
        How many battles of this generator there are; answers that are the same both ways make none.

    Raises:
        TersorError: For the gold answer as a generator, and instances without one.
    """
    better = referenced(generator)
    instances = store.instances()
    if missing := [each.uid for each in instances if not each.gold]:
        raise TersorError(f"instance {missing[0]} has no gold answer, so there is no reference to show")
    for each in (generator, better):
        generate_all(store, each, seed=seed, on_progress=on_progress)
    plain, good = store.outputs(generator.name), store.outputs(better.name)
    same = store.hashes(generator.name), store.hashes(better.name)
    battles = [
        Battle.of(each.uid, each.task, better.name, generator.name)
        for each in instances
        if each.uid in plain and each.uid in good and same[0][each.uid] != same[1][each.uid]
    ]
    store.add_battles(battles)
    done = {row.battle for row in store.raw(JUDGE)}
    store.add_judge(JUDGE, prompt_hash="", prompt="", orders="one", settings={})
    rows = [Raw(each.id, JUDGE, label="A", text="has the reference") for each in battles if each.id not in done]
    if rows:
        store.record(rows).result()
    return len(battles)
