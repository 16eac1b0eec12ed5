"""The command line: help at once, settings as they are pinned here, mistakes in one sentence and exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from hybridnas.cli import COMMANDS, _guarded, main
from hybridnas.cli.compose import CONF, compose, help_text
from hybridnas.config import read_yaml
from hybridnas.errors import ConfigError

BUDGET = (
    "batch_size confirm confirm_seeds confirm_top d_model depth evals growth lr minutes multiple n_experts n_trials "
    "name reduction rungs seq_len tokens_per_active_param valid_tokens"
)
DATA = "cache_dir kind max_bytes tokenizer valid_fraction vocab_size"
TRAIN = (
    "accumulate batch_size beta1 beta2 checkpoint_seconds compile data_seed decay_all devices divergence_factor "
    "eval_at final_lr_fraction grad_clip lr precision schedule seed seq_len tokens valid_tokens warmup_fraction "
    "weight_decay"
)
SURFACE = {  # a setting more or less is a decision: change this table with it
    "search": "action against confirm confirm_seeds confirm_top device heartbeat launch max_active_params "
    "max_latency_ms max_params max_state_bytes minutes n_trials nodes objectives pruner runs sampler seed "
    "state_length storage study tracking worker workers",
    "train": "arch device impl max_seconds out pattern recipe tracking train",
    "describe": "arch device out pattern seq_len",
    "compare": "baseline out run runs study uri",
    "export": "out runs study trial",
    "generate": "device echo max_new_tokens model prompt seed stop_at_end temperature top_k",
    "evaluate": "arch batch_size device lengths max_gib model out pattern patterns precision seed seq_len tracking "
    "valid_tokens",
    "replay": "device out runs study trial",
    "bench": "keep_memory minutes out part patience quick repeats space suite threads tiny",
}
GROUPS = {
    "search": "budget data experiment space",
    "train": "data experiment preset",
    "describe": "experiment preset",
    "evaluate": "data experiment preset suite",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_settings_of_a_command_are_these(command):
    settings = read_yaml(CONF / f"{command}.yaml")
    groups = [next(iter(entry)) for entry in settings.pop("defaults", []) if isinstance(entry, dict)]
    assert sorted(settings) == SURFACE[command].split()
    assert sorted(groups) == GROUPS.get(command, "").split()


def test_the_settings_of_the_groups_are_these():
    for path in (CONF / "budget").glob("*.yaml"):
        assert set(read_yaml(path)) <= set(BUDGET.split()), path.name
    assert sorted(read_yaml(CONF / "data/stdlib.yaml")) == DATA.split()
    assert sorted(read_yaml(CONF / "data/text.yaml")) == sorted(
        [*DATA.split(), "path", "separator", "skip_bad_files", "split_files", "text_field"]
    )
    assert sorted(read_yaml(CONF / "train.yaml")["train"]) == TRAIN.split()


def test_commands_files_and_doors_are_the_same_set():
    assert set(SURFACE) == set(COMMANDS) == {path.stem for path in CONF.glob("*.yaml")}
    package = CONF.parent
    for command in COMMANDS:
        assert (package / f"{command}.py").is_file() or (package / command / "__main__.py").is_file(), command
        assert (package / "cli" / f"{command}.py").is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_without_anything_heavy(command):
    code = (
        "import sys; from hybridnas.cli import _guarded\n"
        f"assert _guarded({command!r}, ['--help']) == 0\n"
        "heavy = {'torch', 'mlflow', 'optuna', 'datasets', 'tokenizers', 'matplotlib', 'transformers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"python -m hybridnas.{command} [key=value ...]")
    for setting in SURFACE[command].split():
        assert f"\n  {setting}:" in done.stdout


def test_help_lists_the_options_of_the_groups():
    text = help_text("search", COMMANDS["search"])
    assert "space       attention_placement, hybrid, mamba_moe" in text
    assert "budget      laptop, paper, smoke, workstation" in text


def test_the_console_script_and_the_doors_are_one(capsys):
    with pytest.raises(SystemExit) as left:
        main(["describe", "--help"])
    assert left.value.code == 0
    done = subprocess.run([sys.executable, "-m", "hybridnas.describe", "-h"], capture_output=True, text=True)
    assert done.stdout == capsys.readouterr().out


@pytest.mark.parametrize(("argv", "words"), [([], "hybridnas COMMAND [key=value"), (["--help"], "replay")])
def test_the_overview(capsys, argv, words):
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 0
    assert words in capsys.readouterr().out


def test_an_unknown_command_is_met_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as left:
        main(["serch"])
    assert left.value.code == 2
    assert capsys.readouterr().err == "hybridnas: unknown command 'serch'; did you mean 'search'?\n"


def test_the_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("hybridnas ")


LIGHT = "arch.d_model=32"
MISTAKES = [
    (
        "describe",
        ["pattern=(MX)x2", LIGHT],
        "PatternError: pattern '(MX)x2' has unknown letter 'X' at character 3",
    ),
    ("describe", ["pattern=(ME", LIGHT], "has '(' that is never closed at character 1"),
    ("describe", ["pattern=ME)", LIGHT], "PatternError: pattern 'ME)'"),
    ("describe", ["pattern=M{dstate=3}", LIGHT], "has no field 'dstate'; did you mean 'd_state'?"),
    ("describe", ["pattern=M{d_state=x}", LIGHT], "d_state='x' is not an integer"),
    ("describe", ["pattern=ME", "arch.d_model=abc"], "d_model='abc' must be an integer, got str"),
    ("describe", ["pattern=ME", "arch.d_mode=3"], "ConfigError"),
    ("describe", ["pattern=ME"], "needs a width: arch.d_model=64"),
    ("describe", ["pattern=A", LIGHT, "arch.n_heads=5"], "n_heads=5 does not divide d_model=32"),
    ("describe", ["pattern=ME", LIGHT, "arch.n_experts=0"], "n_experts=0 must be >= 1"),
    ("describe", ["pattern=ME", LIGHT, "arch.n_experts=-2"], "n_experts=-2 must be >= 1"),
    ("describe", ["pattern=ME", "arch.d_model=-8"], "d_model=-8 must be >= 1"),
    ("describe", ["preset=mambo"], "describe preset=mambo is unknown; did you mean 'mamba'?"),
    ("describe", ["preset=mamba", "pattern=ME"], "give preset=mamba or pattern='ME', not both"),
    (
        "describe",
        ["preset=moe_mamba", "preset.n_blocks=0"],
        "n_blocks=0 must be a whole number of at least 1",
    ),
    ("describe", ["preset=moe_mamba", "preset.n_expert=2"], "n_expert"),
    ("describe", ["preset.d_model=3"], "needs a preset, e.g. preset=moe_mamba"),
    ("describe", ["prest=mamba"], "describe has no setting 'prest'"),
    ("describe", ["+foo=1"], "describe has no setting 'foo'"),
    ("describe", ["mamba"], "describe takes key=value settings, got 'mamba'"),
    ("describe", ["--preset", "mamba"], "describe takes key=value settings, got '--preset'"),
    ("describe", ["~pattern"], "describe takes key=value settings, got '~pattern'"),
    ("describe", ["seq_len=abc"], "seq_len='abc' must be a whole number of 1 or more"),
    ("describe", ["seq_len=0"], "seq_len=0 must be a whole number of 1 or more"),
    ("describe", ["preset=moe_mamba", "out=graph.xyz"], "must end in .svg"),
    (
        "describe",
        ["preset=mamba", "device=foo"],
        "device='foo' is not a device; use auto, cpu, cuda or cuda:N",
    ),
    ("describe", ["preset=mamba", "device=meta"], "device='meta' does not train models"),
    ("describe", ["experiment=nope"], "describe experiment=nope is unknown"),
    ("search", ["space=mamba_mo"], "search space=mamba_mo is unknown; did you mean 'mamba_moe'?"),
    ("search", ["space=null"], "search needs its space, e.g. space=mamba_moe"),
    ("search", ["spce=hybrid"], "search has no setting 'spce'; did you mean 'space'?"),
    (
        "search",
        ["space.n_expert=[8]"],
        "space 'mamba_moe' has no choice 'n_expert'; did you mean 'n_experts'?",
    ),
    ("search", ["space.n_experts=[0]"], "space 'mamba_moe' n_experts: moe n_experts=0 must be >= 1"),
    ("search", ["space.n_experts=8,16"], "write a list as 'space.n_experts=[8,16]'"),
    ("search", ["space.letters=[M,X]"], "unknown letter 'X'"),
    ("search", ["budget=lptop"], "search budget=lptop is unknown; did you mean 'laptop'?"),
    ("search", ["budget.d_modl=3"], "budget has no field 'd_modl'; did you mean 'd_model'?"),
    ("search", ["budget.d_model=0"], "budget d_model=0 must be >= 8"),
    ("search", ["n_trials=-1"], "budget n_trials=-1 must be >= 1"),
    ("search", ["n_trials=some"], "budget n_trials='some' must be an integer, got str"),
    ("search", ["minutes=0"], "budget minutes=0 must be > 0"),
    ("search", ["minutes=inf"], "budget minutes="),
    ("search", ["seed=-1"], "search seed=-1 must be >= 0"),
    (
        "search",
        ["sampler=tp"],
        "search sampler='tp' must be one of auto, tpe, evolution, nsga2, gp, random, bruteforce",
    ),
    ("search", ["device=foo"], "device='foo' is not a device"),
    ("search", ["study=a/b"], "study='a/b' must be a plain folder name"),
    ("search", ["data=text"], "data=text needs data.path=FILE, FOLDER or GLOB"),
    ("search", ["data=hub"], "data=hub needs data.name=DATASET"),
    ("search", ["data=stdlib", "data.path=x"], "data path='x' goes with data=text, not with data=stdlib"),
    ("search", ["data.tokeniser=bpe"], "data has no field 'tokeniser'; did you mean 'tokenizer'?"),
    ("search", ["budget.lr"], "search takes key=value settings, got 'budget.lr'"),
    ("search", ["data=text", "data.path=/absent/file.txt"], "data.path='/absent/file.txt' matches no file"),
    ("search", ["data=text", "data.path=HERE", "budget.active_params=3"], "candidates are all infeasible"),
    ("search", ["data=text", "data.path=HERE", "budget.active_params=999999999999"], "all infeasible"),
    ("search", ["runs=/proc/none"], "cannot be made"),
    ("replay", [], "replay needs study=NAME and trial=NUMBER"),
    ("replay", ["study=nope", "trial=0"], "StudyError: no study in runs/nope"),
    ("replay", ["study=nope", "trial=x"], "trial='x' must be a whole number of 0 or more"),
    ("replay", ["study=nope", "trial=-1"], "trial=-1 must be a whole number of 0 or more"),
    ("export", [], "export needs study=NAME and out=DIR"),
    ("export", ["study=nope", "out=model"], "no study in runs/nope"),
    ("export", ["study=nope", "out=model", "trial=-1"], "trial=-1 must be >= 0"),
    ("generate", [], "generate needs model=FOLDER"),
    ("generate", ["model=/absent"], "ExportError: /absent"),
    ("evaluate", ["model=/absent"], "ExportError: /absent"),
    ("train", [], "train needs an architecture"),
    ("train", ["preset=mamba", "train.lr=-1"], "train lr=-1 must be > 0"),
    (
        "train",
        ["preset=mamba", "train.tokns=1"],
        "train has no setting 'train.tokns'; did you mean 'train.tokens'?",
    ),
    ("compare", ["runs=/absent"], "StudyError: no runs in /absent"),
]


@pytest.mark.parametrize(("command", "settings", "words"), MISTAKES, ids=lambda value: str(value)[:60])
def test_a_mistake_is_one_sentence_and_exit_code_2(command, settings, words, tmp_path, monkeypatch, capsys, corpus):
    monkeypatch.chdir(tmp_path)
    settings = [item.replace("HERE", str(corpus)) for item in settings]
    small = (
        [] if command != "search" else ["tracking=off"] + (["budget=smoke"] if "budget=lptop" not in settings else [])
    )
    assert _guarded(command, [*small, *settings]) == 2
    out, err = capsys.readouterr()
    assert words in err
    name, colon, sentence = err.partition(": ")
    assert name.endswith("Error")
    assert colon
    assert sentence.strip()
    assert "Traceback" not in out + err
    pointed = 3 if name == "PatternError" else 0  # the pattern, the caret, what is known
    assert err.count("\n") <= 1 + pointed


def test_a_mistake_ends_a_process_with_2_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "hybridnas", "describe", "preset=mambo"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("ConfigError: describe preset=mambo is unknown; did you mean 'mamba'?")


def test_what_the_machine_refuses_is_one_sentence(monkeypatch, capsys):
    def full(config):
        raise OSError(28, "No space left on device", "runs/x")

    monkeypatch.setattr("hybridnas.cli.describe.run", full)
    assert _guarded("describe", []) == 2
    assert capsys.readouterr().err == "OSError: runs/x: No space left on device\n"


def test_ctrl_c_is_130_where_nothing_was_begun(monkeypatch, capsys):
    def stop(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("hybridnas.cli.describe.run", stop)
    assert _guarded("describe", []) == 130
    assert "stopped by Ctrl-C" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "(ME)x8",
        "[M,E]x2",
        "M{d_state=32,expand=3}",
        "${x}",
        "${oc.env:HOME}",
        'it\'s "quoted"',
        "a, b; c = d",
        "{'a': [1, 2]}",
        "(unclosed [",
        "123",
        "true",
        "x\ny",
        " def ",
        "???",
    ],
)
def test_text_passes_unchanged(text):
    assert compose("generate", [f"prompt={text}"])["prompt"] == text
    assert compose("describe", [f"pattern={text}"])["pattern"] == text
    assert compose("search", ["data=text", f"data.path={text}"])["data"]["path"] == text
    assert compose("compare", [f"baseline={text}", f"runs={text}"])["baseline"] == text


def test_the_last_of_two_settings_counts():
    assert compose("search", ["tracking=off", "tracking=null"])["tracking"] is None
    assert compose("search", ["study=a", "study=b"])["study"] == "b"
    assert compose("search", ["seed=1", "seed=2"])["seed"] == 2


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


def test_files_of_the_folder_where_one_stands_are_options_and_win(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("search_spaces").mkdir()
    Path("experiments").mkdir()
    Path("search_spaces/mine.yaml").write_text("letters: [M, F]\nmotif_length: [2]\n")
    Path("search_spaces/hybrid.yaml").write_text("description: ours\nletters: [M]\nmotif_length: [1]\n")
    Path("experiments/long.yaml").write_text("seed: 7\nbudget:\n  lr: 0.5\n")
    assert compose("search", ["space=mine"])["space"] == {
        "name": "mine",
        "letters": ["M", "F"],
        "motif_length": [2],
    }
    assert compose("search", ["space=hybrid"])["space"]["description"] == "ours"
    long = compose("search", ["experiment=long"])
    assert (long["seed"], long["budget"]["lr"], long["budget"]["name"]) == (7, 0.5, "laptop")
    assert "mine" in help_text("search", "x")


def test_a_broken_file_matters_only_where_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("search_spaces").mkdir()
    Path("search_spaces/broken.yaml").write_text("letters: [M")
    assert compose("search", [])["space"]["name"] == "mamba_moe"
    with pytest.raises(ConfigError, match=r"search_spaces/broken.yaml is not YAML"):
        compose("search", ["space=broken"])


def test_an_experiment_with_a_mistyped_setting_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("experiments").mkdir()
    Path("experiments/typo.yaml").write_text("sed: 7\n")
    with pytest.raises(ConfigError, match=r"search has no setting 'sed'; did you mean 'seed'\?"):
        compose("search", ["experiment=typo"])


@pytest.mark.parametrize("name", ["expert_count", "inner_moe", "ratio"])
def test_the_experiments_of_this_repository_compose(name, monkeypatch):
    from hybridnas.search_spaces.space import Space

    root = CONF.parents[1]
    if not (root / "experiments").is_dir():
        pytest.skip("installed without the repository")
    monkeypatch.chdir(root)
    config = compose("search", [f"experiment={name}"])
    assert config["sampler"] == "bruteforce"
    assert Space.from_mapping(config["space"]).name == name


def test_piped_output_is_plain_and_tabular(capsys):
    assert _guarded("describe", ["preset=moe_mamba"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    header, *rows = (line.split("\t") for line in out.splitlines() if "\t" in line)
    assert header[:2] == ["layers", "block"]
    assert {len(row) for row in rows} == {len(header)}
    total = next(row for row in rows if row[1] == "total")
    assert total[header.index("active")] == "26,288,128"


def test_describe_without_anything_lists_the_presets(capsys):
    assert _guarded("describe", []) == 0
    rows = {line.split("\t")[0]: line.split("\t") for line in capsys.readouterr().out.splitlines()}
    assert rows["moe_mamba"][3:5] == ["416,358,400", "26,288,128"]
    assert rows["mamba"][3:5] == ["27,131,904", "27,131,904"]


def test_a_drawing_is_written(tmp_path, capsys):
    target = tmp_path / "graph.svg"
    assert _guarded("describe", ["pattern=(ME)x2", LIGHT, f"out={target}"]) == 0
    assert target.read_text().count("<svg") == 1
    assert f"drawn: {target}" in capsys.readouterr().out
