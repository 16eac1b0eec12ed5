"""What a search costs with many trials and many workers: decisions, operations of its storage, and the largest fleet.

Finished trials are simulated: their choices are drawn from the space, their losses from a generator. Decisions are
timed in this process, by its own processor time: drawing a candidate, promoting a paused one, and all of a trial but
its training. Operations of the storage are counted for a trial. With ``HYBRIDNAS_STORAGE`` set, the statements of a
worker's trials are recorded and sent again by simulated workers, connections of this process, as fast as PostgreSQL
answers: what a server bears. The scratch study is deleted at the end.

The rate falls with the workers, since each reads the records of all others: it is measured with one changed record a
look and with as many as there are workers, and what the server can bear is calculated from both.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hybridnas.arch.arch import Arch
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.method import Spread
from hybridnas.bench.result import Result, Table
from hybridnas.errors import StudyError
from hybridnas.search.config import SAMPLERS, USUAL_SAMPLER, Budget
from hybridnas.search.history import History
from hybridnas.search.latency import Figure
from hybridnas.search.loop import Loop
from hybridnas.search.plan import Plan
from hybridnas.search.pruning.halving import ranked
from hybridnas.search.sampling.candidates import Candidates
from hybridnas.search.sampling.uniform import evenly
from hybridnas.search.storage.database import ENVIRONMENT, Database, SqlStore, database_url, reason
from hybridnas.search.storage.folder_store import LEASES, FolderStore
from hybridnas.search.storage.store import MemoryStore, RecordStore
from hybridnas.search.table import LookupTrainer, looked_up
from hybridnas.search_spaces.space import load_space
from hybridnas.study.callbacks import COMPLETED
from hybridnas.study.records import COMPLETE, PRUNED, RESULT, TrialRecord, trial_folder
from hybridnas.tracking.secrets import masked
from hybridnas.train.callbacks import Action
from hybridnas.train.records import Eval, TrainResult

if TYPE_CHECKING:
    from psycopg import Connection

RUNGS, REDUCTION = (100, 300, 900), 3
GOAL, AT = 0.05, 10_000  # the most seconds of a draw, and of a promotion, at so many finished trials
SLOW = 1.0  # a sampler that takes longer [s] is not asked at ten times the trials
ENDLESS = 10**6  # trials asked for: more than are simulated
ENOUGH = 5.0  # of one form [s of the processor]
WAITING = 8  # paused candidates of a rung that get a real architecture, since they may be promoted
MINUTES = 5.0  # of a trial, for which the fleet is stated
TWO = ("val_loss", "params")
OPERATIONS = ("deciding", "changes", "orphans", "next_number", "begin", "save", "release")  # of a store


def run(config: BenchConfig) -> Result:
    """Time decisions by finished trials, count what storage is asked for, and let simulated workers load a database."""
    result = Result("fleet")
    candidates = _candidates(config)
    for count in config.pick((10, 1_000, 10_000, 100_000), (10, 1_000, 10_000), (10, 40)):
        _decisions(result, config, candidates, count)
    for what in (f"draw: {USUAL_SAMPLER}", "promotion"):
        _hold(result, what, config)
    _journal(result, config, candidates)
    url = database_url("env") if os.environ.get(ENVIRONMENT) else None
    if url is None:
        result.notes.append(f"PostgreSQL was not measured: {ENVIRONMENT} is not set")
    else:
        _database(result, config, candidates, url)
    return result


def _candidates(config: BenchConfig) -> Candidates:
    budget = Budget(d_model=16 if config.tiny else 24, depth=8, multiple=1)
    return Candidates(load_space(config.space or "mamba_moe"), budget.scale(256))


def _decisions(result: Result, config: BenchConfig, candidates: Candidates, count: int) -> None:
    """Time what is decided after ``count`` finished trials."""
    case = f"{count:,} trials"
    records = simulated(candidates, count)
    history = _history(records)
    rounds = config.pick(9, 5, 1)
    for name in SAMPLERS:
        if name in ("gp", "bruteforce"):
            continue
        _time_draws(result, name, name, _plan(candidates, sampler=name), history, rounds)
    two = ("several objectives: tpe", _plan(candidates, sampler="tpe", objectives=TWO))
    _time_draws(result, *two[:1], "tpe", two[1], _history(records, TWO), rounds)
    promotion = _plan(candidates).promotion
    both = _history(records, TWO)
    losses = {"val_loss": 2.5, "params": 1.0}
    forms: dict[str, Callable[[], object]] = {
        "promotion": lambda: promotion.next(history),
        "pause or go on": lambda: promotion.goes_on(history, count, RUNGS[0], {"val_loss": 2.5}),
        "checkpoints to keep": lambda: promotion.may_return(history),
        "two objectives: pause or go on": lambda: promotion.goes_on(both, count, RUNGS[0], losses),
    }
    for name, form in forms.items():
        result.add(case, {name: _timed(form, rounds)})
    store = MemoryStore()
    for record in records:
        store.save(record)
    seconds, _ = _steps(_plan(candidates), store, config.pick(20, 10, 2))
    result.add(case, {"a trial without its training, records in memory": [seconds]})


def _time_draws(result: Result, form: str, sampler: str, plan: Plan, history: History, rounds: int) -> None:
    case, name = f"{len(history):,} trials", form if form.startswith("several") else f"draw: {form}"
    before = [one.spread for one in result.timed if one.name == name]
    if before and (before[-1] is None or before[-1].median > SLOW):
        result.missing(case, name, "not tried: too slow at a tenth of the trials")
        return
    numbers = iter(range(len(history), len(history) + rounds + 1))
    times = _timed(lambda: plan.draws.draw(history, next(numbers)), rounds + 1)
    result.add(case, {name: times[1:]}, {name: f"first of a process {times[0]:.3g} s" if times[0] > 1 else ""})


def _timed(form: Callable[[], object], rounds: int) -> list[float]:
    """Return the processor's seconds of each round; fewer rounds than asked for, but two, where they last long."""
    times: list[float] = []
    while len(times) < rounds and (len(times) < 2 or sum(times) < ENOUGH):
        began = time.process_time()
        form()
        times.append(time.process_time() - began)
    return times


