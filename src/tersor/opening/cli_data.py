"""`tersor opening`: instances, answers and battles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tersor._console import spinner
from tersor._errors import TersorError
from tersor._lazy import require
from tersor.opening.told import Json, Run, tell


def init(
    run: Run,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Folder with test_data.jsonl or dev_data.jsonl and its images, or such a file."),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="'opening', or 'mmrb2' for a file of pairs such as interleaved.json.")
    ] = "opening",
    mini: Annotated[
        bool, typer.Option("--mini", help="Write opening-mini: 46 instances that a program can check.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of opening-mini.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad records out, and count them.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse missing or broken pictures; else they are left out.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a run of the benchmark's instances, or of opening-mini.

    Example: tersor opening init run --mini
    """
    if (source is None) != mini:
        raise TersorError("init needs either --from FOLDER or --mini")
    if form not in ("opening", "mmrb2") or (mini and form != "opening"):
        raise TersorError(f"--format {form!r} must be 'opening', or 'mmrb2' with --from FILE")
    require("PIL.Image", "arena")
    if form == "mmrb2":
        _take_mmrb2(run, source, as_json)
        return
    from tersor.opening.data import read_data
    from tersor.opening.mini import write_mini
    from tersor.opening.store import FILE, Store

    if source is None:
        if (run / FILE).is_file():
            with Store.open(run) as store:
                if store.get("mini") != seed:  # its pictures would be drawn over
                    raise TersorError(f"{run} is no run of opening-mini with --seed {seed}; give another folder")
        write_mini(run / "data", seed=seed)
    with spinner() as status:
        status.update("reading instances and pictures")
        loaded = read_data(source or run / "data", skip_bad=skip_bad, strict=strict)
    with Store.open(run, create=True) as store:
        if other := store.other_instances(loaded.instances, loaded.root):
            raise TersorError(
                f"{len(other)} instances of {run} are missing or others in {source}, first {other[0]}; give another "
                "folder for a run of these"
            )
        store.set("mini", seed if mini else None)
        store.add_instances(loaded.instances, loaded.root)
    steps = [len(each.inputs) + len(each.gold) for each in loaded.instances]
    facts = {
        "run": str(run), "instances": len(steps), "tasks": len({each.task for each in loaded.instances}),
        "steps": sum(steps), "problems": [str(each) for each in loaded.problems],
    }  # fmt: skip
    for each in loaded.problems:
        typer.echo(f"tersor: note: {each}", err=True)
    said = f"{facts['instances']} instances of {facts['tasks']} tasks, {facts['steps']} steps"
    tell(as_json, facts, said, f"generate {run} --model gold" if mini else f"import-outputs {run} FOLDER")


def generate(
    run: Run,
    model: Annotated[
        list[str],
        typer.Option(
            help="'gold', 'scripted:strong' (medium, weak), 'chat:MODEL' with --images, 'images:BACKEND', or "
            "'loop:MODULE:FUNCTION'; may be repeated."
        ),
    ],
    images: Annotated[
        str | None,
        typer.Option(
            help="Draws for chat: 'endpoint:MODEL', 'diffusers:CHECKPOINT', 'tiny-nar-text' or 'tiny-raster'."
        ),
    ] = None,
    base_url: Annotated[str | None, typer.Option(help="Of endpoints, with or without /v1.")] = None,
    key_env: Annotated[str, typer.Option(help="Environment variable that holds the key.")] = "OPENAI_API_KEY",
    device: Annotated[str, typer.Option(help="Of checkpoints.")] = "cpu",
    steps: Annotated[
        str, typer.Option(help="'gold' tells the model how long the gold answer is; 'free' does not.")
    ] = "gold",
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Answer again what is answered.")] = False,
    as_json: Json = False,
) -> None:
    """Have models answer every instance; goes on where it stopped.

    Example: tersor opening generate run --model gold --model scripted:weak
    """
    if steps not in ("gold", "free"):
        raise TersorError(f"--steps {steps!r} must be 'gold' or 'free'")
    require("PIL.Image", "arena")
    from tersor.opening.generators.base import generate_all
    from tersor.opening.generators.specs import GeneratorOptions, generator_of
    from tersor.opening.store import Store

    options = GeneratorOptions(images=images, base_url=base_url, key_env=key_env, device=device)
    generators = [generator_of(each, options) for each in model]
    facts: dict[str, Any] = {}
    with Store.open(run) as store, store.exclusive("generate"), spinner() as status:
        for each in generators:
            made = generate_all(
                store, each, steps=steps, seed=seed, overwrite=overwrite,  # type: ignore[arg-type]
                on_progress=lambda done, of, name=each.name: status.update(f"{name}: {done} of {of}"),  # type: ignore[misc]
            )  # fmt: skip
            facts[each.name] = {"family": each.family, "made": made.made, "kept": made.kept}
    said = "\n".join(f"{name}: {fact['made']} answers made, {fact['kept']} kept" for name, fact in facts.items())
    tell(as_json, facts, said, f"sample {run}")


