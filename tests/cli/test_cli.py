"""The command line: help at once, settings as they are pinned here, mistakes in one sentence and exit code 2."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from hybridnas.cli import COMMANDS, main, run
from hybridnas.cli.command import groups_of, settings_class
from hybridnas.cli.compose import command_line, compose, read_settings
from hybridnas.cli.help import ENVIRONMENT, help_text
from hybridnas.cli.sections import EXPERIMENTS, PACKAGE, choice_of, choices_of
from hybridnas.config import read_yaml
from hybridnas.errors import ConfigError
from hybridnas.search.config import Budget
from hybridnas.train.config import TrainConfig

SURFACE = {  # a setting more or less is a decision: change this table with it
    "search": "action against alpha claim confirm confirm_rates confirm_screen confirm_seeds confirm_top "
    "confirm_workers cpus device gpus heartbeat image launch max_active_params max_flops max_latency_ms max_params "
    "max_state_bytes memory "
    "min_decode_tokens_per_second min_prefill_tokens_per_second min_train_tokens_per_second minutes n_trials nodes "
    "objectives pruner runs "
    "sampler secret seed speed_batch state_length storage study tracking tracking_experiment verdict_seeds "
    "worker workers",
    "train": "arch device freeze grow impl lora lora_alpha lora_layers max_seconds model out pattern recipe tokenizer "
    "tracking tracking_experiment train",
    "graft": "arch device distill_hidden distill_logits edit fit_lr fit_tokens init max_seconds model noise out seed "
    "temperature tokens train",
    "describe": "arch block device exportable model out pattern presets seq_len",
    "data": "action samples seed",
    "compare": "baseline figure out run runs study uri",
    "export": "format model out runs study trial",
    "import": "model out",
    "generate": "device echo eos_token_id max_new_tokens model out prompt runs seed stop_at_end study temperature "
    "top_k top_p",
    "evaluate": "allow_noncausal arch batch_size device lengths lm_eval max_gib model out part pattern patterns "
    "positions precision probe seed seq_len tracking valid_tokens",
    "replay": "device out runs study trial",
    "ladder": "active_params batch_power batch_size decay_fraction depth_power device heartbeat hold_out lr lr_power "
    "minutes name patterns presets rates resamples runs seed seeds sizes storage study tokens top warmup workers",
    "new": "folder kind letter name",
    "bench": "budget keep_memory minutes out patterns part patience quick repeats sizes space suite threads tiny truth",
}
BUDGET = (
    "active_params alpha base_width batch_size compile confirm confirm_rates confirm_screen confirm_seeds confirm_top "
    "d_model decay_fraction depth devices embedding_lr evals growth lr max_tokens minutes multiple n_experts n_trials "
    "name optimizer precision rate reduction rungs schedule seq_len tokens_per_active_param "
    "train_baselines valid_tokens verdict_seeds weight_decay z_loss"
)
GROUPS = {
    "search": "budget data experiment space",
    "train": "data experiment preset",
    "graft": "data experiment",
    "describe": "experiment preset",
    "data": "data",
    "evaluate": "data experiment preset suite",
    "ladder": "budget data experiment",
}
LIGHT = "arch.d_model=32"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_settings_of_a_command_are_these(command):
    names = set(settings_class(command).field_names())
    groups = set(groups_of(settings_class(command)))
    assert names - groups - {"json", "plugins"} == set(SURFACE[command].split())
    assert groups == set(GROUPS.get(command, "").split())


def test_the_settings_of_the_budget_and_of_a_training_are_these():
    assert sorted(Budget.field_names()) == sorted(BUDGET.split())
    assert {"tokens", "batch_size", "seq_len", "lr", "seed", "eval_at", "devices"} <= set(TrainConfig.field_names())


def test_commands_modules_and_entry_points_are_the_same_set():
    assert set(SURFACE) == set(COMMANDS)
    for command in COMMANDS:
        assert (PACKAGE / f"{command}.py").is_file() or (PACKAGE / command / "__main__.py").is_file(), command
        assert (PACKAGE / "cli" / f"{command}.py").is_file()


def test_the_files_of_hydra_hold_choices_that_their_dataclass_reads():
    assert [path.name for path in (PACKAGE / "conf").iterdir() if path.suffix == ".yaml"] == []
    for name in choices_of("budget"):
        assert Budget.from_dict(choice_of("budget", name)).name == name
        assert read_yaml(PACKAGE / "conf" / "budget" / f"{name}.yaml")["name"] == name
    for group in ("data", "suite", "preset"):
        for name in choices_of(group):
            assert set(choice_of(group, name)) <= {"kind", "name", "parts"}


def test_a_command_and_python_read_budgets_by_one_function(monkeypatch):
    monkeypatch.setattr("hybridnas.search.named.list_budgets", lambda: ["own"])
    monkeypatch.setattr("hybridnas.search.named.named_budget", lambda name: {"name": name, "d_model": 24, "depth": 3})
    assert choices_of("budget") == ["own"]
    assert compose("search", ["budget=own"])["budget"]["d_model"] == 24


@pytest.mark.parametrize("command", COMMANDS)
def test_the_values_of_a_command_are_the_defaults_of_its_fields(command):
    settings = read_settings(command, [])
    for field in dataclasses.fields(settings):
        if field.default is not dataclasses.MISSING and field.name not in ("sampler", "budget"):
            assert getattr(settings, field.name) == field.default, field.name


@pytest.mark.slow
def test_help_answers_without_anything_heavy():
    code = (
        "import contextlib, io, json, sys; from hybridnas.cli import COMMANDS, run\n"
        "heavy = {'torch', 'mlflow', 'optuna', 'datasets', 'tokenizers', 'matplotlib', 'transformers'}\n"
        "for command in COMMANDS:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as text:\n"
        "        code = run([command, '--help'])\n"
        "    print(json.dumps([command, code, text.getvalue(), sorted(heavy & set(sys.modules))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [command for command, *_ in answers] == list(COMMANDS)
    for command, code, text, heavy in answers:
        assert (code, heavy) == (0, []), command
        assert text.startswith(f"python -m hybridnas.{command} [key=value ...]")
        for setting in set(SURFACE[command].split()) - {"train"}:
            assert f"\n  {setting}=" in text
        for name in ENVIRONMENT:
            assert name in text


@pytest.mark.parametrize(
    ("command", "overrides", "config", "section"),
    [
        ("search", ["budget=smoke"], Budget, "budget"),
        ("train", [], TrainConfig, "train"),
        ("train", ["data=mqar"], None, "data"),
        ("evaluate", ["suite=mad"], None, "suite"),
    ],
)
def test_help_lists_the_settings_of_a_choice_with_their_meanings(command, overrides, config, section):
    from hybridnas.data import SOURCES
    from hybridnas.suites.suite import SuiteConfig

    text = " ".join(help_text(command, COMMANDS[command], overrides).split())
    config = config or {"data": SOURCES.get("mqar").config, "suite": SuiteConfig}[section]
    for field in dataclasses.fields(config):
        if field.name not in ("kind", "name"):
            assert f" {section}.{field.name}=" in text
            assert " ".join(field.metadata["doc"].split())[:20] in text


def test_help_lists_choices_and_the_values_that_they_bring():
    text = help_text("search", COMMANDS["search"], ["budget=smoke"])
    assert "budget=[laptop], paper, smoke, workstation" in text
    assert "\n  budget.d_model=32 " in text
    text = help_text("train", COMMANDS["train"], ["preset=moe_mamba"])
    assert "\n  preset.n_experts=32 " in text


@pytest.mark.slow
def test_the_console_script_and_the_modules_are_one(capsys):
    assert run(["describe", "--help"]) == 0
    done = subprocess.run([sys.executable, "-m", "hybridnas.describe", "-h"], capture_output=True, text=True)
    assert done.stdout == capsys.readouterr().out


@pytest.mark.parametrize(("argv", "words"), [([], "hybridnas COMMAND [key=value"), (["--help"], "replay")])
def test_the_overview(capsys, argv, words):
    assert run(argv) == 0
    assert words in capsys.readouterr().out


def test_an_unknown_command_is_met_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as left:
        main(["serch"])
    assert left.value.code == 2
    assert capsys.readouterr().err == "hybridnas: unknown command 'serch'; did you mean 'search'?\n"


def test_the_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("hybridnas ")


MISTAKES = [  # command, settings, the setting at fault, what was got, one of what is allowed
    ("describe", ["pattern=ME", "arch.d_model=abc"], "arch.d_model", "abc", "an integer"),
    ("describe", ["pattern=ME"], "arch.d_model", None, ">= 1"),
    ("describe", ["preset=mambo"], "preset", "mambo", "mamba"),
    ("describe", ["preset=mamba", "pattern=ME"], "pattern", "ME", None),
    ("describe", ["preset.d_model=3"], "preset", None, "moe_mamba"),
    ("describe", ["prest=mamba"], "prest", "prest", "preset"),
    ("describe", ["+foo=1"], "foo", "foo", "seq_len"),
    ("describe", ["mamba"], None, "mamba", "key=value"),
    ("describe", ["--preset", "mamba"], None, "--preset", "key=value"),
    ("describe", ["~pattern"], None, "~pattern", "key=value"),
    ("describe", ["seq_len=abc"], "seq_len", "abc", "an integer"),
    ("describe", ["seq_len=0"], "seq_len", 0, ">= 1"),
    ("describe", ["pattern=ME", "d_model=64"], "d_model", "d_model", "arch"),
    ("describe", ["experiment=nope"], "experiment", "nope", "ratio"),
    ("describe", ["experiment=mqar"], "experiment", "mqar", None),
    ("describe", ["json=maybe"], "json", "maybe", "true or false"),
    ("search", ["space=mamba_mo"], "space", "mamba_mo", "mamba_moe"),
    ("search", ["space=null"], "space", "null", "mamba_moe"),
    ("search", ["spce=hybrid"], "spce", "spce", "space"),
    ("search", ["budget=lptop"], "budget", "lptop", "laptop"),
    ("search", ["budget.d_modl=3"], "budget.d_modl", "budget.d_modl", "budget.d_model"),
    ("search", ["budget.d_model=0"], "budget.d_model", 0, ">= 8"),
    ("search", ["n_trials=-1"], "n_trials", -1, ">= 1"),
    ("search", ["n_trials=some"], "n_trials", "some", "an integer or none"),
    ("search", ["minutes=0"], "minutes", 0, "> 0"),
    ("compare", ["study=one", "study=[two,three]"], "study", ["one", "[two,three]"], "study=[one,two,three]"),
    ("search", ["minutes=inf"], "minutes", None, "a finite number"),
    ("search", ["seed=-1"], "seed", -1, ">= 0"),
    ("search", ["sampler=tp"], "sampler", "tp", "tpe"),
    ("search", ["launch=slrm"], "launch", "slrm", "slurm"),
    ("search", ["launch=k8"], "launch", "k8", "k8s"),
    ("search", ["data.tokeniser=bpe"], "data.tokeniser", "data.tokeniser", "data.tokenizer"),
    ("search", ["data=README.md"], "data", "README.md", "text"),
    ("search", ["budget.lr"], None, "budget.lr", "key=value"),
    ("replay", [], "study", None, "a study and a trial"),
    ("replay", ["study=nope", "trial=x"], "trial", "x", "an integer or none"),
    ("replay", ["study=nope", "trial=-1"], "trial", -1, ">= 0"),
    ("export", [], "study", None, None),
    ("export", ["study=nope", "out=model", "trial=-1"], "trial", -1, ">= 0"),
    ("generate", [], "model", None, None),
    ("generate", ["seed=18446744073709551616"], "seed", 18446744073709551616, "<= 9223372036854775807"),
    ("train", [], "preset", None, None),
    ("train", ["preset=mamba", "train.lr=-1"], "train.lr", -1, "> 0"),
    ("train", ["preset=mamba", "train.tokns=1"], "train.tokns", "train.tokns", "train.tokens"),
    ("train", ["preset=mamba", "train.tokens=1.5"], "train.tokens", "1.5", "an integer"),
    ("train", ["preset=mamba", "train.momentum=0.9"], "train.momentum", "train.momentum", "train.tokens"),
]


@pytest.mark.parametrize(
    ("command", "settings", "field", "got", "allowed"), MISTAKES, ids=lambda value: str(value)[:60]
)
def test_a_mistake_names_the_setting_what_was_got_and_what_is_allowed(
    command, settings, field, got, allowed, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert run([command, "json=true", *settings]) == 2
    out, err = capsys.readouterr()
    error = json.loads(out)["error"] if out else None
    if error is None:  # json= itself was wrong
        assert settings == ["json=maybe"]
        return
    assert (error["type"], error["field"], error["got"]) == ("ConfigError", field, got)
    assert error["allowed"] == allowed or (isinstance(error["allowed"], list) and allowed in error["allowed"])
    assert err == f"ConfigError: {error['message']}\n"


SENTENCES = [  # golden sentences: the style of all
    (["describe", "pattern=(MQ)x2", LIGHT], "PatternError: pattern '(MQ)x2' has unknown letter 'Q' at character 3"),
    (["describe", "pattern=ME", "d_model=64"], "describe has no setting 'd_model'; did you mean 'arch.d_model'?"),
    (["describe", "preset=mambo"], "describe preset=mambo is unknown; did you mean 'mamba'? (options: "),
    (
        ["describe", "presets=granit"],
        "describe presets=granit is neither a family nor a preset; did you mean 'granite'?",
    ),
    (["search", "data=README.md"], "data=README.md is unknown; did you mean data=text data.path=README.md?"),
    (["train", "preset=mamba", "train.lr=-1"], "ConfigError: train lr=-1.0 must be > 0\n"),
    (["replay", "study=nope", "trial=0"], "StudyError: no study in runs/nope"),
]


@pytest.mark.parametrize(("argv", "words"), SENTENCES, ids=str)
def test_golden_sentences(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(argv) == 2
    assert words in capsys.readouterr().err


REFUSED = [  # what the parts below the command line refuse: an error of ours, one sentence, code 2
    ("describe", ["pattern=(ME", LIGHT], "PatternError"),
    ("describe", ["pattern=M{dstate=3}", LIGHT], "ConfigError"),
    ("describe", ["pattern=M{d_state=x}", LIGHT], "ConfigError"),
    ("describe", ["pattern=ME", "arch.d_mode=3"], "ConfigError"),
    ("describe", ["pattern=A", LIGHT, "arch.n_heads=5"], "ConfigError"),
    ("describe", ["pattern=ME", LIGHT, "arch.n_experts=0"], "ConfigError"),
    ("describe", ["pattern=ME", "arch.d_model=-8"], "ConfigError"),
    ("describe", ["preset=moe_mamba", "preset.n_blocks=0"], "ConfigError"),
    ("describe", ["preset=moe_mamba", "preset.n_expert=2"], "ConfigError"),
    ("describe", ["preset=moe_mamba", "out=graph.xyz"], "ConfigError"),
    ("describe", ["preset=mamba", "device=foo"], "ConfigError"),
    ("describe", ["preset=mamba", "device=meta"], "ConfigError"),
    ("search", ["space.n_expert=[8]"], "ConfigError"),
    ("search", ["space.n_experts=[0]"], "ConfigError"),
    ("search", ["space.letters=[M,Q]"], "PatternError"),
    ("search", ["device=foo"], "ConfigError"),
    ("search", ["study=a/b"], "StudyError"),
    ("search", ["data=text"], "ConfigError"),
    ("search", ["data=hub"], "ConfigError"),
    ("search", ["data=stdlib", "data.path=x"], "ConfigError"),
    ("search", ["data=text", "data.path=/absent/file.txt"], "DataError"),
    ("search", ["runs=/proc/none"], "StudyError"),
    ("export", ["study=nope", "out=model"], "StudyError"),
    ("generate", ["model=/absent"], "ExportError"),
    ("generate", ["study=absent"], "StudyError"),
    ("evaluate", ["model=/absent"], "ExportError"),
    ("compare", ["runs=/absent"], "StudyError"),
]


@pytest.mark.parametrize(("command", "settings", "kind"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_refusal_is_one_sentence_and_exit_code_2(command, settings, kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["tracking=off", "budget=smoke"] if command == "search" else []
    assert run([command, *small, *settings]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"{kind}: ")
    assert "Traceback" not in out + err
    assert err.count("\n") <= (4 if kind == "PatternError" else 1)  # the pattern, the caret, what is known


@pytest.mark.slow
def test_a_mistake_ends_a_process_with_2_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "hybridnas", "describe", "preset=mambo"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ConfigError: describe preset=mambo is unknown; did you mean 'mamba'?")


def test_what_the_machine_refuses_is_one_sentence(monkeypatch, capsys):
    def full(settings):
        raise OSError(28, "No space left on device", "runs/x")

    monkeypatch.setattr("hybridnas.cli.describe.run", full)
    assert run(["describe"]) == 2
    assert capsys.readouterr().err == "OSError: runs/x: No space left on device\n"


def test_ctrl_c_is_130_where_nothing_was_begun(monkeypatch, capsys):
    def stop(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("hybridnas.cli.describe.run", stop)
    assert run(["describe"]) == 130
    assert run(["describe", "json=true"]) == 130
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "KeyboardInterrupt"


TEXTS = [
    *("(ME)x8", "[M,E]x2", "M{d_state=32,expand=3}", "${x}", "${oc.env:HOME}", 'it\'s "quoted"', "a, b; c = d"),
    *("{'a': [1, 2]}", "(unclosed [", "123", "1e3", "true", "x\ny", " def ", "???", "a#b", "文.txt", "my docs (1)/a b"),
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_passes_unchanged(text):
    assert read_settings("generate", [f"prompt={text}"]).prompt == text
    assert read_settings("describe", [f"pattern={text}"]).pattern == text
    settings = read_settings("compare", [f"baseline={text}", f"runs={text}", f"run={text}"])
    assert (settings.baseline, str(settings.runs), settings.run) == (text, str(Path(text)), text)


@pytest.mark.parametrize("command", ["search", "train"])
def test_text_passes_unchanged_into_a_group(command):
    named = {f"part{number}": text for number, text in enumerate(TEXTS)}  # at once: Hydra takes long to compose
    kinds = [f"data.parts.{name}.kind=text" for name in named]
    paths = [f"data.parts.{name}.path={text}" for name, text in named.items()]
    parts = compose(command, ["data=mixture", *kinds, *paths])["data"]["parts"]
    assert {name: parts[name]["path"] for name in named} == named
    for text in TEXTS[::6]:
        assert compose(command, ["data=text", f"data.path={text}"])["data"]["path"] == text


def test_null_is_none_where_a_setting_can_be_none_and_text_where_it_cannot():
    assert read_settings("generate", ["prompt=null"]).prompt == "null"
    assert read_settings("generate", ["top_k=null", "model=null"]).top_k is None
    assert read_settings("search", ["study=null", "minutes=none"]).study is None


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e6", 1_000_000), ("1M", 1_000_000), ("500k", 500_000), ("1000000", 1_000_000), ("0.5M", 500_000)],
)
def test_a_number_of_tokens_may_be_written_as_it_is_shown(text, value):
    assert read_settings("train", [f"train.tokens={text}"]).train == {"tokens": value}
    assert read_settings("evaluate", [f"lengths=[64,{text}]"]).lengths == (64, value)


def test_lists_are_read_where_a_setting_takes_several():
    assert compose("train", ["data=text", "data.path=[a.txt,b c.txt]"])["data"]["path"] == ["a.txt", "b c.txt"]
    assert read_settings("search", ["objectives=val_loss,params"]).objectives == ("val_loss", "params")
    assert compose("search", ["space.n_experts=8,16"])["space"]["n_experts"] == [8, 16]
    assert compose("search", ["space.letters=[M,[M,E],M{d_state=32}]"])["space"]["letters"] == [
        *("M", "[M,E]", "M{d_state=32}"),
    ]
    assert compose("search", ["space.E.top_k=[1,2]"])["space"]["E.top_k"] == [1, 2]


def test_the_home_folder_is_one_place_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = 0
    for command in COMMANDS:
        settings = settings_class(command)
        for field in dataclasses.fields(settings):
            if "Path" in str(settings.type_of(field.name)) or field.name in ("out", "runs"):
                value = getattr(read_settings(command, [f"{field.name}=~/x.json"]), field.name)
                assert value == tmp_path / "x.json", (command, field.name)
                found += 1
    assert found >= 13


def test_the_last_of_two_settings_counts():
    assert compose("search", ["tracking=off", "tracking=null"])["tracking"] is None
    assert compose("search", ["study=a", "study=b"])["study"] == "b"
    assert compose("search", ["space=hybrid", "space=tabular"])["space"]["name"] == "tabular"


@pytest.mark.parametrize(("given", "confirm"), [("on", "on"), ("off", "off"), ("true", "on"), ("no", "off")])
def test_named_switches_read_as_they_are_typed(given, confirm):
    assert read_settings("search", [f"confirm={given}"]).search().budget.confirm == confirm


@pytest.mark.parametrize(("given", "worker"), [("true", "join"), ("false", "off"), ("create", "create")])
def test_a_worker_joins_or_creates(given, worker):
    assert read_settings("search", [f"worker={given}"]).worker == worker


def test_groups_compose():
    config = compose("search", ["space=hybrid", "budget=smoke", "space.n_experts=[8,16]", "budget.lr=0.1"])
    assert config["space"]["name"] == "hybrid"
    assert config["space"]["n_experts"] == [8, 16]
    assert config["budget"]["lr"] == 0.1
    assert config["budget"]["d_model"] == 32
    assert config["data"]["kind"] == "stdlib"
    assert compose("search", ["budget.active_params=5000"])["budget"]["active_params"] == 5000
    config = compose("describe", ["preset=moe_mamba", "preset.d_model=64", "arch.E.d_expert=8"])
    assert config["preset"]["d_model"] == 64
    assert config["arch"] == {"E": {"d_expert": 8}}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def test_files_of_the_folder_where_one_stands_are_options_and_win(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("search_spaces/mine.yaml"), "letters: [M, F]\nmotif_length: [2]\n")
    write(Path("search_spaces/hybrid.yaml"), "description: ours\nletters: [M]\nmotif_length: [1]\n")
    write(Path("experiments/long.yaml"), "seed: 7\nbudget:\n  lr: 0.5\n")
    write(Path("experiments/ratio.yaml"), "seed: 8\n")
    assert compose("search", ["space=mine"])["space"] == {"name": "mine", "letters": ["M", "F"], "motif_length": [2]}
    assert compose("search", ["space=hybrid"])["space"]["description"] == "ours"
    long = compose("search", ["experiment=long"])
    assert (long["seed"], long["budget"]["lr"], long["budget"]["name"]) == (7, 0.5, "laptop")
    assert compose("search", ["experiment=long", "seed=9", "budget=smoke"])["seed"] == 9
    assert compose("search", ["experiment=ratio"])["seed"] == 8
    assert "mine" in help_text("search", "x")


@pytest.mark.parametrize("name", ["2024", "1_1", "true", "1e3", "null_", "a-b", "it's", "文"])
def test_a_file_may_be_named_like_a_number_or_a_boolean(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path(f"search_spaces/{name}.yaml"), "letters: [M, A]\nmotif_length: [2]\n")
    write(Path(f"experiments/{name}.yaml"), f"defaults:\n  - override /space: {json.dumps(name)}\nseed: 3\n")
    for settings in ([f"space={name}"], [f"experiment={name}"]):
        assert compose("search", settings)["space"] == {"name": name, "letters": ["M", "A"], "motif_length": [2]}


def test_interpolation_is_resolved_in_files_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CORPUS", "/corpus")
    write(Path("experiments/own.yaml"), "data: {kind: text, path: '${oc.env:CORPUS}/a.txt'}\n")
    assert compose("train", ["experiment=own"])["data"]["path"] == "/corpus/a.txt"
    assert compose("train", ["data=text", "data.path=${oc.env:CORPUS}/a.txt"])["data"]["path"].startswith("$")


def test_a_broken_file_matters_only_where_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("search_spaces/broken.yaml"), "letters: [M")
    assert compose("search", [])["space"]["name"] == "mamba_moe"
    with pytest.raises(ConfigError) as caught:
        compose("search", ["space=broken"])
    assert caught.value.field == "search_spaces/broken.yaml"


def test_an_experiment_with_a_mistyped_setting_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("experiments/typo.yaml"), "sed: 7\n")
    with pytest.raises(ConfigError) as caught:
        compose("search", ["experiment=typo"])
    assert caught.value.field == "sed"
    assert "seed" in caught.value.allowed


@pytest.mark.parametrize("name", ["expert_count", "inner_moe", "ratio"])
def test_the_experiments_of_the_package_compose_from_any_folder(name, tmp_path, monkeypatch):
    from hybridnas.search_spaces.space import Space

    monkeypatch.chdir(tmp_path)
    config = compose("search", [f"experiment={name}"])
    assert config["sampler"] == "bruteforce"
    assert Space.from_mapping(config["space"]).name == name
    assert EXPERIMENTS[0] == PACKAGE / "experiments"


# Text as it may be typed; what would read as null or as a list is refused instead, see test_config.py.
PATHS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8).filter(
    lambda text: text != "null" and not text.startswith("[")
)
TEXT_DATA = st.fixed_dictionaries({"kind": st.just("text"), "path": PATHS | st.lists(PATHS, min_size=1)})
MIXTURE = st.fixed_dictionaries({"path": PATHS}).map(lambda part: {"kind": "mixture", "parts": {"text": part}})
ANY_SEARCH = st.fixed_dictionaries(
    {},
    optional={
        "budget": st.fixed_dictionaries({"name": st.just("smoke"), "d_model": st.just(32), "depth": st.integers(1, 9)}),
        "data": TEXT_DATA | MIXTURE,
        "study": PATHS,
        "against": st.none() | PATHS,
        "seed": st.integers(0, 2**63 - 1),
        "objectives": st.sampled_from([["val_loss"], ["accuracy"], ["val_loss", "params", "accuracy"]]),
        "max_params": st.none() | st.floats(1, 1e12),
        "n_trials": st.none() | st.integers(1, 10**9),
        "minutes": st.none() | st.floats(1e-3, 1e6),
        "confirm": st.sampled_from([None, "on", "off"]),
        "worker": st.sampled_from(["off", "create"]),
        "runs": PATHS.map(lambda text: str(Path(text))),
    },
)


@pytest.mark.slow
@hypothesis_settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(given=ANY_SEARCH)
def test_settings_written_as_a_command_read_back_as_they_were(given: dict[str, Any]):
    settings = settings_class("search").from_dict({**compose("search", ["budget=smoke"]), **given})
    line = command_line("search", settings)
    assert read_settings("search", shlex.split(shlex.join(line))) == settings


@pytest.mark.parametrize(
    "settings",
    [
        ["experiment=ratio", "budget=smoke", "n_trials=3"],
        [
            "space=hybrid",
            "space.n_experts=[8]",
            "space.split.low=0.2",
            "data=mad",
            "data.parts.compression.vocab_size=32",
        ],
        ["space.E.top_k=[1,2]", "space.letters=[M,E,[M,E]]", "confirm=on", "objectives=[val_loss,params]"],
    ],
    ids=str,
)
def test_a_search_from_choices_reads_back_from_its_command(settings):
    wanted = read_settings("search", settings)
    assert read_settings("search", command_line("search", wanted)) == wanted


def test_a_script_for_slurm_keeps_lists_and_quotes_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        Path(f"{name}.txt").write_text("text " * 100)
    write(Path("experiments/two.yaml"), "data: {kind: text, path: [a.txt, b.txt]}\n")
    asked = ["search", "experiment=two", "budget=smoke", "study=my study", "tracking=off", "launch=slurm"]
    assert run([*asked, "json=true"]) == 0
    found = json.loads(capsys.readouterr().out)
    script = Path(found["script"]).read_text()
    command = shlex.split(script.split("srun ")[-1].replace("\\\n", " "))
    given = read_settings("search", command[3:])
    assert (given.data["path"], given.study, given.worker) == (["a.txt", "b.txt"], "my study", "create")
    assert subprocess.run(["bash", "-n", found["script"]], capture_output=True).returncode == 0


@pytest.mark.slow
def test_a_name_outside_the_encoding_of_the_terminal_is_printed_with_replacements(tmp_path):
    (tmp_path / "größe.txt").write_text("".join(f"line of text {n}\n" for n in range(400)))
    small = ["train.tokens=128", "train.batch_size=2", "train.seq_len=16", "train.valid_tokens=32"]
    command = [
        sys.executable,
        "-m",
        "hybridnas.train",
        "pattern=F",
        "arch.d_model=8",
        *small,
        "tracking=off",
        "out=run",
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*command, "data=text", "data.path=größe.txt"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "gr??e.txt" in done.stdout.replace("gr?e", "gr??e")


def test_piped_output_is_plain_and_tabular(capsys):
    assert run(["describe", "preset=moe_mamba"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    header, *rows = (line.split("\t") for line in out.splitlines() if "\t" in line)
    assert header[:2] == ["layers", "block"]
    assert {len(row) for row in rows} == {len(header)}
    total = next(row for row in rows if row[1] == "total")
    assert total[header.index("active")] == "26,288,128"


def test_describe_without_anything_lists_the_presets(capsys):
    assert run(["describe"]) == 0
    rows = {line.split("\t")[0]: line.split("\t") for line in capsys.readouterr().out.splitlines()}
    assert rows["moe_mamba"][3:5] == ["416,358,400", "26,288,128"]
    assert rows["mamba"][3:5] == ["27,131,904", "27,131,904"]
    header = rows["preset"]
    shown = dict(zip(header, rows["mixtral"], strict=True))
    assert (shown["pattern"], shown["published"]) == ("(AE)x32", "46.7B / 12.9B")
    assert (shown["state at 4k"], shown["state at 128k"]) == ("1 GiB", "32 GiB")


def test_describe_compares_the_families_and_presets_that_are_named(capsys):
    assert run(["describe", "presets=granite,mixtral", "json=true"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["presets"]
    assert [one["preset"] for one in found][-2:] == ["granite_h_small", "mixtral"]
    mixtral = found[-1]
    assert mixtral["state_bytes"] == {"4096": 2**30, "131072": 2**35}
    assert mixtral["active"] == {"neither": 12_617_781_248, "one": 12_748_853_248, "both": 12_879_925_248}
    assert (mixtral["published"]["total"], mixtral["published"]["active_params_by"]) == (46_702_792_704, ["both"])


def test_describe_names_the_convention_of_a_published_figure(capsys):
    assert run(["describe", "preset=nemotron_3_nano"]) == 0
    out = capsys.readouterr().out
    assert "3,580,073,408 with embedding and head, 3,227,751,872 with one of the two matrices\n" in out
    assert "released: Nemotron-3-Nano-30B-A3B, 31,577,937,344 parameters with embedding and head (transformers" in out
    assert "its makers state: 31.6B parameters, 3.2B active (with one of the two matrices); source: arXiv" in out


def test_a_drawing_is_written(tmp_path, capsys):
    target = tmp_path / "graph.svg"
    assert run(["describe", "pattern=(ME)x2", LIGHT, f"out={target}"]) == 0
    assert target.read_text().count("<svg") == 1
    assert f"drawn: {target}" in capsys.readouterr().out


def test_every_environment_variable_that_is_read_is_in_the_help():
    read = set()
    for path in PACKAGE.rglob("*.py"):
        pattern = (
            r"environ(?:\.get|\.setdefault|\.pop)?[\[(]\"([A-Z_]+)\"|getenv\(\"([A-Z_]+)\"|^ENVIRONMENT = \"(\w+)\""
        )
        for groups in re.findall(pattern, path.read_text(), re.MULTILINE):
            read |= set(groups) - {""}
    launchers = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"}  # set by torchrun
    ours = {"GOMP_SPINCOUNT", "MLFLOW_DISABLE_TELEMETRY"}  # set, so that nothing else needs to be
    assert read - launchers - ours <= set(ENVIRONMENT)
    assert {"HYBRIDNAS_CACHE", "HYBRIDNAS_STORAGE"} <= read


def test_help_leaves_out_what_another_kind_of_data_has():
    text, stdlib = (help_text("train", "x", [f"data={kind}"]) for kind in ("text", "stdlib"))
    assert "\n  data.path=" in text
    assert "\n  data.path=" not in stdlib
    assert "\n  data.revision=" not in text
    assert "\n  data.tokenizer=" in stdlib


def test_help_offers_the_experiments_that_fit_a_command():
    assert "experiment=expert_count, inner_moe, ratio\n" in help_text("search", "x")
    assert "mqar" in help_text("evaluate", "x").partition("experiment=")[2].partition("settings")[0]


@pytest.mark.parametrize("name", ["E", "moe"])
def test_describe_lists_the_settings_of_a_block(name, capsys):
    from hybridnas.registry import BLOCKS

    assert run(["describe", f"block={name}"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[1:]] == list(BLOCKS.get("E").Config.field_names())
    assert all(row[3] for row in rows)


def test_a_setting_far_from_all_others_is_answered_with_all_of_them(capsys):
    assert run(["train", "preset=mamba", "train.qqqqqqqq=1"]) == 2
    assert "did you mean" not in capsys.readouterr().err


def test_describe_says_of_a_model_that_sees_later_tokens_that_it_does(capsys):
    experts = ["describe", "pattern=ME", "arch.d_model=16", "arch.n_experts=2"]
    for router, causal in (("expert_choice", False), ("switch", True)):
        assert run([*experts, f"arch.E.router={router}"]) == 0
        assert ("sees later tokens" in capsys.readouterr().out) is not causal
        assert run([*experts, f"arch.E.router={router}", "json=true"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["causal"] is causal


@pytest.mark.parametrize(("presets", "hinted"), [(("mamba", "transformer"), True), (("mamba", None), False)])
def test_a_search_whose_minutes_the_presets_used_says_that_nothing_was_drawn(presets, hinted, tmp_path, capsys):
    from hybridnas.cli.search import _print
    from hybridnas.search.runner import SearchSummary
    from hybridnas.study.records import TrialRecord

    records = [TrialRecord(number=n, state="PRUNED", pattern="MM", preset=name) for n, name in enumerate(presets)]
    config = read_settings("search", [f"runs={tmp_path}"]).search()
    _print(SearchSummary(records, None, tmp_path, None, None, "time", 30.0), config)
    assert ("no candidate of the space was drawn" in capsys.readouterr().out) is hinted
