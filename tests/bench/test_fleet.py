"""Simulated fleets: histories as successive halving leaves them, the load of statements, and the calculated fleet."""

import pytest
from postgres import PASSWORD, postgres_server

from hybridnas.bench import run as run_suites
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.suites import fleet
from hybridnas.errors import StudyError
from hybridnas.study.records import COMPLETE, PRUNED


@pytest.fixture(scope="module")
def server():
    yield from postgres_server()


def test_a_simulated_history_is_one_that_halving_leaves():
    candidates = fleet._candidates(BenchConfig(tiny=True))
    records = fleet.simulated(candidates, 90)
    assert records == fleet.simulated(candidates, 90)
    assert [record.number for record in records] == list(range(90))
    reached = [len(record.rungs) for record in records]
    assert [reached.count(n) for n in (1, 2, 3)] == [60, 20, 10]
    assert {record.state for record in records if len(record.rungs) == 3} == {COMPLETE}
    assert {record.state for record in records if len(record.rungs) < 3} == {PRUNED}
    assert fleet._plan(candidates).promotion.next(fleet._history(records)) is None


@pytest.mark.parametrize(("rest", "own"), [(0.01, 0.0), (0.01, 1e-4), (0.0, 1e-3)])
def test_the_largest_fleet_keeps_the_server_busy_and_no_more(rest, own):
    workers = fleet._largest(rest, own)
    assert workers * (rest + own * workers) == pytest.approx(60 * fleet.MINUTES)


@pytest.mark.slow
def test_more_workers_than_connections_are_one_sentence_without_the_password(server):
    with pytest.raises(StudyError, match="too many clients already") as caught:
        fleet._load(server.url, [], 1, 0, 200, 0.1, 1)
    assert (caught.value.field, PASSWORD in str(caught.value)) == ("storage", False)


@pytest.mark.slow
def test_workers_load_a_real_postgresql_and_leave_nothing_there(server, monkeypatch):
    monkeypatch.setenv("HYBRIDNAS_STORAGE", server.url)
    [result] = run_suites(BenchConfig(suite="fleet", tiny=True, keep_memory=False))
    [row] = result.facts["fleet"]
    assert row["workers"] == 2
    assert row["trials/s, one change read"] > 0
    operations = next(table for table in result.tables if table.title.endswith("PostgreSQL, one worker"))
    named = dict(zip(operations.columns, operations.rows[0], strict=True))
    assert named["statements"] >= named["deciding"] + named["changes"] + named["begin"] + named["save"]
    database = fleet.Database(server.url)
    assert database.run("SELECT count(*) FROM hybridnas_trials") == [(0,)]
    database.close()