def import_outputs(
    run: Run,
    folder: Annotated[list[Path], typer.Argument(help="Folders of answers, MODEL_output each.", metavar="FOLDER...")],
    name: Annotated[str | None, typer.Option(help="Of the model, if the folder's is another.")] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Refuse answers with missing or broken pictures; else those are left out."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Copy answers that were made elsewhere into the run.

    Example: tersor opening import-outputs run answers/Emu2_output answers/GILL_output
    """
    if name is not None and len(folder) > 1:
        raise TersorError("--name is for one folder")
    require("PIL.Image", "arena")
    from tersor.opening.copying import copy_outputs
    from tersor.opening.store import Store

    facts: dict[str, Any] = {}
    with Store.open(run) as store, store.exclusive("generate"), spinner() as status:
        for each in folder:
            status.update(f"reading {each}")
            found = copy_outputs(store, each, name, strict=strict)
            for problem in found.problems:
                typer.echo(f"tersor: note: {problem}", err=True)
            facts[found.model] = {
                "answers": len(found.answers), "unknown": len(found.unknown),
                "problems": [str(problem) for problem in found.problems],
            }  # fmt: skip
    said = "\n".join(
        f"{model}: {fact['answers']} answers, {fact['unknown']} to instances that the run lacks"
        for model, fact in facts.items()
    )
    tell(as_json, facts, said, f"sample {run}")


def sample(
    run: Run,
    rounds: Annotated[int, typer.Option(help="Battles on each instance.")] = 2,
    strategy: Annotated[
        str, typer.Option(help="'roaming', 'all-pairs', 'baseline:MODEL', or 'add:MODEL' against those that are there.")
    ] = "roaming",
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    missing_loses: Annotated[
        bool, typer.Option("--missing-loses", help="Use instances that a model did not answer; there it loses.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Choose which models meet on which instance; battles that are there stay.

    Example: tersor opening sample run --rounds 2
    """
    from tersor.opening import sampling
    from tersor.opening.store import Store

    kind, _, which = strategy.partition(":")
    with Store.open(run) as store:
        models, instances = store.models(), store.instances()
        answers = {each: list(store.outputs(each)) for each in models}
        lacking: dict[str, list[str]] = {}
        if missing_loses:
            store.set("missing_loses", True)
        else:
            instances, lacking = sampling.answered_by_both(instances, answers)
            if models and not instances:
                raise TersorError(f"no instance was answered by all of {', '.join(models)}; see --missing-loses")
        for model, uids in lacking.items():
            typer.echo(f"tersor: note: {model} lacks {len(uids)} answers; nobody is compared there", err=True)
        if strategy == "roaming":
            known = store.battles()
            if known and (before := store.get("roaming")) not in (None, [rounds, seed, models]):
                raise TersorError(
                    f"{run} was sampled with rounds, seed and models {before}; add a model with --strategy add:MODEL"
                )
            battles = sampling.roaming(instances, models, rounds, seed)
            store.set("roaming", [rounds, seed, models])
        elif strategy == "all-pairs":
            battles = sampling.all_pairs(instances, models, seed)
        elif kind == "baseline":
            battles = sampling.versus_baseline(instances, models, which, seed)
        elif kind == "add" and which in models:
            battles = sampling.add_model(which, store.battles(), instances, models, rounds, seed)
        else:
            raise TersorError(
                f"--strategy {strategy!r} must be 'roaming', 'all-pairs', 'baseline:MODEL' or 'add:MODEL', with one of "
                f"{', '.join(models)}"
            )
        new = store.add_battles(battles)
        facts = {
            "battles": len(store.battles()), "new": new, "models": models,
            "lacking": {model: len(uids) for model, uids in lacking.items()},
        }  # fmt: skip
    said = f"{facts['battles']} battles of {len(models)} models, {new} of them new"
    tell(as_json, facts, said, f"judge {run} --judge scripted:faults")


def _take_mmrb2(run: Path, file: Path | None, as_json: bool) -> None:
    """Make a run of the pairs of MMRB2, with answers, battles and the verdicts of people."""
    from tersor.opening.sources import MMRB2Pairs, take_pairs
    from tersor.opening.store import Store

    assert file is not None
    source = MMRB2Pairs()
    pairs = source.read(file)
    with Store.open(run, create=True) as store:
        take_pairs(store, source, pairs)
    for each in pairs.problems:
        typer.echo(f"tersor: note: {each}", err=True)
    facts = {
        "run": str(run), "instances": len(pairs.instances), "models": sorted(pairs.answers), "battles": len(pairs.rows),
        "problems": [str(each) for each in pairs.problems],
    }  # fmt: skip
    said = f"{len(pairs.rows)} battles of {len(pairs.answers)} models, with the verdicts of human:{source.name}"
    tell(as_json, facts, said, f"judge {run} --judge endpoint:MODEL --base-url URL")
