"""python -m hybridnas.evaluate suite=NAME: what it prints, keeps and refuses, and the recipes of this repository."""

import csv
import json
from pathlib import Path

import pytest

from hybridnas.cli import run as run_cli
from hybridnas.cli.compose import compose, read_settings
from hybridnas.cli.sections import PACKAGE, experiment_files
from hybridnas.suites.suite import SuiteConfig


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[Mx4,(ME)x2]", ("Mx4", "(ME)x2")),
        ("Mx4", ("Mx4",)),
        ("[[M,E]x2, M{d_state=4,expand=2}]", ("[M,E]x2", "M{d_state=4,expand=2}")),
        ("['Mx2',\"A\"]", ("Mx2", "A")),
    ],
)
def test_lists_of_patterns(text, parts):
    assert read_settings("evaluate", [f"patterns={text}"]).patterns == parts


MISTAKES = [
    (["suite=mda"], "suite", "mda"),
    (["suite.quick=true"], "suite", None),
    (["suite=mad", "suite.quik=true"], "suite.quik", "suite.quik"),
    (["suite=mad", "suite.minutes=0"], "suite.minutes", 0),
    (["suite=mad", "suite.rates=[fast]"], "suite.rates", "[fast]"),
    (["suite=mad", "pattern=M", "preset=mamba"], "patterns", None),
    (["suite=mad", "lengths=[64]"], "lengths", [64]),
    (["suite=mad", "data=mqar"], "data", {"kind": "mqar"}),
    (["suite=mad", "out=x.csv"], "out", "x.csv"),
    (["patterns=[M,A]"], "patterns", None),
    (["lengths=[64]"], "model", None),
    (["lengths=[0]", "model=x"], "lengths", 0),
]
SENTENCES = [
    (["suite=mad", "suite.tasks=[compres]"], "suite 'mad' has no task 'compres'; did you mean 'compress'?"),
    (["suite=mad", "pattern=Q"], "PatternError"),
    (["suite=mad", "suite.against=none.csv"], "has no finished column of suite 'mad'"),
    (["lengths=[64]", "model=/absent"], "ExportError: /absent"),
]


@pytest.mark.parametrize(("settings", "field", "got"), MISTAKES, ids=lambda value: str(value)[:50])
def test_mistakes_name_the_setting_and_what_was_got(settings, field, got, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_cli(["evaluate", "tracking=off", *settings, "json=true"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["type"], error["field"], error["got"]) == ("ConfigError", field, got)


@pytest.mark.parametrize(("settings", "words"), SENTENCES, ids=lambda value: str(value)[:50])
def test_other_mistakes_are_one_sentence(settings, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_cli(["evaluate", "tracking=off", *settings]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_a_suite_by_its_command_resumes_draws_and_is_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["suite=mad", "suite.quick=true", "suite.tasks=['in-context recall','memorise']", "suite.tokens=4096",
             "suite.rates=[0.001]", "patterns=[M,A]", "arch.d_model=16"]  # fmt: skip
    assert run_cli(["evaluate", *small]) == 0
    out = capsys.readouterr().out
    table = [line.split("\t") for line in out.splitlines() if "\t" in line]
    assert table[0] == ["model", "in-context recall", "memorise", "average", "compress", "fuzzy recall",
                        "noisy recall", "selective copy", "settings"]  # fmt: skip
    assert {line[0] for line in table[1:3]} == {"M", "A"}
    assert next(x for x in table if "DeltaNet" in x[0])[:4] == ["DeltaNet [published]", "100.0", "52.8", "71.8"]
    folder = Path("runs/mad-quick")
    assert (folder / "mad-quick.svg").read_text().count("<svg") == 1
    assert (folder / "mad-quick.png").is_file()
    with (folder / "mad-quick.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["model"], r["column"]) for r in rows] == [
        ("M", "in-context recall"), ("A", "in-context recall"), ("M", "memorise"), ("A", "memorise")
    ]  # fmt: skip
    assert {r["chosen"] for r in rows} == {"1"}
    from hybridnas.report.compare import CompareConfig, find_runs

    trained = find_runs(CompareConfig())
    assert len(trained) == 4
    assert {r.status for r in trained} == {"complete"}
    assert run_cli(["evaluate", *small]) == 0
    assert " | " not in capsys.readouterr().out  # no run was trained again
    assert run_cli(["evaluate", *small, f"suite.against={folder}/mad-quick.csv"]) == 2
    assert "run both versions first" in capsys.readouterr().err


def test_the_recipes_of_the_package_compose_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, suite in {
        "induction_heads": "induction_heads",
        "selective_copying": "selective_copying",
        "mqar": "mqar",
        "recall_state": "recall_state",
        "moe_mamba_headline": "headline",
        "experts_at_250": "expert_count",
        "mamba_ablations": "mamba_ablations",
        "history": "history",
    }.items():
        config = compose("evaluate", [f"experiment={name}"])
        assert SuiteConfig.from_dict(config["suite"]).suite().name == suite
        assert config["suite"]["out"] == f"experiments/results/{name}.csv"
        assert experiment_files()[name].parent == PACKAGE / "experiments"