def _hold(result: Result, what: str, config: BenchConfig) -> None:
    """Hold a decision at 10,000 trials against its goal, as a share of it."""
    found = next((one.spread for one in result.timed if (one.case, one.name) == (f"{AT:,} trials", what)), None)
    share = None
    if found is not None:
        share = Spread.of([value / GOAL for value in found[:5]])._replace(size=found.size)
    result.hold("at most", 1.0, share, what=f"{what} after {AT:,} trials", against=f"{GOAL * 1e3:.0f} ms")


def simulated(candidates: Candidates, count: int) -> list[TrialRecord]:
    """Return records of ``count`` finished trials, as successive halving would leave them; the same for a seed."""
    chance = random.Random(0)
    losses = [2 + chance.random() for _ in range(count)]
    place = {number: rank for rank, number in enumerate(sorted(range(count), key=losses.__getitem__))}
    records = []
    for number, loss in enumerate(losses):
        reached = 1 + sum(place[number] < count // REDUCTION**rung for rung in (1, 2))
        records.append(_finished(number, evenly(candidates, chance).params, loss, RUNGS[:reached]))
    history = _history(records)
    for rung in RUNGS[:-1]:
        above = history.scores[RUNGS[RUNGS.index(rung) + 1]]
        waiting = [number for number in ranked(history.scores[rung]) if number not in above]
        for number in waiting[:WAITING]:
            found = candidates.recorded(records[number].choices)
            records[number] = dataclasses.replace(records[number], fingerprint=found.fingerprint, pattern=found.pattern)
    return records


def _finished(number: int, choices: dict[str, Any], loss: float, reached: tuple[int, ...]) -> TrialRecord:
    curve = [{"tokens": tokens, "valid_loss": loss + 10 / tokens, "train_loss": loss, "lr": 0.01} for tokens in reached]
    last = curve[-1]["valid_loss"]
    size = 1e4 + number % 997
    cost = {"params": size, "active_params": 1e4, "embedding_params": 6e3, "flops_per_token": 5e4, "state_bytes": 1e4}
    return TrialRecord(
        number=number,
        state=COMPLETE if len(reached) == len(RUNGS) else PRUNED,
        pattern="simulated",
        fingerprint=hashlib.sha256(str(number).encode()).hexdigest(),
        choices=choices,
        cost=cost,
        valid_loss=last,
        rungs=[[entry["tokens"], entry["valid_loss"]] for entry in curve],
        curve=curve,
        objectives={"val_loss": last, "params": size},
        tokens=reached[-1],
        seconds=60.0,
        legs=[[0.0, reached[-1]]],
    )


def _history(records: list[TrialRecord], objectives: tuple[str, ...] = ("val_loss",)) -> History:
    history = History(objectives, RUNGS)
    for record in records:
        history.put(record)
    return history


def _plan(candidates: Candidates, **own: Any) -> Plan:
    return Plan(**{"candidates": candidates, "rungs": RUNGS, "reduction": REDUCTION, "n_trials": ENDLESS, **own})


class _Simulated(LookupTrainer):
    """Gives every architecture losses that follow from its fingerprint, at once."""

    def figures(self, arch: Arch) -> dict[str, Figure]:
        return {}

    def train(self, record: TrialRecord, arch: Arch, on_eval: Callable[[Eval], Action]) -> TrainResult:
        loss = 2 + int(record.fingerprint[:8], 16) / 2**32
        evals = [Eval(tokens, 0, math.nan, loss + 10 / tokens, None, math.nan, 0.0, 0.0) for tokens in RUNGS]
        return looked_up(evals, RUNGS, on_eval, failed="", folder=Path())


def _steps(plan: Plan, store: RecordStore, count: int) -> tuple[float, float]:
    """Take ``count`` steps of a search's loop; returns seconds of the processor and of the clock for each."""
    left = iter(range(count))
    loop = Loop(plan, store, _Simulated(), stop=lambda history: None if next(left, None) is not None else COMPLETED)
    began = time.process_time(), time.perf_counter()
    loop.run()
    return (time.process_time() - began[0]) / count, (time.perf_counter() - began[1]) / count


class _Counted:
    """A store that counts what it is asked for."""

    def __init__(self, store: RecordStore) -> None:
        self.store = store
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        if name in OPERATIONS:
            self.calls[name] += 1
        return getattr(self.store, name)


def _journal(result: Result, config: BenchConfig, candidates: Candidates) -> None:
    """Time and count a trial's operations on records in a folder."""
    steps = config.pick(30, 20, 2)
    rows: list[list[Any]] = []
    for count in config.pick((10, 1_000, 10_000), (10, 1_000), (10,)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / LEASES).mkdir()
            for record in simulated(candidates, count):
                place = trial_folder(folder, record.number)
                place.mkdir(parents=True)
                (place / RESULT).write_text(json.dumps(record.to_dict()))  # without waiting for the disk each time
            store = _Counted(FolderStore(folder))
            loop_seconds, clock = _steps(_plan(candidates), store, steps)
            looks = _timed(store.store.changes, steps)
        case = f"{count:,} trials"
        result.add(case, {"a trial without its training, records in a folder": [loop_seconds]})
        result.add(case, {"a look at the folder": looks})
        rows.append([count, *(store.calls[name] / steps for name in OPERATIONS), clock * 1e3])
    columns = ("finished trials", *OPERATIONS, "ms by the clock")
    result.tables.append(Table("fleet: operations of a trial on a study's folder", columns, rows))


class _Statement(NamedTuple):
    """A statement as the driver gets it."""

    sql: str
    values: Mapping[str, Any]


@contextmanager
def _recorded(store: SqlStore) -> Iterator[list[_Statement]]:
    """Record the statements that a store sends."""
    from sqlalchemy import event

    found: list[_Statement] = []

    def note(connection: Any, cursor: Any, statement: str, values: Any, *rest: Any) -> None:
        found.append(_Statement(statement, dict(values)))

    event.listen(store.database.engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(store.database.engine, "before_cursor_execute", note)


def _database(result: Result, config: BenchConfig, candidates: Candidates, url: str) -> None:
    """Count a trial's statements, send them again from many simulated workers, and calculate the fleet."""
    steps, workers = config.pick(30, 10, 2), config.pick(64, 16, 2)
    rows: list[list[Any]] = []
    loads: list[list[Any]] = []
    for count in config.pick((10, 1_000, 10_000), (10, 1_000), (10,)):
        with _study(url, simulated(candidates, count)) as opened:
            store = _Counted(opened)
            store.store.changes()
            with _recorded(opened) as statements:
                spent, clock = _steps(_plan(candidates), store, steps)
            calls = [store.calls[name] / steps for name in OPERATIONS]
            rows.append([count, len(statements) / steps, *calls, spent * 1e3, clock * 1e3])
            load = [_load(url, statements, steps, count, workers, config.pick(15.0, 5.0, 0.5), n) for n in (1, workers)]
        own = max(0.0, (1 / load[1] - 1 / load[0]) / (workers - 1))  # seconds of the server to read one more change
        rest = max(0.0, 1 / load[0] - own)
        loads.append(
            [count, workers, *load, load[0] * len(statements) / steps, _largest(rest, own), MINUTES * 60 / clock]
        )
    columns = ("finished trials", "statements", *OPERATIONS, "ms of the worker's processor", "ms by the clock")
    result.tables.append(Table("fleet: operations of a trial on PostgreSQL, one worker", columns, rows))
    loaded = (
        *("finished trials", "workers", "trials/s, one change read", "trials/s, a change of each worker read"),
        *(
            "statements/s",
            f"workers that PostgreSQL bears at {MINUTES:g} minutes a trial",
            "that decisions in turn bear",
        ),
    )
    result.tables.append(Table("fleet: simulated workers on one study in PostgreSQL", loaded, loads))
    result.facts["fleet"] = [dict(zip(loaded, row, strict=True)) for row in loads]


def _largest(rest: float, own: float) -> float:
    """Return how many workers keep a server busy: each trial costs ``rest`` seconds and ``own`` for every worker."""
    length = MINUTES * 60
    if own == 0:
        return length / rest
    return (math.sqrt(rest**2 + 4 * own * length) - rest) / (2 * own)


def _load(
    url: str, statements: list[_Statement], steps: int, count: int, workers: int, seconds: float, changes: int
) -> float:
    """Return trials/s at which workers send the recorded statements, each for trials of its own, on connections.

    ``count``: trials that the study had; later ones are renumbered. ``changes``: trials that a look reads.
    """
    numbers = itertools.count(count + 10 * steps)
    until = [math.inf]
    ready = threading.Barrier(workers + 1)
    done = [0] * workers

    def work(index: int, connection: Connection[Any]) -> None:
        ready.wait()
        while time.perf_counter() < until[0]:
            first = next(numbers) * steps
            for one in statements:
                values = dict(one.values)
                if values.get("number", -1) >= count:
                    values["number"] += first
                if "changed" in values:  # trials that others have begun a round ago
                    last = count + first - workers * steps
                    values["changed"] = list(range(last - changes, last))
                cursor = connection.execute(one.sql, values)
                if cursor.description is not None:
                    cursor.fetchall()
            done[index] += steps

    with ExitStack() as opened:
        connections = [opened.enter_context(_connection(url, workers)) for _ in range(workers)]
        threads = [threading.Thread(target=work, args=one) for one in enumerate(connections)]
        for thread in threads:
            thread.start()
        ready.wait()
        began = time.perf_counter()
        until[0] = began + seconds
        for thread in threads:
            thread.join()
        return sum(done) / (time.perf_counter() - began)


def _connection(url: str, workers: int) -> Connection[Any]:
    import psycopg

    try:
        return psycopg.connect(url.replace("+psycopg", "", 1), autocommit=True)
    except psycopg.OperationalError as error:
        raise StudyError(
            f"storage {masked(url)} refuses the connections of {workers} simulated workers ({reason(error, url)}); "
            f"raise its max_connections",
            field="storage",
            got=masked(url),
        ) from None


@contextmanager
def _study(url: str, records: list[TrialRecord]) -> Iterator[SqlStore]:
    """Make a study of these records in a database, yield it as a worker has it, and delete it."""
    from sqlalchemy import text

    name = f"bench-fleet-{os.getpid()}-{time.time_ns()}"
    database = Database(url, patience=0.0)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name / LEASES).mkdir(parents=True)
        try:
            database.run("INSERT INTO hybridnas_studies (name, card) VALUES (:name, '{}')", name=name)
            sql = (
                "INSERT INTO hybridnas_trials (study, number, state, fingerprint, record, version)"
                " VALUES (:study, :number, :state, :fingerprint, :record, 1)"
            )
            rows = [
                {
                    "study": name,
                    **{key: getattr(record, key) for key in ("number", "state", "fingerprint")},
                    "record": json.dumps(record.to_dict()),
                }
                for record in records
            ]
            with database.engine.begin() as connection:
                connection.execute(text(sql), rows)
            store = SqlStore(url, Path(folder) / name, heartbeat=20)
            try:
                yield store
            finally:
                store.close()
        finally:
            database.run("DELETE FROM hybridnas_studies WHERE name = :name", name=name)
            database.close()
