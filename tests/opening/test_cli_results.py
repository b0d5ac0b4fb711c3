from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from arena_runs import decided, make_run
from invoke import run as invoke

from tersor._errors import TersorError
from tersor.opening.cli_results import RESULTS
from tersor.opening.official import Row, verdict_rows, write_rows
from tersor.opening.records import Raw, Verdict
from tersor.opening.store import Store

app = typer.Typer()
for name, function in RESULTS.items():
    app.command(name)(function)


def call(*words: str, code: int = 0) -> str:
    done = invoke(app, *map(str, words))
    assert done.exit_code == code, done.output
    return str(done.stdout)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("a run")
    decided(folder, rounds=6)
    return str(folder)


def test_a_report_is_printed_or_written_in_the_form_of_its_ending(run: str, tmp_path: Path) -> None:
    shown = call("report", run)
    assert "judge: scripted:faults" in shown and "next: tersor opening compare" in shown
    assert call("report", run, "--format", "md").startswith("# Arena report")
    for ending in ("html", "md", "json", "csv"):
        out = tmp_path / f"report.{ending}"
        assert f"report: {out}" in call("report", run, "--out", str(out))
        assert out.stat().st_size > 300
    told = json.loads(call("report", run, "--json", "--no-battles"))
    assert told["counts"]["decided"] == 72 and "verdicts" not in told
    assert len(json.loads(call("report", run, "--json"))["verdicts"]) == 72


def test_what_cannot_be_reported_is_refused_in_a_line(run: str, tmp_path: Path) -> None:
    for words, said in (
        (["report", run, "--format", "pdf"], "html, md, json, csv"),
        (["report", run, "--out", str(tmp_path / "x.pdf")], "'pdf'"),
        (["report", run, "--judge", "nobody"], "no judge 'nobody'"),
        (["report", str(tmp_path)], "holds no run"),
        (["compare", run, "--baseline", "x", "--candidate", "weak"], "--baseline 'x' has no battle"),
        (["export", run, "--out", str(tmp_path / "x"), "--format", "csv"], "'inspect' or 'official'"),
        (["serve", run, "--votes-per-battle", "0"], "--votes-per-battle 0"),
        (["agree"], "--judge: no such file"),
        (["agree", run, "--unseen", "a", "--unseen-official"], "exclude each other"),
    ):
        with pytest.raises(TersorError, match=re.escape(said)):
            invoke(app, *words)


def test_a_judge_must_be_chosen_where_there_are_several(tmp_path: Path) -> None:
    make_run(tmp_path, battles=1)
    with Store.open(tmp_path) as store:
        with pytest.raises(TersorError, match="has no verdicts; ask people with: tersor opening serve"):
            invoke(app, "report", str(tmp_path))
        for judge in ("a", "b", "human:Anna"):
            store.add_judge(judge)
            store.record(Raw(store.battles()[0].id, judge, label="A")).result()
    with pytest.raises(TersorError, match="choose one by --judge: a, b, human"):
        invoke(app, "report", str(tmp_path))
    assert "judge: human (1 people)" in call("report", str(tmp_path), "--judge", "human")


def test_comparing_answers_with_its_exit_code(run: str) -> None:
    assert "verdict: fail" in call("compare", run, "--baseline", "Human", "--candidate", "weak", code=1)
    assert "verdict: pass" in call("compare", run, "--baseline", "weak", "--candidate", "Human")
    told = json.loads(
        call("compare", run, "--baseline", "Human", "--candidate", "strong", "--margin", "0.01", "--json", code=3)
    )
    assert told["verdict"] == "inconclusive" and told["needed"] > told["tally"]["battles"]
    assert set(told["power"]) == {"1x", "2x", "4x", "8x"}


def verdict_file(file: Path, verdicts: Sequence[Verdict]) -> str:
    write_rows(file, verdict_rows(verdicts), {})
    return str(file)


