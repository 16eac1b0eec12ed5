"""The comparison of samplers: its file, its plots, and the arithmetic of its intervals."""

import json
import math
import sys

import numpy as np
import pytest

from hybridnas.bench.context import BenchConfig
from hybridnas.bench.suites import samplers
from hybridnas.cli.bench import run as run_command
from hybridnas.cli.compose import read_settings
from hybridnas.errors import ConfigError, StudyError
from hybridnas.search.config import PRUNERS, Budget, SearchConfig
from hybridnas.search_spaces.space import Space
from hybridnas.tabular import build as building
from hybridnas.tabular.simulate import Course


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "samplers.json"
    settings = ["samplers", "tiny=true", "repeats=2", f"out={out}"]
    before, sys.argv = sys.argv, ["bench", *settings]
    try:
        assert run_command(read_settings("bench", settings)).code == 0
    finally:
        sys.argv = before
    return out, json.loads(out.read_text())


def test_the_file_names_the_default_and_the_tokens_of_every_sampler(written):
    _, read = written
    usual = SearchConfig(space={}, data={}, budget=Budget(d_model=8, depth=1))
    assert (read["default"], read["default_pruner"]) == (usual.sampler, usual.pruner)
    assert set(read["tokens_to_best_1pct"]) == {"tpe", "evolution", "nsga2", "gp", "random"}
    assert set(read["by_pruner"]) == set(PRUNERS)
    for name, median in read["tokens_to_best_1pct"].items():
        entry = read["by_pruner"][read["default_pruner"]][name]
        assert entry["median"] == median
        assert entry["repeats"] == 2
        assert set(entry["regret_at"]) == {"4", "8", "16", "32", "64"}
    assert read["by_pruner"]["none"]["random"]["to_random_same_pruner"][0] == 1.0
    assert read["random_without_pruner"] == read["by_pruner"]["none"]["random"]["median"]
    assert read["best_1pct"]["architectures"] == 1


def test_searches_are_measured_with_seeds_that_chose_no_setting():
    courses = samplers._courses(samplers._toy(), 2, 1)
    assert {course.seed for some in courses.values() for course in some} == {1000, 1001}


def test_the_plots_lie_beside_the_file(written):
    out, read = written
    [suite] = read["suites"]
    assert suite["files"] == [str(out.with_name(f"samplers-regret-{what}.png")) for what in ("tokens", "trials")]
    for what in ("tokens", "trials"):
        assert out.with_name(f"samplers-regret-{what}.png").read_bytes().startswith(b"\x89PNG")
    [table] = suite["tables"]
    assert len(table["rows"]) == 5 * len(PRUNERS)
    assert {goal["against"] for goal in suite["goals"]} == {
        f"random with {words}" for words in ("the same pruner", "no pruner")
    }


def test_a_median_between_two_takes_the_upper_so_that_searches_without_end_count():
    assert samplers._median(np.array([1.0, 2.0, math.inf])) == 2.0
    assert samplers._median(np.array([1.0, math.inf])) == math.inf


def test_the_interval_holds_the_median_and_narrows_with_more_searches():
    few, many = np.arange(9.0), np.repeat(np.arange(9.0), 40)
    low, high = samplers.interval(few)
    assert low < 4.0 < high
    narrow = samplers.interval(many)
    assert low <= narrow[0] <= 4.0 <= narrow[1] <= high
    assert narrow[1] - narrow[0] < high - low


def test_a_quotient_of_medians_has_an_interval_or_is_not_stated():
    assert samplers.quotient(np.full(5, 2.0), np.full(5, 4.0)) == [0.5, 0.5, 0.5]
    assert samplers.quotient(np.full(5, 2.0), np.full(5, math.inf)) is None
    assert samplers.quotient(np.full(5, math.inf), np.full(5, 2.0)) is None
    ratio, low, high = samplers.quotient(np.arange(1.0, 40.0), np.arange(2.0, 80.0, 2))
    assert low < ratio == 0.5 < high


def test_a_course_tells_what_was_found_by_when():
    course = Course("tpe", "none", 0, [(1, 900, 3.0), (4, 1800, 2.0), (9, 2700, 2.5)], trials=9, tokens=2700)
    assert course.tokens_to(2.0) == 1800
    assert course.tokens_to(1.9) == math.inf
    assert course.best_at(tokens=1799) == 3.0
    assert course.best_at(trials=4) == 2.0
    assert course.best_at(tokens=10) == math.inf


def test_without_its_table_the_command_says_so_and_all_suites_go_on(tmp_path, monkeypatch):
    real = samplers.load_space("tabular")
    missing = real.replace(table={**real.table, "path": str(tmp_path / "none.csv")})
    monkeypatch.setattr(samplers, "load_space", lambda name: missing)
    with pytest.raises(StudyError, match=r"the table .*none\.csv is missing; build it with"):
        samplers.run(BenchConfig(suite="samplers"))
    assert samplers.run(BenchConfig(suite="all")).notes[0].startswith("not run: the table ")


def test_a_table_is_read_and_an_unfinished_one_is_marked(tmp_path, corpus, monkeypatch):
    budget = {
        **{"d_model": 16, "depth": 2, "n_experts": 2, "multiple": 1, "seq_len": 16, "batch_size": 2},
        **{"tokens_per_active_param": 0.1, "rungs": 2, "reduction": 2, "valid_tokens": 64},
    }
    spec = {"path": f"{tmp_path}/t.csv", "data": {"kind": "text", "path": str(corpus)}, "budget": budget, "seeds": 1}
    shape = {"name": "small", "letters": ["M", "F"], "motif_length": [2], "baselines": []}
    space = Space.from_mapping({**shape, "table": spec})
    building.build(space, part=(0, 2), work=tmp_path / "work")
    monkeypatch.setattr(samplers, "load_space", lambda name: space)
    monkeypatch.setattr(samplers, "COMPARED", ("evolution", "random"))
    monkeypatch.setattr(samplers, "usable_cores", lambda: 2)
    result = samplers.run(BenchConfig(suite="samplers", repeats=2))
    assert result.facts["preliminary"] is True
    assert result.facts["table"] == {"path": f"{tmp_path}/t.csv", "architectures": 2, "of": 4, "runs": 2}
    assert "PRELIMINARY: the table has 2 of 4 architectures" in result.notes
    building.build(space, part=(1, 2), work=tmp_path / "work")
    monkeypatch.setattr(samplers, "usable_cores", lambda: 1)  # no processes: starting them takes longer than the rest
    result = samplers.run(BenchConfig(suite="samplers", repeats=2))
    assert result.facts["preliminary"] is False
    assert [row["architectures"] for row in result.facts["fidelity"]] == [4]
    assert result.goals[0].what.startswith("Spearman of the rung at ")


def test_settings_of_the_suite_are_checked():
    with pytest.raises(ConfigError, match="bench repeats=0 must be >= 1"):
        compose_and_check(["samplers", "repeats=0"])
    with pytest.raises(ConfigError, match="unknown search space 'tabula'; did you mean 'tabular'"):
        samplers.run(BenchConfig(suite="samplers", space="tabula"))


def compose_and_check(settings):
    return read_settings("bench", settings)
