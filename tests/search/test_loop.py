"""The loop of a search in memory: one course for a seed, whatever interrupts it, on data, on a table and simulated."""

import ast
import json
from pathlib import Path

import pytest

import hybridnas
from hybridnas.cli.compose import compose
from hybridnas.cli.search import search_config
from hybridnas.errors import MatchError
from hybridnas.search.loop import Listener, Loop
from hybridnas.search.plan import Plan
from hybridnas.search.runner import Search
from hybridnas.search.sampling.candidates import Candidates
from hybridnas.search.storage.store import MemoryStore
from hybridnas.search.table import load_table
from hybridnas.search_spaces.space import Scale, Space, load_space
from hybridnas.study.callbacks import StudyCallback
from hybridnas.study.records import TrialRecord
from hybridnas.tabular.simulate import Limits, _Scores, simulate

SCALE = Scale(d_model=16, depth=3, multiple=1, n_experts=2)
SPACE = {"name": "plain", "letters": ["M", "A", "F"], "motif_length": [3], "baselines": []}
RUNGS = (100, 300, 900)


@pytest.fixture(scope="module")
def plain():
    return Candidates(Space.from_mapping(SPACE), SCALE)


@pytest.fixture(scope="module")
def scores(plain):
    found = {}
    for one in "MAF":
        for two in "MAF":
            for three in "MAF":
                candidate = plain.of({"slot0": one, "slot1": two, "slot2": three})
                if candidate.arch is not None:
                    worth = 3 * "FMA".index(one) + 2 * "AFM".index(two) + "MAF".index(three)
                    found[candidate.key] = {rung: worth + 90 / rung * (worth % 3) for rung in RUNGS}
    return found


def plan_of(plain, scores, **fields):
    given = {"candidates": plain.only(scores), "rungs": RUNGS, "reduction": 3, "n_trials": 20, "seed": 4}
    return Plan(**{**given, **fields})


def bare(record: TrialRecord) -> dict:
    """Return what of a record does not depend on the clock, or on how often it was interrupted."""
    values = json.loads(json.dumps(record.to_dict()))
    return {key: value for key, value in values.items() if key not in ("legs", "seconds", "draw_seconds", "deaths")}


class Interrupted(Exception):  # noqa: N818
    pass


class Cut(_Scores):
    """A trainer whose process ends in a training: the n-th one, or the first after it with so many evaluations."""

    def __init__(self, scores, at, evaluations):
        super().__init__(scores, RUNGS)
        self.at, self.evaluations, self.count = at, evaluations, 0

    def train(self, record, arch, on_eval):
        self.count += 1
        left = self.evaluations if self.count >= self.at else None

        def seen(value):
            nonlocal left
            if left == 0:
                raise Interrupted
            left = None if left is None else left - 1
            return on_eval(value)

        return super().train(record, arch, seen)


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["halving", "none", "hyperband"])
@pytest.mark.parametrize("sampler", ["evolution", "tpe", "nsga2", "random"])
def test_a_search_that_was_interrupted_takes_the_course_of_one_that_was_not(plain, scores, sampler, pruner):
    plan = plan_of(plain, scores, sampler=sampler, pruner=pruner)
    whole = Loop(plan, MemoryStore(), _Scores(scores, RUNGS))
    whole.run()
    store, cuts = MemoryStore(), 0
    for at, evaluations in ((3, 0), (1, 1), (1, 2), (5, 0), (2, 1), (2, 0)):
        try:
            Loop(plan_of(plain, scores, sampler=sampler, pruner=pruner), store, Cut(scores, at, evaluations)).run()
        except Interrupted:
            cuts += 1
        store.close()  # as the end of the process does
    assert cuts >= 3
    again = Loop(plan_of(plain, scores, sampler=sampler, pruner=pruner), store, _Scores(scores, RUNGS))
    again.run()
    assert [bare(record) for record in again.history.ordered()] == [bare(record) for record in whole.history.ordered()]


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["halving", "none"])
@pytest.mark.parametrize("sampler", ["evolution", "tpe", "nsga2", "random"])
def test_a_simulated_search_is_the_search_on_the_table(tmp_path, sampler, pruner):
    space = load_space("tabular")
    spec, table = load_table(space)
    scale = spec.budget.scale(table.rows[0].vocab_size)
    losses = {row.fingerprint: row.losses for row in table.firsts()}
    rungs = spec.budget.rung_tokens(space.target(scale))
    simulated = simulate(
        *(losses, Candidates(space, scale), sampler, pruner),
        rungs=rungs,
        reduction=spec.budget.reduction,
        seed=3,
        limits=Limits(most=24 * rungs[-1]),
    )
    ended = []

    class Seen(StudyCallback):
        def on_trial_end(self, event):
            ended.append(event.record)

    named = ["space=tabular", "space.baselines=[]", f"sampler={sampler}", f"pruner={pruner}", "seed=3"]
    config = search_config(compose("search", [*named, f"runs={tmp_path}", "study=s", "tracking=off"]))
    budget = config.budget.replace(n_trials=len(losses), max_tokens=simulated.tokens, minutes=None)
    Search(config.replace(budget=budget), [Seen()]).run()
    course = [(record.number, record.fingerprint, record.state, record.rungs) for record in simulated.records]
    assert [(r.number, r.fingerprint, r.state, r.rungs) for r in ended][: len(course)] == course
    assert len(course) >= 20
    found = [record.valid_loss for record in ended[: len(course)] if record.state == "COMPLETE"]
    assert min(found) == simulated.best_at()


