"""What a generator is, and what runs one over all instances of a run."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from tersor._errors import TersorError
from tersor.opening.outputs import ANSWERS, Answer, fingerprint, finished, model_folder, write_output
from tersor.opening.records import Instance
from tersor.opening.store import Store

Family: TypeAlias = Literal["integrated", "two_stage", "end_to_end", "human", "scripted"]
#: Steps of an answer at most, where the generator decides.
MOST_STEPS = 10


class InterleavedGenerator(Protocol):
    """Something that answers in texts and pictures."""

    @property
    def name(self) -> str:
        """Of the contestant."""
        ...

    @property
    def family(self) -> Family:
        """How it makes pictures: a text model that calls an image model, one model in two passes, or in one."""
        ...

    def generate(self, instance: Instance, *, n_steps: int | None, seed: int) -> Answer:
        """Answer an instance.

        Args:
            instance: What is asked.
            n_steps: Steps to make; None leaves that to the generator, up to `MOST_STEPS`.
            seed: Of everything drawn.
        """
        ...


class ImageBackend(Protocol):
    """Something that draws a picture from words."""

    def draw(self, prompt: str, *, seed: int) -> Any:
        """A picture of Pillow."""
        ...


@dataclass(frozen=True)
class Generated:
    """What came of a run of a generator.

    Args:
        made: Answers of this call.
        kept: Answers that were there already.
    """

    made: int
    kept: int


def generate_all(
    store: Store, generator: InterleavedGenerator, *, steps: Literal["gold", "free"] = "gold", seed: int = 0,
    overwrite: bool = False, on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> Generated:  # fmt: skip
    """Have a generator answer every instance of a run that it has not answered yet.

    An answer is written pictures first, and counts as done when its file is whole and every picture can be read.

    Args:
        store: The run.
        generator: Who answers.
        steps: 'gold' tells it how many steps the gold answer has, as the benchmark does; 'free' leaves that to it, and
            so does an instance without a gold answer.
        seed: Of everything drawn; each instance has one of its own.
        overwrite: Answer again what is answered.
        on_progress: Told how many are done, and of how many.

    Raises:
        TersorError: If it has begun to answer this run with other settings.
    """
    instances = store.instances()
    runs, facts = store.get("generated", {}), [steps, seed]
    if runs.get(generator.name, facts) != facts and not overwrite:
        raise TersorError(
            f"{generator.name} answered with steps and seed {runs[generator.name]}; repeat those, or give --overwrite"
        )
    store.set("generated", runs | {generator.name: facts})
    folder, known = model_folder(store.folder / ANSWERS, generator.name), store.hashes(generator.name)
    made = 0
    for number, instance in enumerate(instances):
        on_progress(number, len(instances))
        written = None if overwrite else finished(folder, instance.uid)
        if written is None:
            count = len(instance.gold) or None if steps == "gold" else None
            own = (seed + zlib.crc32(instance.uid.encode())) % 2**31
            answer = generator.generate(instance, n_steps=count, seed=own)
            written = write_output(folder, instance, answer)
            made += 1
        elif instance.uid in known:
            continue
        sha256 = fingerprint(folder / f"{instance.uid}.json", written)
        store.add_output(generator.name, instance.uid, written, sha256)
    on_progress(len(instances), len(instances))
    return Generated(made, len(instances) - made)
