"""The table: built in pieces that resume, looked up instead of trained, refused in words where it does not fit."""

import csv
import json
import math

import pytest

import hybridnas
from hybridnas.bench.suites.table import _part
from hybridnas.cli.compose import compose
from hybridnas.cli.search import search_config
from hybridnas.errors import ConfigError, StudyError, TrainingError
from hybridnas.search.replay import replay
from hybridnas.search.table import Table, TableSpec, load_table
from hybridnas.search_spaces.space import Space
from hybridnas.studies import Study
from hybridnas.tabular.build import build
from hybridnas.train import experiment

BUDGET = {
    **{"d_model": 16, "depth": 2, "n_experts": 2, "multiple": 1, "seq_len": 16, "batch_size": 2},
    **{"tokens_per_active_param": 0.1, "rungs": 2, "reduction": 2, "valid_tokens": 64},
}


def space_of(folder, corpus, **changes):
    spec = {"path": f"{folder}/t.csv", "data": {"kind": "text", "path": str(corpus)}, "budget": BUDGET, "seeds": 2}
    given = {"name": "small", "letters": ["M", "F"], "motif_length": [1, 2], "baselines": ["mamba"]}
    return Space.from_mapping({**given, "table": {**spec, **changes}})


@pytest.fixture(scope="module")
def built(tmp_path_factory, corpus):
    """A table of the four patterns MM, FF, MF and FM, built once."""
    folder = tmp_path_factory.mktemp("table")
    space, lines = space_of(folder, corpus), []
    return space, build(space, report=lines.append, work=folder / "work"), lines, folder


def test_every_architecture_is_trained_once_and_the_best_quarter_twice(built):
    _, table, lines, folder = built
    assert sorted(row.pattern for row in table.firsts()) == ["FF", "FM", "MF", "MM"]
    best = min(table.firsts(), key=lambda row: row.score)
    assert [row.fingerprint for row in table.rows if row.seed == 1] == [best.fingerprint]
    assert len(table.rows) == 5
    assert lines[0].startswith("4 architectures of ")
    assert "loss" in lines[-1]
    assert list((folder / "work").glob("small-*/")) == []


def test_a_row_tells_what_was_trained_and_how(built):
    space, table, _, _ = built
    spec = TableSpec.of(space)
    target = space.target(spec.budget.scale(257))
    with table.path.open() as file:
        cells = next(iter(csv.DictReader(file)))
    assert {"pattern", "fingerprint", "choices", "seed", "params", "active_params", "state_bytes"} <= set(cells)
    assert {"tokens", "seconds", "cpu_seconds", "command", "commit"} <= set(cells)
    for point in spec.points(target):
        assert math.isfinite(float(cells[f"loss_at_{point}"]))
        assert 0 <= float(cells[f"accuracy_at_{point}"]) <= 1
    assert json.loads(cells["choices"]) == {"motif_length": 1, "slot0": "F"}  # the first spelling of FF
    assert int(cells["tokens"]) == spec.points(target)[-1]


def test_a_table_reads_back_as_it_was_written(built):
    _, table, _, _ = built
    assert Table.read(table.path).rows == table.rows


def test_a_table_that_was_cut_short_goes_on_and_equals_the_whole_one(built, corpus, tmp_path, monkeypatch):
    _, whole, _, _ = built
    space = space_of(tmp_path, corpus)
    real, calls = experiment.train_run, []

    def dies(*args, **rest):
        calls.append(args)
        if len(calls) == 3:
            raise TrainingError("the power went")
        return real(*args, **rest)

    monkeypatch.setattr(experiment, "train_run", dies)
    with pytest.raises(TrainingError, match="the power went"):
        build(space, work=tmp_path / "work")
    assert len(Table.read(tmp_path / "t.csv").rows) == 2
    table = build(space, work=tmp_path / "work")
    assert len(calls) == 3 + 3
    assert [(row.pattern, row.seed, row.losses) for row in table.rows] == [
        (row.pattern, row.seed, row.losses) for row in whole.rows
    ]


def test_parts_share_the_work_and_the_second_seeds_wait_for_all(built, corpus, tmp_path):
    _, whole, _, _ = built
    space, lines = space_of(tmp_path, corpus), []
    first = build(space, part=(0, 2), report=lines.append, work=tmp_path / "work")
    assert len(first.rows) == 2
    assert lines[-1] == "2 architectures of other parts are not there yet; further seeds follow when they are"
    build(space, part=(1, 2), work=tmp_path / "work")
    table = build(space, part=(0, 2), work=tmp_path / "work")
    assert [row.losses for row in table.rows] == [row.losses for row in whole.rows]


def test_the_minutes_end_a_build_between_two_trainings(corpus, tmp_path, monkeypatch):
    space, lines = space_of(tmp_path, corpus), []
    table = build(space, minutes=1e-9, report=lines.append, work=tmp_path / "work")
    assert table.rows == []
    assert lines[-1] == "the minutes are used; the same command goes on"


@pytest.mark.parametrize("part", ["2/2", "x", "1", "0/0", "-1/2"])
def test_a_part_that_is_none_is_refused(part):
    with pytest.raises(ConfigError, match="must be INDEX/COUNT with INDEX below COUNT"):
        _part(part)


def search(folder, space, *settings, study="s"):
    config = search_config(compose("search", [f"runs={folder}", f"study={study}", "tracking=off", *settings]))
    return Study.of(config.replace(space={"table": space.table, **{k: getattr(space, k) for k in _SHAPE}})).run()


