"""`tersor experts router`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tersor._console import spinner
from tersor._errors import TersorError
from tersor._options import FOLDER

if TYPE_CHECKING:
    from tersor.experts.router.evaluation import Evaluation

router = typer.Typer(help="Choose the expert of a request that names none.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Data = Annotated[Path, typer.Option(help='Requests, {"text": ..., "expert": ...} a line.')]


@router.command()
def train(
    data: Data,
    expert: Annotated[list[str], typer.Option(help="NAME=DESCRIPTION of an expert, once for each.")],
    out: Annotated[Path, typer.Option(metavar=FOLDER, help="Folder of the router; an interrupted run goes on.")],
    kind: Annotated[str, typer.Option(help="'llm', 'encoder', 'embedding' or 'rules'.")] = "llm",
    model: Annotated[Path | None, typer.Option(help="Folder of the model to start from, with its tokenizer.")] = None,
    rules: Annotated[
        Path | None, typer.Option(help="Of kind 'rules': a JSON file with regular expressions by expert.")
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="Least probability of an expert; below it the fallback answers.")
    ] = 0.0,
    fallback: Annotated[str | None, typer.Option(help="An expert; by default the base.")] = None,
    sticky: Annotated[bool, typer.Option(help="Keep a conversation with its first expert.")] = True,
    max_tokens: Annotated[int, typer.Option(help="Tokens that the router reads.")] = 512,
    steps: Annotated[int, typer.Option(help="Updates of the weights.")] = 300,
    batch: Annotated[int, typer.Option(help="Requests an update.")] = 32,
    rate: Annotated[float | None, typer.Option(help="Peak rate of AdamW; by default the kind's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything drawn.")] = 1,
    as_json: Json = False,
) -> None:
    """Train a router, or check and store the rules of one; prints how often it is right on the same data.

    Example: tersor experts router train --model Q --data train.jsonl --expert math="word problems" --expert
    code="writes programs" --out router/
    """
    from tersor.experts.router.config import RouterConfig
    from tersor.experts.router.routing import Router
    from tersor.experts.router.training import RouterTraining, read_requests, train_folder

    config = RouterConfig(
        kind=kind, experts=_described(expert), threshold=threshold, fallback=fallback, sticky=sticky,
        max_tokens=max_tokens,
    )  # fmt: skip
    training = RouterTraining(steps=steps, batch=batch, rate=rate, seed=seed)
    requests = read_requests(data, list(config.experts))
    if (kind == "rules") != (rules is not None) or (kind == "rules") == (model is not None):
        raise TersorError(
            f"kind {kind!r} needs {'--rules and no --model' if kind == 'rules' else '--model, no --rules'}"
        )
    with spinner() as status:
        if rules is not None:
            from tersor.experts.router.kinds import RulesScorer, read_rules

            made = Router(config, RulesScorer(read_rules(rules), list(config.experts)))
            made.save_pretrained(out)
        elif model is not None:
            made = train_folder(config, model, requests, training, out, on_progress=status.update)
        status.update("routing the training data")
        from tersor.experts.router.evaluation import evaluate

        accuracy = evaluate(made, requests).accuracy
    facts = {"out": str(out), "training_accuracy": asdict(accuracy), "n": len(requests)}
    if as_json:
        typer.echo(json.dumps(facts))
        return
    typer.echo(f"{accuracy.value:.1%} of {len(requests)} training requests reach their expert: {out}")


@router.command("eval")
def evaluate_(
    folder: Annotated[Path, typer.Argument(help="Folder of a router.")],
    data: Data,
    training_data: Annotated[
        Path | None, typer.Option(help="What the router was trained on: a linear model of n-grams is shown beside it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a router on requests it was not trained on: right experts, calibration, time, and answers where known."""
    from tersor.experts.router.config import read_router_config
    from tersor.experts.router.routing import Router
    from tersor.experts.router.training import read_requests

    names = list(read_router_config(folder).experts)
    requests = read_requests(data, names)
    seen = None if training_data is None else read_requests(training_data, names)
    from tersor.experts.router.evaluation import NGramScorer, evaluate

    with spinner() as status:
        status.update(f"routing {len(requests)} requests")
        made = Router.from_pretrained(folder)
        found = {"router": evaluate(made, requests)}
        if seen is not None:
            status.update("the n-gram baseline")
            found["n-grams"] = evaluate(Router(made.config, NGramScorer(names).fit(seen)), requests)
    if as_json:
        typer.echo(json.dumps({who: asdict(each) for who, each in found.items()}))
        return
    for who, each in found.items():
        _show(who, each, names)


def _show(who: str, found: Evaluation, names: list[str]) -> None:
    accuracy = found.accuracy
    typer.echo(
        f"{who}: {accuracy.value:.1%} [{accuracy.low:.1%}, {accuracy.high:.1%}] of {found.n} requests reach their "
        f"expert, calibration error {found.calibration_error:.3f}, {1000 * found.seconds.value:.2f} ms a request"
    )
    for name, row in zip(names, found.confusion, strict=True):
        share = found.recall.get(name)
        reached = ", ".join(f"{count} to {other}" for other, count in zip(names, row, strict=True) if count)
        typer.echo(f"  {name}: {'no request' if share is None else f'{share.value:.1%}: {reached}'}")
    if (end := found.end_task) is not None:
        typer.echo(
            f"  answered right: {end.routed.value:.1%}, by the best choice {end.oracle.value:.1%}, always by "
            f"{end.best_name} {end.best_single.value:.1%}"
        )


def _described(values: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for value in values:
        name, equals, what = value.partition("=")
        if not equals or not what.strip() or name in found:
            raise TersorError(f"--expert {value!r} must be NAME=DESCRIPTION, each name once")
        found[name] = what
    return found
