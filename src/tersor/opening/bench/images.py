"""Is ZipAR as good as token by token? Battles between images of the same class, judged by an embedded classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tersor import zoo
from tersor.grids.zipar.generation import zipar_generate
from tersor.opening.compare import Comparison, compare_models
from tersor.opening.judging.runner import run_judge
from tersor.opening.judging.scripted import ScriptedJudge
from tersor.opening.outputs import ANSWERS, Answer, fingerprint, model_folder, write_output
from tersor.opening.pictures import read_rgb
from tersor.opening.records import Instance, Step
from tersor.opening.sampling import versus_baseline
from tersor.opening.store import Store

MODEL, BASELINE = "tiny-raster", "raster"
#: The model's own distribution, without cut or guidance.
SAMPLING: dict[str, Any] = {"do_sample": True, "top_k": 0, "guidance_scale": 1.0}
#: Images that are written at once.
BATCH = 100


def instances(n: int) -> list[Instance]:
    """Prompts that ask for a digit, the ten digits in turns; a digit is a task."""
    found = []
    for number in range(n):
        digit, place = number % 10, number // 10 + 1
        ids = "01", f"{digit + 1:02}", f"{place:03}"
        asked, gold = Step(f"Draw the digit {digit}."), Step(f"The digit {digit}.")
        found.append(Instance("".join(ids), *ids, "digits", f"digit {digit}", (asked,), (gold,)))
    return found


def digit_of(instance: Instance) -> int:
    """What an instance asks for."""
    return int(instance.subtask_id) - 1


def names_of(windows: Sequence[int]) -> dict[str, int | None]:
    """Contestant -> its window; the baseline has none."""
    return {BASELINE: None} | {f"window {window}": window for window in windows}


def draw(model: Any, labels: Tensor, window: int | None, seed: int) -> Tensor:
    """Ids ``[n, rows, columns]`` of images of classes ``[n]``, by ZipAR with a window or token by token."""
    rows, columns = model.config.grid_size
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for part in torch.split(labels, BATCH):
        settings = SAMPLING | {"generator": generator}
        ids = (
            model.generate(part, **settings)
            if window is None
            else zipar_generate(model, part, window_size=window, **settings)
        )
        parts.append(ids.view(-1, rows, columns))
    return torch.cat(parts)


def contestants(
    store: Store, windows: Sequence[int], n: int, seed: int, on_progress: Callable[[str], None] = lambda text: None
) -> None:
    """Fill a new run with prompts, the images of every way of decoding, and battles of each against the baseline."""
    model, tokenizer = zoo.load_model(MODEL), zoo.load_image_tokenizer(MODEL)
    asked = instances(n)
    labels = torch.tensor([digit_of(each) for each in asked])
    store.add_instances(asked, store.folder)
    for place, (name, window) in enumerate(names_of(windows).items()):
        on_progress(f"{name}: {n} images")
        # Seeds of their own: images of one seed would be alike, and their battles no two samples.
        pixels = tokenizer.decode(draw(model, labels, window, seed * 1000 + place))
        folder, rows = model_folder(store.folder / ANSWERS, name), []
        for instance, image in zip(asked, pixels, strict=True):
            picture = Image.fromarray((image[0].clamp(0, 1) * 255).round().byte().numpy())
            steps = write_output(folder, instance, Answer((("", picture),)))
            rows.append((name, instance.uid, steps, fingerprint(folder / f"{instance.uid}.json", steps)))
        store.add_outputs(rows)
    store.add_battles(versus_baseline(asked, list(names_of(windows)), BASELINE, seed=seed))


class DigitJudge:
    """The advantage of an image that the embedded classifier takes for the digit that was asked for.

    Two right or two wrong ones tie, and the tie leans to the one in which the digit is more probable.
    """

    def __init__(self) -> None:
        self.classifier, _ = zoo.load_judge(MODEL)
        self.seen: dict[Path, Tensor] = {}

    def __call__(self, instance: Instance, first: Sequence[Step], second: Sequence[Step]) -> float:
        """2 for a win, 1 for a lean, as `ScriptedJudge` takes it."""
        one, two = self.chances(first), self.chances(second)
        digit = digit_of(instance)
        right = int(one.argmax() == digit) - int(two.argmax() == digit)
        return 2.0 * right if right else float(torch.sign(one[digit] - two[digit]))

    @torch.no_grad()
    def chances(self, answer: Sequence[Step]) -> Tensor:
        """Probability of each digit in an answer's picture."""
        file = answer[0].image
        assert file is not None
        if file not in self.seen:
            grey = np.asarray(read_rgb(file).convert("L"), dtype=np.float32) / 255
            self.seen[file] = self.classifier(torch.from_numpy(grey)[None, None]).softmax(-1)[0]
        return self.seen[file]


def judged(store: Store, on_progress: Callable[[str], None] = lambda text: None) -> str:
    """Have the classifier decide every battle in both orders; returns the judge's id."""
    judge = ScriptedJudge(DigitJudge(), name="digits")
    run_judge(store, judge, on_progress=lambda done, of: on_progress(f"{judge.id}: {done} of {of} verdicts"))
    return judge.id


def comparisons(store: Store, judge: str, windows: Sequence[int], margins: Sequence[float]) -> list[Comparison]:
    """Every window against the baseline, at every margin."""
    verdicts = store.verdicts(judge)
    names = [name for name in names_of(windows) if name != BASELINE]
    return [compare_models(verdicts, BASELINE, name, margin=margin) for name in names for margin in margins]