def test_a_diverged_trial_is_not_taken_up_again(plain, scores):
    """Best at both lower rungs, then without a last score."""
    scores = {key: dict(curve) for key, curve in scores.items()}
    best = min(scores, key=lambda key: scores[key][300])
    del scores[best][900]
    loop = Loop(plan_of(plain, scores, n_trials=len(scores)), MemoryStore(), _Scores(scores, RUNGS))
    assert loop.run() == "completed"
    (failed,) = [record for record in loop.history.values() if record.state == "FAIL"]
    assert (failed.fingerprint, failed.tokens, len(failed.legs)) == (best, 300, len(failed.legs))
    assert loop.history.finished == len(scores)


def test_a_promoted_candidate_is_one_trial_with_one_record(plain, scores):
    store, events = MemoryStore(), []

    class Seen(Listener):
        def started(self, record, tokens, why):
            events.append((record.number, tokens, why))

    loop = Loop(plan_of(plain, scores, sampler="random"), store, _Scores(scores, RUNGS), Seen())
    loop.run()
    promoted = [number for number, _, why in events if why == "promoted"]
    assert promoted
    for number in promoted:
        record = store.records[number]
        legs = [event for event in events if event[0] == number]
        assert len(record.legs) == len(legs) >= 2
        assert sum(tokens for _, tokens in record.legs) == record.tokens
        assert [tokens for _, tokens, _ in legs] == [0, *RUNGS[: len(legs) - 1]][: len(legs)] or legs[1][1] in RUNGS
    assert sorted(store.records) == list(range(len(store.records)))


def test_an_architecture_that_trains_elsewhere_is_not_trained_twice(plain, scores):
    candidates = Candidates(Space.from_mapping({**SPACE, "motif_length": [1, 3]}), SCALE)
    first = candidates.of({"motif_length": 1, "slot0": "M"})  # the same as MMM
    store = MemoryStore()
    store.begin(TrialRecord(number=0, state="RUNNING", fingerprint=first.fingerprint, choices=first.choices))
    plan = plan_of(candidates, scores, sampler="bruteforce", n_trials=99)
    loop = Loop(plan, store, _Scores(scores, RUNGS), stop=lambda history: "tokens" if len(history) > 12 else None)
    loop.run()
    (same,) = [r for r in loop.history.values() if r.fingerprint == first.fingerprint and r.number != 0]
    assert (same.state, same.duplicate_of, same.tokens) == ("DUPLICATE", 0, 0)


def test_a_trial_whose_choices_mean_another_architecture_now_is_refused(plain, scores):
    store = MemoryStore()
    candidate = plain.of({"slot0": "M", "slot1": "F", "slot2": "A"})
    store.save(TrialRecord(number=0, state="RUNNING", fingerprint="0" * 64, choices=candidate.choices, pattern="MFA"))
    with pytest.raises(MatchError) as caught:
        Loop(plan_of(plain, scores), store, _Scores(scores, RUNGS)).run()
    assert caught.value.field == "choices"


def test_a_trial_that_kills_its_process_again_and_again_fails_with_the_reason(plain, scores):
    store = MemoryStore()
    for _ in range(5):
        with pytest.raises(Interrupted):
            Loop(plan_of(plain, scores), store, Cut(scores, 1, 0)).run()
        store.close()
    Loop(plan_of(plain, scores), store, _Scores(scores, RUNGS)).run()
    assert store.records[0].state == "FAIL"
    assert "its process died 5 times in a row at the same place" in store.records[0].reason
    assert [record.state for record in store.records.values()].count("FAIL") == 1


def test_a_trial_that_comes_further_each_time_may_be_interrupted_for_ever(plain, scores):
    turns = iter(range(99))

    class Further(Cut):
        def progress(self, number):
            return str(next(turns))

    store = MemoryStore()
    for _ in range(15):
        with pytest.raises(Interrupted):
            Loop(plan_of(plain, scores), store, Further(scores, 1, 0)).run()
        store.close()
    assert store.records[0].state == "RUNNING"


@pytest.mark.slow
def test_optuna_is_used_through_its_public_names_alone():
    private = []
    for path in Path(hybridnas.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and node.attr in ("_storage", "_trial_id", "_study_id"):
                private.append((path.name, node.attr))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optuna"):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                private += [(path.name, name) for name in names if name.startswith("_")]
    assert private == []


def test_marks_of_a_sampler_lie_in_the_record_and_are_given_back(plain, scores):
    loop = Loop(plan_of(plain, scores, sampler="nsga2", pruner="none"), MemoryStore(), _Scores(scores, RUNGS))
    loop.run()
    marks = [dict(record.marks) for record in loop.history.values()]
    assert all("NSGAIISampler:generation" in mark for mark in marks)
    assert max(mark["NSGAIISampler:generation"] for mark in marks) >= 1  # which needs those of the trials before
    frozen = loop.plan.view.trial(loop.history[3])
    assert frozen.system_attrs["NSGAIISampler:generation"] == marks[3]["NSGAIISampler:generation"]