def test_published_files_give_their_agreement_table_in_one_command(tmp_path: Path) -> None:
    """Exact on files by hand: 4 of 8 judged alike by all modes as in tests of `agreement`."""
    names = ("GPT-4o+DALL-E3", "Anole", "Emu2", "Show-o")
    cases = [
        (0, 2, "A", "A"), (0, 3, "A", "Tie(A)"), (1, 2, "Tie(A)", "Tie(B)"), (1, 3, "B", "B"),
        (2, 3, "Tie(B)", "B"), (2, 3, "B", "A"), (3, 2, "Tie(A)", "Tie(A)"), (0, 1, "A", "B"),
    ]  # fmt: skip
    files = {}
    for place, who in ((2, "human"), (3, "judge")):
        rows = [Row(f"01010{n:02}", names[case[0]], names[case[1]], str(case[place])) for n, case in enumerate(cases)]
        files[who] = tmp_path / f"{who}.json"
        write_rows(files[who], rows, {})
    words = ["agree", "--judge", str(files["judge"]), "--reference", str(files["human"])]
    table = json.loads(call(*words, "--unseen-official", "--json"))["table"]
    values = {mode: [row[k]["value"] for k in ("average", "seen", "unseen")] for mode, row in table.items()}
    assert values == {
        "fdt": pytest.approx([5 / 8, 4 / 5, 1 / 3]), "with_ties": pytest.approx([4 / 8, 2 / 5, 2 / 3]),
        "without_ties": pytest.approx([2 / 4, 1 / 2, 1 / 2]),
    }  # fmt: skip
    assert table["fdt"]["harmonic"] == pytest.approx(2 * (4 / 5) * (1 / 3) / (4 / 5 + 1 / 3))
    shown = call(*words, "--unseen", "Anole", "--unseen", "GPT-4o+DALL-E3")
    assert all(figure in shown for figure in ("62.50", "66.67", "60.00", "63.16"))
    with pytest.raises(TersorError, match=r"'GPT-4\+DALL-E3' is in no battle"):
        invoke(app, *words, "--unseen", "GPT-4+DALL-E3")


def test_labels_that_are_none_are_left_out_and_said(tmp_path: Path) -> None:
    rows = [Row("0101001", "a", "b", "A"), Row("0101002", "a", "b", "Tie ()"), Row("0101003", "a", "b", "A")]
    write_rows(tmp_path / "j.json", rows, {})
    done = invoke(app, "agree", "--judge", str(tmp_path / "j.json"), "--reference", str(tmp_path / "j.json"))
    assert "2 of both" in done.output and "'Tie ()' 1 times" in done.output


def test_a_file_and_a_judge_of_the_run_agree_too(run: str, tmp_path: Path) -> None:
    call("export", run, "--format", "official", "--out", str(tmp_path / "out.json"))
    told = json.loads(call("agree", run, "--reference", str(tmp_path / "out.json"), "--json"))
    assert told["battles"] == [72, 72, 72] and told["table"]["fdt"]["average"]["value"] == 1


def test_logs_for_inspect_are_written(run: str, tmp_path: Path) -> None:
    assert "written:" in call("export", run, "--out", str(tmp_path / "log.json"))
    assert json.loads((tmp_path / "log.json").read_text())["version"] == 2


def test_the_demo_prints_the_known_order_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tersor.opening import example

    monkeypatch.setattr(example, "ROUNDS", 2)
    shown = call("demo", "--out", str(tmp_path / "run"))
    assert "known order: Human > strong > medium > weak" in shown and "found order: Human" in shown
    assert (tmp_path / "run" / "report.html").is_file() and "next: tersor opening serve" in shown
    told = json.loads(call("demo", "--out", str(tmp_path / "run"), "--json"))
    assert told["known"] == ["Human", "strong", "medium", "weak"]
    make_run(tmp_path / "other", battles=1)
    with pytest.raises(TersorError, match="holds another run"):
        invoke(app, "demo", "--out", str(tmp_path / "other"))


def test_the_page_is_served_until_it_is_interrupted(tmp_path: Path) -> None:
    make_run(tmp_path, battles=1)
    code = "import typer\nfrom tersor.opening.cli_results import serve\ntyper.run(serve)"
    words = [sys.executable, "-c", code, str(tmp_path), "--port", "0", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        where: Any = json.loads(process.stdout.readline())["address"]
        for _ in range(100):
            try:
                page = urllib.request.urlopen(where, timeout=5).read().decode()
                break
            except OSError:
                time.sleep(0.1)
        assert "Which answer is better?" in page
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0, "that is how it ends"
