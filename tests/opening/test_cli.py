"""`tersor opening`: every command may be given again, says what comes next, and refuses in one line."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from mock_judge import running

from tersor.cli import run
from tersor.opening.outputs import ANSWERS, model_folder
from tersor.opening.store import Store


def facts(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict:
    """What a command prints as JSON."""
    assert run(["opening", *arguments, "--json"]) == code
    found: dict = json.loads(capsys.readouterr().out)
    return found


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    assert run(["opening", *arguments]) == code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("tersor: note:")]
    assert len(lines) == 1 and captured.out == ""
    return lines[0]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of opening-mini with two models and their battles."""
    name = tmp_path_factory.mktemp("template") / "run"
    for command in ("init {} --mini", "generate {} --model gold --model scripted:weak", "sample {} --rounds 1"):
        assert run(["opening", *command.format(name).split()]) == 0
    return name


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> str:
    """A copy of it, to be changed."""
    shutil.copytree(template, tmp_path / "run")
    return str(tmp_path / "run")


def test_from_nothing_to_verdicts_by_the_commands_that_are_printed(tmp_path, capsys) -> None:
    name = str(tmp_path / "run")
    follows = f"tersor opening init {name} --mini"
    seen = []
    while "report" not in follows:
        arguments = shlex.split(follows)[1:]
        if arguments[1] == "generate":
            arguments += ["--model", "scripted:strong", "--model", "scripted:weak"]
        assert run(arguments) == 0
        seen.append(arguments[1])
        follows = capsys.readouterr().out.splitlines()[-1].removeprefix("next: ")
    assert seen == ["init", "generate", "sample", "judge"]
    with Store.open(name) as store:
        assert len(store.verdicts("scripted:faults")) == 92


def test_every_command_may_be_given_again(folder, capsys) -> None:
    facts(capsys, "judge", folder, "--judge", "scripted:faults")
    assert facts(capsys, "init", folder, "--mini")["instances"] == 46
    assert facts(capsys, "generate", folder, "--model", "gold")["Human"] == {"family": "human", "made": 0, "kept": 46}
    assert facts(capsys, "sample", folder, "--rounds", "1")["new"] == 0
    assert facts(capsys, "judge", folder, "--judge", "scripted:faults")["scripted:faults"]["asked"] == 0


def test_a_half_written_answer_is_made_again(folder, capsys) -> None:
    answers = model_folder(Path(folder) / ANSWERS, "weak")
    file = sorted(answers.glob("*.json"))[3]
    file.write_text(file.read_text()[:50])
    assert facts(capsys, "generate", folder, "--model", "scripted:weak")["weak"]["made"] == 1
    assert facts(capsys, "judge", folder, "--judge", "scripted:faults")["scripted:faults"]["missing"] == 0.0
    assert facts(capsys, "generate", folder, "--model", "scripted:weak", "--overwrite")["weak"]["made"] == 46


def test_changed_answers_are_refused_until_told_otherwise(folder, capsys) -> None:
    facts(capsys, "judge", folder, "--judge", "scripted:faults")
    file = sorted(model_folder(Path(folder) / ANSWERS, "weak").glob("*.json"))[0]
    file.write_text(file.read_text().replace("Step 1", "Stage 1"))
    assert "weak 0101001; restore them, or give --rejudge-changed" in refusal(
        capsys, "judge", folder, "--judge", "scripted:faults"
    )
    found = facts(capsys, "judge", folder, "--judge", "scripted:faults", "--rejudge-changed")
    assert found["scripted:faults"]["asked"] == 2
    assert facts(capsys, "judge", folder, "--judge", "scripted:faults")["scripted:faults"]["asked"] == 0


def test_a_run_of_other_instances_is_not_overwritten(folder, capsys) -> None:
    assert "no run of opening-mini with --seed 5" in refusal(capsys, "init", folder, "--mini", "--seed", "5")
    assert facts(capsys, "init", folder, "--mini")["instances"] == 46
    shutil.copytree(Path(folder) / "data", Path(folder) / "other")
    file = Path(folder) / "other" / "test_data.jsonl"
    file.write_text(file.read_text().replace("Step 1", "Stage 1", 1))
    said = refusal(capsys, "init", folder, "--from", str(file))
    assert "1 instances of" in said and "first 0101001; give another folder" in said


def test_an_endpoint_judges_and_its_faults_leave_with_three(folder, capsys, monkeypatch) -> None:
    monkeypatch.setenv("MOCK_KEY", "sesame")
    key = ["--key-env", "MOCK_KEY", "--side", "112"]
    with running(key="sesame") as server:
        found = facts(capsys, "doctor", folder, "--judge", "endpoint:mock", "--base-url", server.base, *key[:2])
        assert found["judge"]["label"] and found["problems"] == []
        found = facts(capsys, "judge", folder, "--judge", "endpoint:mock", "--base-url", server.base, *key)
        assert found["endpoint:mock"]["decided"] == 46
        monkeypatch.setenv("MOCK_KEY", "wrong")
        said = refusal(
            capsys, "judge", folder, "--judge", "endpoint:mock", "--base-url", server.base, "--rep", "1", *key
        )
        assert "401" in said and "wrong" not in said
    with running(always="prose") as server:
        arguments = ["judge", folder, "--judge", "endpoint:mock", "--base-url", server.base, "--rep", "2", *key]
        assert facts(capsys, *arguments, code=3)["endpoint:mock"]["statuses"] == {"unparsed": 92}
        assert facts(capsys, *arguments, "--max-missing", "1")["endpoint:mock"]["missing"] == 1.0