_SHAPE = ("name", "letters", "motif_length", "baselines")


@pytest.mark.parametrize("pruner", ["none", "hyperband", "halving"])
def test_a_search_looks_up_instead_of_training(built, tmp_path, monkeypatch, pruner):
    space, table, _, _ = built

    def never(*args, **rest):
        raise AssertionError("trained")

    monkeypatch.setattr(experiment, "train_run", never)
    summary = search(tmp_path, space, "n_trials=4", f"pruner={pruner}")
    known = {row.fingerprint: row for row in table.firsts()}
    assert summary.records[0].preset == "mamba"
    done = [record for record in summary.records if record.state == "COMPLETE"]
    assert done
    for record in done:
        row = known[record.fingerprint]
        assert record.valid_loss == row.score
        assert record.rungs == [[point, row.losses[point]] for point in sorted(row.losses)]
    assert len({record.fingerprint for record in summary.records}) == 4
    assert summary.best.valid_loss <= min(record.valid_loss for record in done)
    assert summary.exported is None
    assert summary.report.is_file()
    page = summary.report.read_text()
    assert f"Nothing was trained: scores of 4 architectures, looked up in {table.path}." in page
    assert "not drawn" not in page
    assert "hybridnas.replay" not in page


def test_a_trial_of_a_table_has_an_architecture_and_no_weights(built, tmp_path):
    space, _, _, _ = built
    summary = search(tmp_path, space, "n_trials=2")
    best = hybridnas.load_study(summary.folder).best
    assert best.arch.fingerprint() == best.record.fingerprint
    with pytest.raises(StudyError, match="its score was looked up in a table") as caught:
        best.model()
    assert (caught.value.field, caught.value.got) == ("trial", best.number)
    with pytest.raises(StudyError, match="looked its scores up in a table") as refused:
        replay(summary.folder, best.number)
    assert refused.value.field == "study"


def test_a_search_on_a_table_resumes(built, tmp_path):
    space, _, _, _ = built
    search(tmp_path, space, "n_trials=2")
    summary = search(tmp_path, space, "n_trials=4")
    assert len(summary.records) == 4
    assert len({record.fingerprint for record in summary.records}) == 4


def test_what_the_table_lacks_is_infeasible_and_the_search_goes_on(built, tmp_path, corpus):
    _, table, _, _ = built
    part = Table([row for row in table.rows if row.pattern in ("MM", "FF")], tmp_path / "t.csv")
    part.write()
    summary = search(tmp_path, space_of(tmp_path, corpus), "n_trials=4", "sampler=bruteforce", "pruner=none")
    states = {record.choices.get("slot0", "M") + record.choices.get("slot1", ""): record for record in summary.records}
    assert states["MF"].state == "INFEASIBLE"
    assert "pattern 'MF' at these sizes is not among the 2 architectures of" in states["MF"].reason
    assert sum(record.state == "COMPLETE" for record in summary.records) == 2
    assert summary.ended == "exhausted"


def test_a_missing_table_is_one_clear_sentence(tmp_path, corpus):
    with pytest.raises(StudyError) as one:
        search(tmp_path / "runs", space_of(tmp_path, corpus))
    assert str(one.value) == (
        f"the table {tmp_path}/t.csv is missing; build it with python -m hybridnas.bench table (an hour or more on one "
        f"core), or give its place with space.table.path=FILE"
    )
    assert not (tmp_path / "runs").exists()


def test_a_table_of_other_settings_is_refused(built, corpus):
    _, _, _, folder = built
    with pytest.raises(StudyError, match="was trained with other settings than space 'small' states"):
        load_table(space_of(folder, corpus, budget={**BUDGET, "lr": 0.5}))
    changed = space_of(folder, corpus, budget={**BUDGET, "rungs": 1, "n_trials": 3})
    assert len(load_table(changed)[1].rows) == 5  # what trained the rows is the same


def test_rungs_that_were_not_measured_are_refused(built, tmp_path, corpus):
    _, _, _, folder = built
    space = space_of(folder, corpus, budget={**BUDGET, "rungs": 3})
    with pytest.raises(StudyError, match=r"has no scores at [\d,]+ tokens but at .*: choose space.table.budget.rungs"):
        search(tmp_path, space)


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "is empty; go on with"), ("pattern,seed\nMM,0\n", "cannot be read: KeyError")],
)
def test_a_damaged_table_is_refused(tmp_path, corpus, content, words):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(StudyError, match=words):
        load_table(space_of(tmp_path, corpus))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"path": "t.csv"}, "space 'x' table needs data, a mapping of settings"),
        ({"path": "t.csv", "data": {}, "budget": {"d_model": 8}}, "space 'x' table needs a value for 'depth'"),
        ({"path": 3, "data": {}, "budget": BUDGET}, "path=3 must be text"),
        ({"pth": "t", "data": {}, "budget": BUDGET}, "space 'x' table has no field 'pth'; did you mean 'path'"),
    ],
)
def test_a_table_that_is_described_wrongly_is_refused(table, words):
    space = Space.from_mapping({"name": "x", "letters": ["M"], "motif_length": [2], "table": table})
    with pytest.raises(ConfigError, match=words):
        TableSpec.of(space)
    with pytest.raises(ConfigError, match="has no table; choose one that has"):
        TableSpec.of(Space.from_mapping({"name": "x", "letters": ["M"], "motif_length": [2]}))
