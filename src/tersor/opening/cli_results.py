"""`tersor opening demo | report | agree | compare | serve | export`: what verdicts come to, and the page for people."""

from __future__ import annotations

import json
import secrets
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor import _atomic
from tersor._console import spinner
from tersor._errors import TersorError
from tersor._options import FOLDER
from tersor.bench.runs import show
from tersor.opening.told import Json, Run

if TYPE_CHECKING:
    from tersor.opening.compare import Comparison
    from tersor.opening.powered import Powered
    from tersor.opening.records import Verdict
    from tersor.opening.store import Store

JudgeOption = Annotated[
    str | None, typer.Option("--judge", help="Whose verdicts; 'human' is all people. May be left out if there is one.")
]
PromptOption = Annotated[
    str | None, typer.Option("--prompt", help="Hash of the prompt, where the judge was asked with several.")
]
#: What `compare` answers with beside 0.
FAILED, INCONCLUSIVE = 1, 3
EXIT = {"pass": 0, "fail": FAILED, "inconclusive": INCONCLUSIVE}


def report(
    run: Run,
    judge: JudgeOption = None,
    prompt: PromptOption = None,
    form: Annotated[
        str | None, typer.Option("--format", help="html, md, json or csv; by the ending of --out without it.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report here; otherwise it is printed.")] = None,
    battles: Annotated[
        bool, typer.Option("--battles/--no-battles", help="Whether HTML and JSON hold every battle.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Standings with intervals, position bias, topics and all battles: a page, Markdown, JSON or CSV."""
    from tersor.opening.report import FORMATS, render
    from tersor.opening.summary import summarize

    chosen = form or ("json" if as_json else out.suffix[1:].lower() if out is not None else "md")
    if chosen not in FORMATS:
        raise TersorError(
            f"--format {chosen!r} must be one of {', '.join(FORMATS)}, or the ending of --out one of them"
        )
    with _open(run) as store:
        who = only_judge(store, judge)
        told = summarize(store, who, prompt=prompt)
        text = render(store, told, chosen, battles=battles)
    if out is None and chosen == "md" and form is None:
        print_standings(told)
    elif out is None:
        typer.echo(text.rstrip("\n"))
    else:
        _atomic.write_text(out, text)
        if as_json:
            typer.echo(json.dumps(told, allow_nan=False))
        else:
            typer.echo(f"report: {out}")
    models = told["matrices"]["models"]
    if len(models) > 1 and not as_json and chosen in ("md", "html"):
        _next("compare", run, "--baseline", models[0], "--candidate", models[1], "--judge", who)


def agree(
    run: Annotated[
        Path | None, typer.Argument(help="Folder of the run; not needed for two files.", metavar="RUN")
    ] = None,
    judge: JudgeOption = None,
    reference: Annotated[str, typer.Option(help="Whom to agree with: a judge of the run, or a file.")] = "human",
    unseen: Annotated[
        list[str] | None, typer.Option(help="A model that the judge was not trained on; may be repeated.")
    ] = None,
    unseen_official: Annotated[
        bool, typer.Option("--unseen-official", help="The published list of unseen models, with its misspelt name.")
    ] = False,
    as_json: Json = False,
) -> None:
    """How often two judges say the same: the published table, kappa, confusion, and topics.

    Judge and reference may each be a file of verdicts as OpenING publishes them.

    Example: tersor opening agree --judge intjudge.json --reference human.json --unseen-official
    """
    if unseen and unseen_official:
        raise TersorError("--unseen and --unseen-official exclude each other")
    from tersor.opening.agreement import agreement_table, confusion, kappa, matched, topic_table
    from tersor.opening.summary import interval

    with ExitStack() as stack:
        store = stack.enter_context(_open(run)) if run is not None else None
        found = [verdicts_of(store, each) for each in (judge, reference)]
    pairs = matched(*found)
    table = agreement_table(pairs, unseen or (), as_published=unseen_official)
    topics = topic_table(pairs)
    told = {
        "judge": judge, "reference": reference, "battles": [len(found[0]), len(found[1]), len(pairs)],
        "table": {
            mode: {name: interval(getattr(row, name)) for name in ("average", "seen", "unseen")}
            | {"harmonic": row.harmonic, "n": row.n}
            for mode, row in table.items()
        },
        "kappa": kappa(pairs), "confusion": confusion(pairs),
        "topics": {topic: interval(value) | {"n": n} for topic, (value, n) in topics.items()},
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(told, allow_nan=False))
        return
    _print_agreement(told)


def compare(
    run: Run,
    baseline: Annotated[str, typer.Option(help="Model that is there.")],
    candidate: Annotated[str, typer.Option(help="Model that shall take its place.")],
    judge: JudgeOption = None,
    prompt: PromptOption = None,
    margin: Annotated[float, typer.Option(help="How far below one half the candidate's score may be.")] = 0.05,
    people: Annotated[
        str | None,
        typer.Option(help="Who decided a random sample of the battles, such as human; corrects the judge by them."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Is the candidate as good, up to a margin? Exit code 0: it passes; 1: it fails; 3: there are too few votes.

    With --people the judge decides all battles and people a random sample of them: by prediction-powered inference
    their votes take out the judge's bias, and its verdicts make their interval shorter.

    Example: tersor opening compare run --baseline full --candidate pruned --margin 0.05
    """
    from tersor.opening.asked import read_asked
    from tersor.opening.compare import LONGER, compare_models
    from tersor.opening.powered import powered_score

    with _open(run) as store:
        if people is not None and judge is None:
            raise TersorError("--people needs --judge: whom they correct")
        verdicts = store.verdicts(only_judge(store, judge), prompt=prompt)
        votes, kept = ([], None) if people is None else (store.verdicts(people), read_asked(store))
    known = {name for each in verdicts for name in (each.a, each.b)}
    for option, name in (("--baseline", baseline), ("--candidate", candidate)):
        if known and name not in known:
            raise TersorError(f"{option} {name!r} has no battle; the models are {', '.join(sorted(known))}")
    if people is not None:
        doubts = (
            frozenset(kept.doubtful) if kept is not None and kept.judge.split(" ")[0] == judge else frozenset[str]()
        )
        mixed = powered_score(votes, verdicts, candidate, baseline, doubtful=doubts)
        _say_powered(mixed, candidate, baseline, margin, as_json)
        raise typer.Exit(EXIT[mixed.verdict(margin)])
    found = compare_models(verdicts, baseline, candidate, margin=margin)
    if as_json:
        more = {"verdict": found.verdict, "needed": found.needed, "needed_as_seen": found.needed_as_seen}
        power = {f"{times}x": found.power(times) for times in LONGER}
        typer.echo(json.dumps(asdict(found) | more | {"power": power}, allow_nan=False))
    else:
        _print_comparison(found)
    raise typer.Exit(EXIT[found.verdict])


def serve(
    run: Run,
    host: Annotated[str, typer.Option(help="Where to listen; local ones are for this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8765,
    votes_per_battle: Annotated[int, typer.Option(help="People who vote on each battle.")] = 1,
    annotators: Annotated[str, typer.Option(help="Names that may vote, with commas; anybody's without it.")] = "",
    sample: Annotated[
        int | None,
        typer.Option(
            help="Ask about so many battles, drawn at random, and those that a judge doubts; 0 forgets them.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    as_json: Json = False,
) -> None:
    """The page for people: two answers side by side, without names, until interrupted by Ctrl-C.

    A sample, and what `judge --abstain-below` doubts, stay kept in the run; then people are asked about those alone.
    """
    if sample is not None and sample < 0:
        raise TersorError(f"--sample {sample} must not be negative")
    if votes_per_battle < 1 or not 0 <= port <= 65535:
        raise TersorError(
            f"--votes-per-battle {votes_per_battle} must be at least 1, and --port {port} from 0 to 65535"
        )
    from tersor._lazy import require

    require("fastapi", "arena")
    from tersor.opening.asked import read_asked, set_sample
    from tersor.opening.page.app import PageSettings, arena_page
    from tersor.web.app import address, is_local, known_hosts, listen
    from tersor.web.app import serve as answer

    names = [each.strip() for each in annotators.split(",") if each.strip()]
    key = None if is_local(host) else secrets.token_urlsafe(12)
    with _open(run) as store:
        if not store.battles():
            raise TersorError(f"{run} has no battles; sample them with: tersor opening sample {shlex.quote(str(run))}")
        asked = read_asked(store) if sample is None else set_sample(store, sample, seed)
        only = None if asked is None else asked.order(seed)
        if asked is not None and not as_json:
            typer.echo(f"people are asked about {len(asked.doubtful)} doubtful battles and {len(asked.sample)} others")
        listening = listen(host, port)
        settings = PageSettings(votes=votes_per_battle, annotators=names, key=key, hosts=known_hosts(host), only=only)
        where = address(listening) + (f"?key={key}" if key else "")
        typer.echo(json.dumps({"address": where}) if as_json else f"vote at {where} (Ctrl-C ends)")
        answer(arena_page(store, settings), listening)
    if not as_json:
        _next("report", run, "--judge", "human")


def export(
    run: Run,
    out: Annotated[Path, typer.Option(help="File to write.")],
    judge: JudgeOption = None,
    prompt: PromptOption = None,
    form: Annotated[
        str, typer.Option("--format", help="'inspect': a log of Inspect AI; 'official': OpenING's verdicts.")
    ] = "inspect",
    as_json: Json = False,
) -> None:
    """Write battles and verdicts for other tools."""
    from tersor.opening.inspect_log import inspect_log
    from tersor.opening.official import verdict_rows, write_rows

    if form not in ("inspect", "official"):
        raise TersorError(f"--format {form!r} must be 'inspect' or 'official'")
    with _open(run) as store:
        who = only_judge(store, judge)
        if form == "inspect":
            _atomic.write_text(out, inspect_log(store, who, prompt=prompt))
        else:
            write_rows(out, verdict_rows(store.verdicts(who, prompt=prompt)), store.get("registry", {}))
    typer.echo(json.dumps({"written": str(out), "judge": who}) if as_json else f"written: {out}")


def demo(
    out: Annotated[Path, typer.Option(metavar=FOLDER, help="Folder of the run; one that is there goes on.")] = Path(
        "tersor-arena"
    ),
    seed: Annotated[int, typer.Option(help="Of instances, answers, battles and the judge's noise.")] = 0,
    as_json: Json = False,
) -> None:
    """The whole loop offline in a minute: four generators of known order, a scripted judge, a report."""
    from tersor.opening import example
    from tersor.opening.report import render
    from tersor.opening.store import Store
    from tersor.opening.summary import summarize

    with spinner() as status, Store.open(out, create=True) as store:
        if store.models() and set(store.models()) != set(example.ORDER):
            raise TersorError(f"--out {out} holds another run; give a new folder")
        example.fill(store, seed=seed, rounds=example.ROUNDS, on_progress=status.update)
        judge = example.decide(store, seed=seed, on_progress=status.update)
        told = summarize(store, judge)
        _atomic.write_text(out / "report.html", render(store, told, "html"))
    found = [row["model"] for row in sorted(told["models"], key=lambda row: -(row["theta"]["value"] or 0.0))]
    if as_json:
        typer.echo(json.dumps({"known": example.ORDER, "found": found, **told}, allow_nan=False))
        return
    print_standings(told)
    typer.echo(f"known order: {' > '.join(example.ORDER)}\nfound order: {' > '.join(found)}")
    typer.echo(f"report: {out / 'report.html'}")
    _next("compare", out, "--baseline", "Human", "--candidate", "strong")
    _next("serve", out)


#: Command of `tersor opening` -> its function.
RESULTS: dict[str, Callable[..., None]] = {
    "demo": demo, "report": report, "agree": agree, "compare": compare, "serve": serve, "export": export,
}  # fmt: skip


def _open(run: Path) -> Store:
    from tersor.opening.store import Store

    return Store.open(run)


def only_judge(store: Store, judge: str | None) -> str:
    """The judge that was asked for, or the only one there is; people together are one.

    Raises:
        TersorError: If there is none, or several and none was chosen.
    """
    from tersor.opening.store import HUMAN

    if judge is not None:
        return judge
    known = [each for each in store.judges() if not each.startswith(f"{HUMAN}:")]
    if len(known) == 1:
        return known[0]
    if not known:
        place = shlex.quote(str(store.folder))
        raise TersorError(f"{store.folder} has no verdicts; ask people with: tersor opening serve {place}")
    raise TersorError(f"several judges decided here; choose one by --judge: {', '.join(known)}")


def verdicts_of(store: Store | None, name: str | None) -> list[Verdict]:
    """The verdicts of a judge of the run, or of a published file.

    Raises:
        TersorError: If there is neither.
    """
    from tersor.opening.official import read_verdicts

    if name is not None and Path(name).is_file():
        verdicts, found = read_verdicts(Path(name))
        if found.rejected:
            labels = ", ".join(f"{label!r} {n} times" for label, n in found.rejected.items())
            typer.echo(f"tersor: note: {name} has labels that are none, and left out: {labels}", err=True)
        return verdicts
    if store is None:
        raise TersorError(f"{name or '--judge'}: no such file of verdicts; give a file, or the folder of a run as well")
    return store.verdicts(only_judge(store, name))


def _next(command: str, *words: Any) -> None:
    typer.echo(f"next: tersor opening {command} {shlex.join(map(str, words))}")


def print_standings(told: dict[str, Any]) -> None:
    """Who judged and how, and the models from the best to the worst."""
    from tersor.opening.report import NOTE, STANDINGS, facts, standings

    for name, value in facts(told):
        typer.echo(f"{name}: {value}")
    # A terminal has no room for all four rates.
    kept = [STANDINGS.index(each) for each in STANDINGS if not each.startswith(("w/o", "w/ tie (0)"))]
    show([STANDINGS[at] for at in kept], [[row[at] for at in kept] for row in standings(told)], names=2)
    typer.echo(NOTE)


def _print_agreement(told: dict[str, Any]) -> None:
    from tersor.opening.report import percent
    from tersor.opening.summary import Told

    titles = {"fdt": "FDT", "with_ties": "w/ tie", "without_ties": "w/o tie"}

    def row(mode: str, found: Told) -> list[str]:
        harmonic = "–" if found["harmonic"] is None else f"{100 * found['harmonic']:.2f}"
        shares = [f"{100 * found[name]['value']:.2f}" if found[name]["value"] is not None else "–"
                  for name in ("average", "seen", "unseen")]  # fmt: skip
        low_high = percent(found["average"]).partition(" ")[2]
        return [titles[mode], *shares, harmonic, low_high, str(found["n"][0])]

    columns = ["agreement, %", "average", "seen", "unseen", "HM", "average [95%]", "n"]
    show(columns, [row(*each) for each in told["table"].items()])
    judge, reference, both = told["battles"]
    told_kappa = "–" if told["kappa"] is None else f"{told['kappa']:.3f}"
    typer.echo(
        f"battles: {judge} of the judge, {reference} of the reference, {both} of both; Cohen's kappa {told_kappa}"
    )
    labels = list(told["confusion"])
    show(["reference \\ judge", *labels], [[each, *map(str, told["confusion"][each].values())] for each in labels])
    show(
        ["topic", "same winner, %", "n"], [[t, percent(found), str(found["n"])] for t, found in told["topics"].items()]
    )


def _say_powered(found: Powered, candidate: str, baseline: str, margin: float, as_json: bool) -> None:
    from tersor.opening.powered import Z

    low, high = found.interval
    if as_json:
        more = {"interval": [low, high], "bounds": found.bounds, "shorter": found.shorter, "worth": found.worth}
        told = {"baseline": baseline, "candidate": candidate, "margin": margin, "verdict": found.verdict(margin)}
        typer.echo(json.dumps(told | asdict(found) | more, allow_nan=False))
        return
    one, other = found.bounds
    alone = Z * found.alone_error
    typer.echo(
        f"{candidate} against {baseline}: people decided {found.people} battles, the judge alone {found.judged} more\n"
        f"score {found.score:.3f}, 95 % interval {low:.3f} to {high:.3f}; one-sided 95 % bounds {one:.3f} and "
        f"{other:.3f}; it passes above {0.5 - margin:.3f}\n"
        f"people alone: {found.alone:.3f}, {found.alone - alone:.3f} to {found.alone + alone:.3f}; the judge makes it "
        f"{found.shorter:.0%} shorter, as {found.worth:.0f} votes would\n"
        f"verdict: {found.verdict(margin)}"
    )


def _print_comparison(found: Comparison) -> None:
    from tersor.opening.compare import LONGER

    if found.score is None or found.low is None or found.high is None:
        typer.echo(f"{found.candidate} and {found.baseline} have no battle: inconclusive")
        return
    tally = found.tally
    typer.echo(
        f"{found.candidate} against {found.baseline}: {tally.wins} won, {tally.ties} tied, {tally.losses} lost on "
        f"{found.instances} instances (n={tally.battles})\n"
        f"score {found.score:.3f}; one-sided 95 % bounds {found.low:.3f} and {found.high:.3f}; it passes above "
        f"{found.least:.3f}\nverdict: {found.verdict}"
    )
    rows = [[f"{times} x {tally.battles}", f"{100 * (found.power(times) or 0):.0f}"] for times in LONGER]
    show(["votes", "passes if equally good, %"], rows)
    more = "more votes would not make it pass" if found.needed_as_seen is None else f"{found.needed_as_seen} votes"
    typer.echo(f"80 % power: {found.needed} votes if it is equally good; if it is as it looks: {more}")