def test_answers_and_verdicts_from_elsewhere_come_in(folder, tmp_path, capsys) -> None:
    source = model_folder(Path(folder) / ANSWERS, "weak")
    found = facts(capsys, "import-outputs", folder, str(source), "--name", "a/b")
    assert found["a/b"]["answers"] == 46
    new = facts(capsys, "sample", folder, "--strategy", "add:a/b", "--rounds", "2")
    assert new["new"] == 92 and new["battles"] == 138
    verdicts = [{"data_id": "0101001", "model_A": {"id": "1", "name": "Human"}, "model_B": {"id": "2", "name": "weak"},
                 "winner": winner} for winner in ("A", "tie(b)")]  # fmt: skip
    (tmp_path / "v.json").write_text(json.dumps(verdicts))
    found = facts(capsys, "import-verdicts", folder, str(tmp_path / "v.json"), "--judge", "human:paper")
    assert (found["recorded"], found["rejected"]) == (1, {"tie(b)": 1})


def test_a_judge_that_competes_is_named(folder, capsys) -> None:
    with running(model="weak") as server:
        arguments = ["judge", folder, "--judge", "endpoint:weak", "--base-url", server.base, "--side", "112"]
        assert run(["opening", *arguments]) == 0
    assert "seems to be the contestant weak, too" in capsys.readouterr().err


BAD = {
    "no source": (["init", "RUN"], "either --from FOLDER or --mini"),
    "two sources": (["init", "RUN", "--mini", "--from", "x"], "either --from"),
    "no data": (["init", "RUN", "--from", "."], "holds neither"),
    "no run": (["sample", "nowhere"], "holds no run; make one"),
    "model": (["generate", "RUN", "--model", "magic"], "--model 'magic' must be"),
    "steps": (["generate", "RUN", "--model", "gold", "--steps", "many"], "--steps 'many'"),
    "rounds": (["sample", "RUN", "--rounds", "9"], "was sampled with rounds, seed and models [1, 0,"),
    "strategy": (["sample", "RUN", "--strategy", "best"], "--strategy 'best'"),
    "baseline": (["sample", "RUN", "--strategy", "baseline:x"], "none of the models: Human, weak"),
    "judge": (["judge", "RUN", "--judge", "oracle"], "must be endpoint:MODEL"),
    "no base": (["judge", "RUN", "--judge", "endpoint:x"], "needs --base-url"),
    "key in base": (["judge", "RUN", "--judge", "endpoint:x", "--base-url", "http://u:k@x"], "must hold no key"),
    "orders": (["judge", "RUN", "--judge", "scripted:faults", "--orders", "three"], "--orders 'three'"),
    "side": (["judge", "RUN", "--judge", "scripted:faults", "--side", "9"], "--side 9 must be"),
    "concurrency": (["judge", "RUN", "--judge", "scripted:faults", "--concurrency", "0"], "at least 1"),
    "verdicts": (["import-verdicts", "RUN", __file__, "--judge", "x"], "is no JSON"),
    "doctor": (["doctor"], "needs a run"),
    "names": (["import-outputs", "RUN", "a", "b", "--name", "x"], "--name is for one folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(folder, tmp_path, capsys, monkeypatch, name) -> None:
    arguments, said = BAD[name]
    monkeypatch.chdir(tmp_path)
    assert said in refusal(capsys, *(folder if each == "RUN" else each for each in arguments))
    assert [each.name for each in tmp_path.iterdir()] == ["run"]  # nothing is begun


WITHOUT_TORCH = """
    import sys

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("torch", "transformers", "diffusers"):
                raise ModuleNotFoundError(f"blocked: {name}", name=name)

    sys.meta_path.insert(0, Blocked())
    from tersor.cli import run
    for command in sys.argv[1].split(";"):
        assert run(["opening", *command.split()]) == 0, command
    import tersor.opening.page.app
    assert not {"torch", "transformers", "diffusers"} & set(sys.modules)
"""


def test_the_core_runs_where_there_is_no_torch(tmp_path) -> None:
    name = tmp_path / "run"
    commands = [
        f"init {name} --mini", f"generate {name} --model gold --model scripted:strong --model scripted:weak",
        f"sample {name}", f"judge {name} --judge scripted:faults", f"doctor {name}",
    ]  # fmt: skip
    with running() as server:
        commands.append(f"judge {name} --judge endpoint:mock --base-url {server.base} --side 112")
        commands.append(f"report {name} --judge scripted:faults --out {name}/report.html")
        commands.append(f"agree {name} --judge scripted:faults --reference endpoint:mock")
        commands.append(f"compare {name} --baseline weak --candidate Human --judge scripted:faults")
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(WITHOUT_TORCH), ";".join(commands)], check=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}, stdout=subprocess.DEVNULL,
        )  # fmt: skip
