"""A report in four forms: a page that holds everything, tables in Markdown, JSON, and a row a model in CSV."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tersor._errors import TersorError
from tersor.bench.runs import markdown
from tersor.opening.forest import forest
from tersor.opening.pictures import as_jpeg
from tersor.opening.ranking import FEW, METRICS, TITLES
from tersor.opening.records import Step
from tersor.opening.store import Store
from tersor.opening.summary import Told
from tersor.web.pages import templates

FORMATS = ("html", "md", "json", "csv")
#: Longest side in pixels of a picture in the page.
SIDE = 256


def render(store: Store, told: Told, form: str, *, battles: bool = True) -> str:
    """The text of a report.

    Args:
        store: The run.
        told: From `summarize`.
        form: One of `FORMATS`.
        battles: Whether the page holds every battle with both answers; Markdown and CSV never do.

    Raises:
        TersorError: If there is no such form.
    """
    if form == "html":
        return page(store, told, battles=battles)
    if form == "md":
        return tables(told)
    if form == "csv":
        return rows(told)
    if form == "json":
        return json.dumps(told | ({"verdicts": verdicts(store, told)} if battles else {}), indent=1, allow_nan=False)
    raise TersorError(f"--format {form!r} must be one of {', '.join(FORMATS)}")


def percent(found: Told) -> str:
    """A share with its interval, in a hundred; or why there is none."""
    if found["value"] is None:
        return f"– ({found['reason']})"
    return "{value:.1f} [{low:.1f}, {high:.1f}]".format(**{k: 100 * found[k] for k in ("value", "low", "high")})


def number(found: Told, form: str = ".0f") -> str:
    """A figure with its interval; or why there is none."""
    if found["value"] is None:
        return f"– ({found['reason']})"
    return "{} [{}, {}]".format(*(format(found[key], form) for key in ("value", "low", "high")))


def facts(told: Told) -> list[tuple[str, str]]:
    """The head of every report: who judged, on what, and how far that can be trusted."""
    judge, counts, position, again = (told[key] for key in ("judge", "counts", "position", "repeatability"))
    who = f"{judge['id']} ({judge['people']} people)" if judge["people"] is not None else judge["id"]
    lost = ", ".join(f"{n} {status}" for status, n in counts["without_label"].items()) or "none"
    tau = again["new_pairs_tau"]
    lines = [
        ("judge", who),
        ("prompt", judge["prompt_hash"] or "none"),
        ("battles decided", f"{counts['decided']} of {counts['battles']}, on {counts['instances']} instances"),
        ("questions without a label", f"{lost} (of {counts['asked']}); they count for nothing"),
        ("same winner in both orders, %", f"{percent(position['consistent'])}, n={position['consistent_n']}"),
        ("wins of the answer shown first, %", f"{percent(position['first_share'])}, n={position['first_share_n']}"),
        ("log odds of being shown first", number(position["coefficient"], ".2f")),
        ("asked twice, same winner, %", f"{percent(again['same_pairs'])}, n={again['same_pairs_n']}"),
        ("rankings of two halves, Kendall's tau", "–" if tau is None else f"{tau:.2f}"),
    ]  # fmt: skip
    if counts["ties_divided_by_hash"]:
        lines.append(("ties that lean to nobody", f"{counts['ties_divided_by_hash']}; for FDT a hash divides them"))
    if counts["decided_without_asking"]:
        lines.append(("decided without asking", f"{counts['decided_without_asking']}, because an answer was empty"))
    if judge["contestant"] is not None:
        lines.append(("warning", f"the judge is a contestant, {judge['contestant']}: it rates its own answers"))
    if len(told["components"]) > 1:
        groups = "; ".join(", ".join(group) for group in told["components"])
        lines.append(("warning", f"no battle connects these groups, so ranks hold within each: {groups}"))
    return lines


NOTE = (
    "Ranks and Elo are Bradley-Terry's, ties divided by their lean; neighbours whose difference may be 0 share a rank."
)
STANDINGS = ("rank", "model", *(f"{TITLES[metric]}, % [95%]" for metric in METRICS), "Elo [95%]", "n")


def standings(told: Told) -> list[list[str]]:
    """The table of models, as text."""
    return [
        [str(row["rank"] or "–"), row["model"], *(percent(row[metric]) for metric in METRICS), number(row["elo"]),
         str(row["battles"])]
        for row in sorted(told["models"], key=lambda row: (row["component"] or 0, row["rank"] or 10**6))
    ]  # fmt: skip


def cells(grid: Sequence[Sequence[float | None]], models: Sequence[str]) -> list[list[str]]:
    """A matrix of shares as text, a row a model."""
    return [
        [model, *("" if value is None else f"{100 * value:.0f}" for value in row)]
        for model, row in zip(models, grid, strict=True)
    ]


def topic_rows(told: Told) -> list[list[str]]:
    """A row a topic: FDT of each model, with its battles where they are few."""
    models = told["matrices"]["models"]
    found = []
    for topic, row in told["topics"]["topics"].items():
        line = [f"{topic} {told['topics']['names'].get(topic, '')}".strip()]
        for model in models:
            cell = row.get(model)
            few = f" ({cell['n']})" if cell and cell["n"] < FEW else ""
            line.append("" if cell is None else f"{100 * cell['fdt']:.0f}{few}")
        found.append(line)
    return found


def tables(told: Told) -> str:
    """The report in Markdown."""
    models, grids = told["matrices"]["models"], told["matrices"]
    lines = ["# Arena report", "", *markdown(["", ""], facts(told), names=2), "", "## Standings", ""]
    lines += markdown(STANDINGS, standings(told), names=2)
    lines += ["", f"{NOTE} Intervals of Elo: {told['strengths']['interval']}; of shares: 95% bootstrap over instances."]
    lines += ["", "## FDT of a row against a column, %", "", *markdown(["", *models], cells(grids["fdt"], models))]
    lines += ["", f"## FDT by topic, %, (n) below {FEW} battles", ""]
    lines += markdown(["topic", *models], topic_rows(told))
    if told["people"]:
        people = [
            [row["one"], row["other"], percent(row["fdt"]), "–" if row["kappa"] is None else f"{row['kappa']:.2f}",
             str(row["n"])] for row in told["people"]
        ]  # fmt: skip
        lines += [
            "",
            "## Judges with each other",
            "",
            *markdown(["one", "other", "same winner, %", "kappa", "n"], people, names=2),
        ]
    return "\n".join(lines) + "\n"


def rows(told: Told) -> str:
    """The report in CSV: a row a model."""
    out = io.StringIO()
    names = ["rank", "model", "battles", "wins", "losses", "ties"]
    figures = [f"{name}{end}" for name in (*METRICS, "theta", "elo") for end in ("", "_low", "_high")]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*names, *figures, "judge", "prompt_hash"])
    for row in told["models"]:
        values = [row[name][key] for name in (*METRICS, "theta", "elo") for key in ("value", "low", "high")]
        own = [row[name] for name in names] + values + [told["judge"]["id"], told["judge"]["prompt_hash"]]
        writer.writerow(["" if value is None else value for value in own])
    return out.getvalue()


def verdicts(store: Store, told: Told) -> list[Told]:
    """Every verdict of the judge, as JSON takes it."""
    prompt = told["judge"]["prompt_hash"]
    names = ("battle", "uid", "task", "a", "b", "first", "label", "probability", "consistent")
    found = store.verdicts(told["judge"]["id"], prompt=prompt)
    return [{name: getattr(each, name) for name in names} for each in found]


def page(store: Store, told: Told, *, battles: bool) -> str:
    """The report as one page that loads nothing from elsewhere."""
    elo = [(row["model"], row["elo"]) for row in told["models"]]
    fdt = [(row["model"], {k: row["fdt"][k] and 100 * row["fdt"][k] for k in ("value", "low", "high")})
           for row in told["models"]]  # fmt: skip
    models = told["matrices"]["models"]
    return templates("tersor.opening").get_template("report.html").render(
        facts=facts(told), note=NOTE, columns=STANDINGS, standings=standings(told), models=models,
        plots=[("Elo, with 95 % intervals", Markup(forest(elo, "Elo of each model with its interval", ".0f"))),
               ("FDT, %, with 95 % intervals", Markup(forest(fdt, "FDT of each model with its interval", ".0f")))],
        grids=[(TITLES[metric], cells(told["matrices"][metric], models)) for metric in METRICS]
        + [("w/o tie as published: of all battles", cells(told["matrices"]["without_ties_published"], models))],
        topics=topic_rows(told), few=FEW, interval=told["strengths"]["interval"], people=told["people"],
        other=_other(told), percent=percent, number=number,
        instances=_instances(store, told) if battles else [],
    )  # fmt: skip


def _other(told: Told) -> list[list[str]]:
    """Elo by how ties are counted, and with the same style for all."""
    elo = told["strengths"]["elo"]
    nothing = {"value": None, "reason": "no battle counts"}
    return [[model, *(number(found.get(model, nothing)) for found in elo.values())]
            for model in told["matrices"]["models"]]  # fmt: skip


def _instances(store: Store, told: Told) -> list[dict[str, Any]]:
    """Each instance with its battles, and each answer in them once."""
    judge, prompt = told["judge"]["id"], told["judge"]["prompt_hash"]
    final = {each.battle: each for each in store.verdicts(judge, prompt=prompt)}
    said: dict[str, list[str]] = {}
    for row in (row for who in store.members(judge) for row in store.raw(who, prompt=prompt, rep=0)):
        word = row.label or row.status
        said.setdefault(row.battle, []).append(f"{word}, {'other' if row.order else 'this'} order")
    outputs = {model: store.outputs(model) for model in store.models()}
    by_uid: dict[str, list[Any]] = {}
    for battle in store.battles():
        by_uid.setdefault(battle.uid, []).append(battle)
    found = []
    for instance in store.instances():
        own = by_uid.get(instance.uid, [])
        models = sorted({name for battle in own for name in (battle.a, battle.b)})
        if own:
            found.append({
                "uid": instance.uid, "name": instance.subtask_name, "question": _shown(instance.inputs),
                "answers": [(model, _shown(outputs.get(model, {}).get(instance.uid, ()))) for model in models],
                "battles": [(battle.a, battle.b, final[battle.id].label if battle.id in final else "no verdict",
                             "; ".join(said.get(battle.id, []))) for battle in own],
            })  # fmt: skip
    return found


def _shown(steps: Sequence[Step]) -> list[tuple[str, str]]:
    return [(step.text, _inline(step.image)) for step in steps]


def _inline(file: Path | None) -> str:
    """A picture as part of the page; nothing where it is missing or broken."""
    if file is None or not file.is_file():
        return ""
    try:
        return "data:image/jpeg;base64," + base64.b64encode(as_jpeg(file, SIDE)).decode()
    except TersorError:
        return ""
