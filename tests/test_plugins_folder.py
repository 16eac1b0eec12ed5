"""Plugins of a working folder: found, refused, recorded in a study, loaded again by workers and replay."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hybridnas
from hybridnas import plugins
from hybridnas.cli import run as command
from hybridnas.data import SOURCES
from hybridnas.errors import ConfigError, ExportError, StudyError
from hybridnas.registry import BLOCKS, PLUGINS


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder; what a test registers is taken back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "_LOADED", {})
    before = set(BLOCKS), set(SOURCES)
    yield tmp_path
    for registry, names in zip((BLOCKS, SOURCES), before, strict=True):
        for name in set(registry) - names:
            registry.remove(name)
    for module in [name for name in sys.modules if name.startswith(f"{PLUGINS}.")]:
        del sys.modules[module]


def new(kind, name, **more):
    assert command(["new", kind, name, *(f"{key}={value}" for key, value in more.items())]) == 0


def test_a_template_of_each_kind_is_found(here, capsys):
    new("block", "mine", letter="V")
    new("task", "again")
    new("space", "small")
    said = capsys.readouterr().out
    assert "pattern='(VF)x2'" in said
    assert "V" not in BLOCKS
    found = hybridnas.load_plugins()
    assert {plugin.name: plugin.registers for plugin in found.plugins} == {
        "blocks/mine.py": (("block letter", "V"),),
        "tasks/again.py": (("data", "again"),),
    }
    assert not found.failed
    assert hybridnas.load_plugins() == found  # once
    assert "small" in hybridnas.list_search_spaces()
    assert hybridnas.build("VF", d_model=16, vocab_size=32).arch.cost(8).params > 0


@pytest.mark.parametrize(
    ("settings", "field", "got"),
    [
        (["block"], "name", None),
        (["thing", "mine"], "kind", "thing"),
        (["block", "Mine"], "name", "Mine"),
        (["block", "mamba"], "name", "mamba"),
        (["block", "mine", "letter=M"], "letter", "M"),
        (["block", "mine", "letter=Q"], "letter", "Q"),
        (["task", "mqar"], "name", "mqar"),
        (["task", "mine", "letter=V"], "letter", "V"),
        (["space", "hybrid"], "name", "hybrid"),
    ],
)
def test_a_name_that_is_taken_or_no_name_is_refused_and_nothing_is_written(here, capsys, settings, field, got):
    assert command(["new", *settings, "json=true"]) == 2
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert (error["field"].rpartition(".")[2], error["got"]) == (field, got)
    assert list(here.iterdir()) == []


def test_a_template_does_not_overwrite_a_file_and_takes_another_letter(here, capsys):
    new("block", "mine")
    assert command(["new", "block", "mine"]) == 2
    new("block", "other")
    letters = {plugin.registers[0][1] for plugin in hybridnas.load_plugins().plugins}
    assert len(letters) == 2


BROKEN = {
    "syntax.py": ("def (:\n", 1, "SyntaxError"),
    "raises.py": ("import json\n\n\njson.loads('{')\n", 4, "JSONDecodeError"),
    "nothing.py": ("value = 1\n", None, "registers nothing"),
    "clash.py": (
        "from hybridnas import register_block\n\n\n@register_block('M', name='mine')\nclass Mine:\n    pass\n",
        4,
        "already registered",
    ),
    "half.py": (
        "from hybridnas import register_block\n\n\n@register_block('V', name='mine', aliases=('+',))\nclass Mine:\n"
        "    class Config:\n        pass\n\n\nraise RuntimeError\n",
        10,
        "RuntimeError",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_fails_is_left_out_with_line_and_cause_and_the_others_go_on(here, name):
    text, line, cause = BROKEN[name]
    new("block", "good", letter="B")
    (here / "blocks" / name).write_text(text)
    found = hybridnas.load_plugins()
    assert [plugin.name for plugin in found.plugins] == ["blocks/good.py"]
    [(file, sentence)] = found.failed.items()
    assert file == f"blocks/{name}"
    assert (f"line {line}," in sentence) == (line is not None)
    assert cause in sentence
    assert "\n" not in sentence
    assert "V" not in BLOCKS
    assert "+" not in hybridnas.registry.ALIASES
    assert BLOCKS.get("M").__module__ == "hybridnas.blocks.mamba"


def test_the_files_of_a_checkout_are_no_plugins(here):
    package = Path(hybridnas.__file__).parent
    (here / "blocks").symlink_to(package / "blocks")
    assert plugins.plugin_files() == {}
    assert hybridnas.load_plugins().plugins == ()


def test_a_file_that_changed_after_it_was_loaded_is_refused(here):
    new("block", "mine")
    hybridnas.load_plugins()
    with (here / "blocks/mine.py").open("a") as file:
        file.write("# changed\n")
    with pytest.raises(ConfigError) as caught:
        hybridnas.load_plugins()
    assert caught.value.field == "plugins"


def test_nothing_runs_unasked_and_the_error_says_what_waits(here, capsys):
    new("block", "mine", letter="V")
    capsys.readouterr()
    assert command(["describe", "pattern=VF", "arch.d_model=16"]) == 2
    assert "blocks/mine.py is not loaded: plugins=true does that" in capsys.readouterr().err
    assert command(["describe", "pattern=VF", "arch.d_model=16", "plugins=true"]) == 0
    assert "plugins: blocks/mine.py (block letter V)" in capsys.readouterr().out


def test_a_file_that_failed_is_not_said_to_wait(here, capsys):
    new("block", "mine", letter="V")
    with (here / "blocks/mine.py").open("a") as file:
        file.write("def broken(:\n")
    capsys.readouterr()
    assert command(["describe", "pattern=VF", "arch.d_model=16", "plugins=true"]) == 2
    said = capsys.readouterr().err
    assert "blocks/mine.py could not be loaded, see above" in said and "plugins=true does that" not in said


def test_a_file_of_settings_cannot_ask_for_code(here, capsys):
    new("block", "mine", letter="V")
    (here / "experiments").mkdir()
    (here / "experiments/sly.yaml").write_text("plugins: true\npattern: VF\narch: {d_model: 16}\n")
    assert command(["train", "experiment=sly", "json=true"]) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["field"] == "plugins"
    assert "V" not in BLOCKS


def test_a_study_knows_the_plugins_that_its_patterns_and_data_need(here):
    new("block", "mine", letter="V")
    new("block", "unused", letter="B")
    new("task", "again")
    hybridnas.load_plugins()
    space, data = {"letters": ["M", "V{d_inner=8}"], "motif_length": [2]}, {"kind": "mixture", "parts": {"again": {}}}
    assert list(plugins.used_by(space, data)) == ["blocks/mine.py", "tasks/again.py"]
    assert plugins.used_by({"letters": ["M", "F"], "description": "V"}, {"kind": "stdlib"}) == {}


def test_an_exported_model_says_which_plugin_it_needs(here):
    new("block", "mine", letter="V")
    hybridnas.load_plugins()
    folder = here / "model"
    hybridnas.build("VF", d_model=16, vocab_size=32).save_pretrained(folder)
    digest = json.loads((folder / "config.json").read_text())["plugins"]["V"]["sha256"]
    assert digest in (folder / "README.md").read_text()
    assert hybridnas.load(folder).arch.pattern == hybridnas.Pattern.parse("VF")
    BLOCKS.remove("V")
    with pytest.raises(ExportError) as caught:
        hybridnas.load(folder)
    assert (caught.value.field, caught.value.got) == ("plugins", "V")
    assert "blocks/mine.py" in str(caught.value)


def python(*arguments, cwd):
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, cwd=cwd, timeout=600)


@pytest.mark.long
@pytest.mark.slow
def test_templates_pass_their_tests_train_are_searched_by_workers_and_replayed(here, tiny):
    new("block", "mine", letter="V")
    new("task", "again")
    new("space", "small")
    done = python("pytest", "-q", "tests", cwd=here)
    assert done.returncode == 0, done.stdout
    sizes = [setting for setting in tiny if setting.startswith(("budget.", "tracking", "pruner"))]
    search = ["hybridnas.search", "plugins=true", "data=again", "study=demo", "space.letters=[M,V]", "budget=smoke",
              "space.baselines=[]", "n_trials=2", "workers=2", *sizes]  # fmt: skip
    done = python(*search, cwd=here)
    assert done.returncode == 0, done.stderr
    kept = json.loads((here / "runs/demo/study.json").read_text())
    assert sorted(kept["identity"]["plugins"]) == ["blocks/mine.py", "tasks/again.py"]
    replay = ["hybridnas.replay", "study=demo", "trial=0"]
    done = python(*replay, cwd=here)
    assert done.returncode == 2
    assert "is not loaded, and it is part of the study" in done.stderr
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    done = python(*replay, "plugins=true", f"runs={here / 'runs'}", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert "the same to the bit" in done.stdout
    with (here / "blocks/mine.py").open("a") as file:
        file.write("# changed\n")
    for again, words in ((search, "plugins.blocks/mine.py"), ([*replay, "plugins=true"], "has changed since")):
        done = python(*again, cwd=here)
        assert done.returncode == 2
        assert words in done.stderr
    shutil.rmtree(here / "blocks")
    with pytest.raises(StudyError) as caught:
        plugins.load_files(kept["plugin_files"])
    assert (caught.value.field, caught.value.got) == ("plugins", None)
