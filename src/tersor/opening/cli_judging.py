"""`tersor opening`: verdicts of judges, and what may be wrong before there are any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tersor._console import spinner
from tersor._errors import TersorError
from tersor._lazy import require
from tersor.opening.told import Json, Run, tell

#: Exit code where too many battles are left without a label.
INCOMPLETE = 3


def judge(
    run: Run,
    judge: Annotated[
        list[str],
        typer.Option(help="'endpoint:MODEL' with --base-url, 'hf:CHECKPOINT', or 'scripted:faults'; may be repeated."),
    ],
    base_url: Annotated[str | None, typer.Option(help="Of an endpoint, with or without /v1.")] = None,
    key_env: Annotated[str, typer.Option(help="Environment variable that holds the key.")] = "OPENAI_API_KEY",
    orders: Annotated[str, typer.Option(help="'both' orders of each battle, or 'one', as it was sampled.")] = "both",
    rep: Annotated[int, typer.Option(help="Repetition; another number asks everything again.")] = 0,
    concurrency: Annotated[int, typer.Option(help="Requests that may be open.")] = 8,
    judge_prompt: Annotated[
        Path | None, typer.Option(help="File of the system message; after a line '---' the question, if it has one.")
    ] = None,
    side: Annotated[int, typer.Option(help="Longest side of a picture that is shown, in pixels.")] = 512,
    image_mode: Annotated[str, typer.Option(help="'side' keeps the aspect, 'square' squashes.")] = "side",
    judge_max_tokens: Annotated[
        int | None,
        typer.Option(help="Of a reply; without it 16, and up to 4096 for a judge that thinks.", show_default=False),
    ] = None,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Ask an endpoint for probabilities.")] = False,
    device: Annotated[str, typer.Option(help="Of a checkpoint: 'auto', 'cpu' or 'cuda'.")] = "auto",
    batch: Annotated[int, typer.Option(help="Questions that a checkpoint reads at once.")] = 4,
    empty_loses: Annotated[bool, typer.Option("--empty-loses", help="Decide against empty answers unasked.")] = False,
    rejudge_changed: Annotated[
        bool, typer.Option("--rejudge-changed", help="Forget verdicts on answers that were changed since.")
    ] = False,
    abstain_below: Annotated[
        float | None,
        typer.Option(
            help="Keep battles for people (`serve`) whose winner has a probability below this, from 0.5 to 1; 0 "
            "forgets them.",
            show_default=False,
        ),
    ] = None,
    max_missing: Annotated[
        float, typer.Option(help="Part of the battles that may be left without a label, from 0 to 1.")
    ] = 0.01,
    as_json: Json = False,
) -> int:
    """Have judges decide the battles; goes on where it stopped, and asks again only what failed.

    Leaves with 3 where more battles than --max-missing have no label.

    Example: tersor opening judge run --judge endpoint:qwen2.5-vl --base-url http://127.0.0.1:8000/v1
    """
    for name, least, value in (("--rep", 0, rep), ("--concurrency", 1, concurrency), ("--batch", 1, batch)):
        if value < least:
            raise TersorError(f"{name} {value} must be at least {least}")
    if orders not in ("both", "one") or not 0 <= max_missing <= 1:
        raise TersorError(f"--orders {orders!r} must be 'both' or 'one', and --max-missing {max_missing} from 0 to 1")
    if abstain_below is not None and (len(judge) > 1 or not (abstain_below == 0 or 0.5 < abstain_below <= 1)):
        raise TersorError(f"--abstain-below {abstain_below} takes one --judge, and must be above 0.5, up to 1, or 0")
    require("PIL.Image", "arena")
    from tersor.opening.asked import set_doubtful
    from tersor.opening.copying import take_changes
    from tersor.opening.judging.runner import contestant, run_judge
    from tersor.opening.judging.specs import JudgeOptions, judge_of
    from tersor.opening.prompts import read_prompt
    from tersor.opening.store import Store

    options = JudgeOptions(
        prompt=read_prompt(judge_prompt, side=side, mode=image_mode),  # type: ignore[arg-type]
        base_url=base_url, key_env=key_env, concurrency=concurrency, max_tokens=judge_max_tokens, logprobs=logprobs,
        device=device, batch=batch,
    )  # fmt: skip
    facts: dict[str, Any] = {}
    with Store.open(run) as store, spinner() as status:
        judges = [judge_of(each, options) for each in judge]
        take_changes(store, rejudge=rejudge_changed)
        for each in judges:
            if (model := contestant(each.id, store.models())) is not None:
                typer.echo(f"tersor: note: judge {each.id} seems to be the contestant {model}, too", err=True)
            outcome = run_judge(
                store, each, orders=orders, rep=rep, empty_loses=empty_loses,  # type: ignore[arg-type]
                on_progress=lambda done, of, name=each.id: status.update(f"{name}: {done} of {of}"),  # type: ignore[misc]
            )  # fmt: skip
            facts[each.id] = {**vars(outcome), "missing": outcome.missing, "prompt": each.prompt_hash}
            for remark in each.remarks():
                typer.echo(f"tersor: note: {each.id}: {remark}", err=True)
            if abstain_below is not None:
                kept = set_doubtful(store, each.id, each.prompt_hash, abstain_below)
                facts[each.id]["doubtful"] = len(kept.doubtful) if kept is not None else 0
    lines = []
    for name, fact in facts.items():
        rest = ", ".join(f"{count} {what}" for what, count in fact["statuses"].items() if what != "ok")
        lines.append(f"{name}: {fact['decided']} of {fact['battles']} battles decided" + (f" ({rest})" if rest else ""))
        if fact.get("doubtful"):
            lines.append(f"it doubts {fact['doubtful']} battles; ask people: tersor opening serve {run} --sample 100")
    chosen = next(iter(facts)) if len(facts) == 1 else "panel:" + "+".join(facts)
    tell(as_json, facts, "\n".join(lines), f"report {run} --judge {chosen}")
    return INCOMPLETE if any(fact["missing"] > max_missing for fact in facts.values()) else 0


def score(
    run: Run,
    judge: Annotated[str, typer.Option(help="'endpoint:MODEL'.")],
    base_url: Annotated[str, typer.Option(help="Of the endpoint, with or without /v1.")],
    key_env: Annotated[str, typer.Option(help="Environment variable that holds the key.")] = "OPENAI_API_KEY",
    concurrency: Annotated[int, typer.Option(help="Requests that may be open.")] = 8,
    out: Annotated[Path | None, typer.Option(help="A .json of the scores, in the benchmark's format.")] = None,
    as_json: Json = False,
) -> None:
    """Have an endpoint give points to single answers, for comparison with published ones; rank models by battles.

    Example: tersor opening score run --judge endpoint:gpt-4o --base-url https://api.openai.com/v1 --out scores.json
    """
    kind, _, name = judge.partition(":")
    if kind != "endpoint" or not name or concurrency < 1:
        raise TersorError(f"--judge {judge!r} must be endpoint:MODEL, and --concurrency {concurrency} at least 1")
    require("PIL.Image", "arena")
    from tersor.opening.judging.client import ChatClient
    from tersor.opening.judging.scores import ScoreJudge, score_all
    from tersor.opening.official import mean_scores, write_scores
    from tersor.opening.store import Store

    scorer = ScoreJudge(ChatClient(base_url, name, key_env=key_env), concurrency=concurrency)
    with Store.open(run) as store, spinner() as status:
        scores = score_all(store, scorer, lambda done, of: status.update(f"{judge}: {done} of {of} answers"))
        ids = store.get("registry", {})
    if out is not None:
        write_scores(out, scores, ids)
    facts = mean_scores(scores)
    lines = [f"{model}: {mean.get('overall', 'no points')} (n={mean['n']})" for model, mean in facts.items()]
    tell(as_json, facts, "\n".join(lines), f"sample {run}")


def import_verdicts(
    run: Run,
    file: Annotated[Path, typer.Argument(help="Verdicts as the benchmark's own scripts write them, a .json.")],
    judge: Annotated[str, typer.Option(help="Whose verdicts they are, such as human:paper or gpt-4o.")],
    repair: Annotated[bool, typer.Option("--repair", help="Take misspelt labels for what they mean.")] = False,
    as_json: Json = False,
) -> None:
    """Take over verdicts that were given elsewhere.

    Example: tersor opening import-verdicts run human_verdicts.json --judge human:paper
    """
    from tersor.opening.official import import_verdicts as take
    from tersor.opening.store import Store

    with Store.open(run) as store:
        found = take(store, file, judge, repair=repair)
    facts = {
        "judge": judge, "recorded": found.recorded, "extra": found.extra, "flipped": found.flipped,
        "rejected": dict(found.rejected), "repaired": dict(found.repaired),
    }  # fmt: skip
    for what, labels in (("rejected", found.rejected), ("repaired", found.repaired)):
        for label, count in labels.items():
            typer.echo(f"tersor: note: label {label!r} {what}, {count} times", err=True)
    if found.extra:
        typer.echo(f"tersor: note: {found.extra} battles were not in the run; they are now", err=True)
    said = f"{judge}: {found.recorded} verdicts, {found.flipped} of them with the other answer first"
    tell(as_json, facts, said, f"report {run} --judge {judge}")


def doctor(
    path: Annotated[Path | None, typer.Argument(help="A run, or a folder or file of instances.")] = None,
    judge: Annotated[str | None, typer.Option(help="'endpoint:MODEL': ask it one question.")] = None,
    base_url: Annotated[str | None, typer.Option(help="Of the endpoint.")] = None,
    key_env: Annotated[str, typer.Option(help="Environment variable that holds the key.")] = "OPENAI_API_KEY",
    strict: Annotated[bool, typer.Option("--strict", help="Missing or broken pictures are errors.")] = False,
    as_json: Json = False,
) -> int:
    """List all that is wrong with files, pictures and names, or ask a judge one question.

    Leaves with 1 if there are errors.

    Example: tersor opening doctor --judge endpoint:gpt-4o --base-url https://api.openai.com/v1
    """
    if path is None and judge is None:
        raise TersorError("doctor needs a run or a folder of instances, or --judge")
    require("PIL.Image", "arena")
    from tersor.opening.doctor import ask_once, examine
    from tersor.opening.judging.endpoint import EndpointJudge
    from tersor.opening.judging.specs import JudgeOptions, judge_of
    from tersor.opening.prompts import JudgePrompt
    from tersor.opening.store import FILE, Store

    problems = [] if path is None else examine(path, strict=strict)
    facts: dict[str, Any] = {
        "problems": [
            {"where": each.where, "field": each.field, "what": each.what, "level": each.level} for each in problems
        ]
    }
    lines = [f"{each.level}: {each}" for each in problems] or ([] if path is None else [f"{path}: nothing is wrong"])
    if judge is not None:
        asked = judge_of(judge, JudgeOptions(prompt=JudgePrompt(), base_url=base_url, key_env=key_env))
        if not isinstance(asked, EndpointJudge):
            raise TersorError("doctor --judge asks endpoints; give endpoint:MODEL")
        store = Store.open(path) if path is not None and (path / FILE).is_file() else None
        reply = ask_once(asked, store)
        if store is not None:
            store.close()
        facts["judge"] = {"url": asked.url, "said": reply.text, "label": reply.label, "seconds": reply.latency}
        lines.append(f"{asked.url} says {reply.text!r}, read as {reply.label}, after {reply.latency or 0:.1f} s")
    typer.echo(json.dumps(facts) if as_json else "\n".join(lines))
    return 1 if any(each.level == "error" for each in problems) else 0
