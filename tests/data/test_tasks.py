"""Every task, found by its registration: pure, reproducible, solvable, not to be guessed, and never both sides.

For each task there is a solver as plain as can be (``solvers.py``) and a strategy of settings to try it at.
"""

import json
import subprocess
import sys
from collections import Counter

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from solvers import ORACLES

from hybridnas.data import SOURCES, open_source, source_config
from hybridnas.data.task import Task, TaskConfig

TASKS = sorted(name for name in SOURCES if issubclass(SOURCES.get(name).config, TaskConfig))


@st.composite
def _mqar(draw):
    pairs = draw(st.integers(1, 20))
    return {
        "n_pairs": pairs,
        "vocab_size": 2 * draw(st.integers(pairs + 9, pairs + 60)),
        "seq_len": 4 * pairs + 2 * draw(st.integers(0, 30)),
        "filler": draw(st.sampled_from(["random", "zero"])),
        "power_a": draw(st.sampled_from([0.01, 0.5, 1.0])),
    }


@st.composite
def _selective_copying(draw):
    count = draw(st.integers(2, 20))
    return {
        "n_tokens_to_copy": count,
        "seq_len": 2 * count + draw(st.integers(8, 60)),
        "vocab_size": draw(st.integers(6, 40)),
    }


@st.composite
def _recall(draw):
    noise = draw(st.integers(1, 8))
    return {
        "vocab_size": noise + draw(st.integers(8, 40)),
        "noise_vocab_size": noise,
        "frac_noise": draw(st.sampled_from([0.0, 0.2, 0.8])),
        "seq_len": 2 * draw(st.integers(4, 40)),
        "multi_query": draw(st.booleans()),
        "train_on": draw(st.sampled_from(["all", "scored"])),
    }


@st.composite
def _fuzzy(draw):
    noise = draw(st.integers(1, 5))
    key, value = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return {
        "k_motif_size": key,
        "v_motif_size": value,
        "vocab_size": noise + draw(st.integers(2 * max(key, value) + 6, 30)),
        "noise_vocab_size": noise,
        "frac_noise": draw(st.sampled_from([0.0, 0.3])),
        "seq_len": 2 * (key + value) + draw(st.integers(12, 80)),
        "multi_query": draw(st.booleans()),
        "train_on": draw(st.sampled_from(["all", "scored"])),
    }


@st.composite
def _mad_selective_copying(draw):
    count = draw(st.integers(2, 20))
    return {
        "n_tokens_to_copy": count,
        "seq_len": 2 * count + draw(st.integers(8, 60)),
        "vocab_size": draw(st.integers(6, 40)),
        "placing": draw(st.sampled_from(["gaps", "even"])),
        "blank_after_last": draw(st.booleans()),
    }


def _with_noise(vocab_size, seq_len, **more):
    return st.fixed_dictionaries(
        {
            "vocab_size": vocab_size,
            "seq_len": seq_len,
            "noise_vocab_size": st.integers(1, 3),
            "frac_noise": st.sampled_from([0.0, 0.3]),
            **more,
        }
    )


@st.composite
def _distractors(draw):
    pairs, others = draw(st.integers(1, 8)), draw(st.integers(0, 8))
    return {
        "n_pairs": pairs,
        "n_distractors": others,
        "noise_vocab_size": draw(st.integers(1, 8)),
        "vocab_size": 2 * (pairs + others) + draw(st.integers(12, 40)),
        "seq_len": 2 * draw(st.integers(2 * (2 * pairs + others) + 2, 90)),
        "frac_context": draw(st.sampled_from([0.5, 0.75, 1.0])),
    }


@st.composite
def _needle(draw):
    needles, digits = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    return {
        "n_needles": needles,
        "n_digits": digits,
        "seq_len": (needles + 1) * (digits + 2) + draw(st.integers(0, 60)),
        "vocab_size": draw(st.integers(40, 80)),
    }


@st.composite
def _variable_tracking(draw):
    chains, hops, values = draw(st.integers(1, 4)), draw(st.integers(0, 3)), draw(st.integers(6, 20))
    count = chains * (hops + 1)
    return {
        "n_chains": chains,
        "n_hops": hops,
        "n_values": values,
        "vocab_size": 3 + values + count + draw(st.integers(4, 20)),
        "seq_len": 3 * count + 2 + draw(st.integers(0, 60)),
    }


def _states(**sizes):
    return st.fixed_dictionaries({"seq_len": st.integers(14, 80), "score": st.sampled_from(["all", "last"]), **sizes})


def settings_of(kind):
    """Return a strategy of settings that make sense for a task."""
    return {
        "compression": _with_noise(
            st.integers(7, 40), st.integers(10, 60), score_noise=st.booleans(), score_marker=st.booleans()
        ),
        "distractor_recall": _distractors(),
        "dna_motifs": st.fixed_dictionaries(
            {"vocab_size": st.integers(7, 20), "seq_len": st.integers(12, 80), "width": st.integers(4, 8)}
        ),
        "fuzzy_recall": _fuzzy(),
        "listops": st.fixed_dictionaries({"seq_len": st.integers(12, 80), "depth": st.integers(1, 8)}),
        "needle": _needle(),
        "variable_tracking": _variable_tracking(),
        "mad_selective_copying": _mad_selective_copying(),
        "memorisation": _with_noise(st.integers(12, 40), st.integers(8, 30).map(lambda half: 2 * half)),
        "noisy_recall": _recall(),
        "parity": _states(vocab_size=st.integers(2, 9)),
        "s5": _states(generators=st.sampled_from(["all", "swaps"])),
        "in_context_recall": _recall(),
        "induction_heads": st.fixed_dictionaries(
            {"vocab_size": st.integers(5, 40), "seq_len": st.integers(12, 100), "n_between": st.integers(0, 4)}
        ),
        "mqar": _mqar(),
        "selective_copying": _selective_copying(),
    }[kind]


def task(kind, **changes):
    return open_source(source_config({"kind": kind, **changes}))


def small(kind):
    """A task at a size that suits a test, else at its own."""
    return task(kind, **({"seq_len": 128} if SOURCES.get(kind).config().seq_len > 256 else {}))


def joined(*batches):
    return [torch.cat(parts) for parts in list(zip(*batches, strict=True))[:3]]


def same(one, other):
    return all(a.equal(b) for a, b in zip(one[:3], other[:3], strict=True))


def test_every_task_has_an_oracle():
    assert set(TASKS) == set(ORACLES)


@pytest.mark.parametrize("kind", TASKS)
def test_a_batch_has_ids_targets_and_places_that_count(kind):
    source = small(kind)
    assert isinstance(source, Task)
    for batch in (source.train_batch(3, 5, source.seq_len, 1), next(source.valid_batches(10**6, 5, source.seq_len))):
        inputs, targets, mask, *_ = batch
        assert inputs.shape == targets.shape == mask.shape == (5, source.seq_len)
        assert (inputs.dtype, targets.dtype, mask.dtype) == (torch.int64, torch.int64, torch.bool)
        assert all(ids.min() >= 0 and ids.max() < source.vocab_size for ids in (inputs, targets))
        assert mask.any(dim=1).all()
    assert source.tokenizer is None
    assert kind in source.describe()
    tokens = max(1, 2**14 // source.seq_len) * source.seq_len
    scored = [ids for _, targets, mask, *_ in source.valid_batches(tokens, 8, source.seq_len) for ids in targets[mask]]
    count = source.train_tokens
    assert source.repeated(2 * count)[-9:] == "2.0 times" if count else source.repeated(10**9) == ""
    assert count is None or source.repeated(count) == ""
    answers = Counter(int(ids) for ids in scored)
    assert source.chance() == pytest.approx(max(answers.values()) / answers.total())


@pytest.mark.parametrize("kind", TASKS)
def test_a_plain_solver_derives_every_target_from_its_own_input(kind):
    @settings(max_examples=100, phases=[Phase.explicit, Phase.generate])
    @given(changes=settings_of(kind), seed=st.integers(0, 2**31), step=st.integers(0, 10**6))
    def check(changes, seed, step):
        source = task(kind, n_test_examples=3, **changes)
        train = source.train_batch(step, 3, source.seq_len, seed)
        test = next(source.valid_batches(3 * source.seq_len, 3, source.seq_len))
        for batch, training in ((train, True), (test, False)):
            for inputs, targets, mask in zip(*(part.tolist() for part in batch[:3]), strict=True):
                wanted = ORACLES[kind](source.config, inputs, mask)
                scored = [place for place, counts in enumerate(mask) if counts]
                if training and getattr(source.config, "train_on", "scored") == "all":
                    scored = [place for place in scored if place in wanted]
                assert scored
                assert {place: wanted[place] for place in scored} == {place: targets[place] for place in scored}

    check()


@pytest.mark.parametrize("kind", TASKS)
def test_positions_alone_tell_no_target(kind):
    source = small(kind)
    length = source.seq_len
    if source.vocab_size > 256:
        source = task(kind, vocab_size=64, seq_len=length)
    learn, tests = list(source.valid_batches(1024 * length, 512, length))
    places = torch.arange(length).expand(512, length)
    seen = torch.zeros(length, source.vocab_size)  # all that a guesser can learn: each id's share of each place
    seen.index_put_((places[learn.mask_BL], learn.targets_BL[learn.mask_BL]), torch.ones(()), accumulate=True)
    guesses = seen.argmax(dim=1).expand(512, length)
    right = (guesses == tests.targets_BL)[tests.mask_BL].float().mean()
    chance = max(1 / len(tests.targets_BL[tests.mask_BL].unique()), source.chance())  # lists of digits are no fair dice
    assert right < chance + 4 * (chance / min(512, int(tests.mask_BL.sum()))) ** 0.5


@pytest.mark.parametrize("kind", TASKS)
def test_examples_are_the_same_whatever_the_batch_size_and_the_step_that_is_resumed(kind):
    source, resumed = small(kind), small(kind)
    length = source.seq_len
    large = source.train_batch(1, 12, length, 5)
    cut = [resumed.train_batch(step, 4, length, 5) for step in (5, 3, 4)]  # in another order, too
    assert same(large, joined(cut[1], cut[2], cut[0]))
    whole = joined(*source.valid_batches(40 * length, 40, length))
    pieces = joined(*resumed.valid_batches(40 * length, 7, length))
    assert len(whole[0]) == 40
    assert same(whole, pieces)


@pytest.mark.parametrize("kind", TASKS)
def test_seeds_and_steps_give_other_examples_and_the_same_test_set(kind):
    source = small(kind)
    length = source.seq_len
    first = source.train_batch(0, 8, length, 0)
    for step, seed in ((0, 1), (1, 0)):
        assert not first.inputs_BL.equal(source.train_batch(step, 8, length, seed).inputs_BL)
    config = source.config
    assert source.fingerprint == open_source(config).fingerprint
    assert source.fingerprint != open_source(config.replace(task_seed=1)).fingerprint
    one, other = (next(open_source(config.replace(task_seed=seed)).valid_batches(1, 1, length)) for seed in (0, 1))
    assert not one.inputs_BL.equal(other.inputs_BL)


@pytest.mark.parametrize("kind", TASKS)
def test_train_and_test_share_no_example_however_few_there_are(kind):
    source = task(kind, **SMALLEST[kind])
    length = source.seq_len
    train = {tuple(row) for step in range(20) for row in source.train_batch(step, 200, length, 0).inputs_BL.tolist()}
    test = {tuple(row) for batch in source.valid_batches(10**6, 100, length) for row in batch.inputs_BL.tolist()}
    assert train and test
    assert not train & test


SMALLEST = {  # so few different examples that chance alone would put many on both sides
    "compression": {"vocab_size": 4, "seq_len": 8},
    "distractor_recall": {
        "vocab_size": 6,
        "noise_vocab_size": 2,
        "seq_len": 12,
        "n_pairs": 1,
        "n_distractors": 0,
        "frac_context": 1.0,
    },
    "dna_motifs": {"vocab_size": 7, "seq_len": 6, "width": 3},
    "listops": {"seq_len": 6, "depth": 1},
    "needle": {"vocab_size": 29, "seq_len": 8, "n_digits": 2},
    "variable_tracking": {"vocab_size": 9, "seq_len": 9, "n_chains": 1, "n_hops": 1, "n_values": 2},
    "fuzzy_recall": {"vocab_size": 5, "seq_len": 14, "k_motif_size": 2, "v_motif_size": 1},
    "mad_selective_copying": {"vocab_size": 4, "seq_len": 16, "n_tokens_to_copy": 3},
    "memorisation": {"vocab_size": 9, "seq_len": 8},
    "noisy_recall": {"vocab_size": 5, "noise_vocab_size": 1, "seq_len": 14},
    "parity": {"seq_len": 10},
    "s5": {"degree": 3, "vocab_size": 6, "seq_len": 4},
    "in_context_recall": {"vocab_size": 4, "seq_len": 16},
    "induction_heads": {"vocab_size": 3, "seq_len": 9},
    "mqar": {"vocab_size": 8, "seq_len": 12, "n_pairs": 3, "filler": "zero"},
    "selective_copying": {"vocab_size": 4, "seq_len": 16, "n_tokens_to_copy": 3},
}


@pytest.mark.slow
def test_every_process_sees_the_same_examples():
    code = (
        "import json, sys, hashlib\n"
        "from hybridnas.data import open_source, source_config\n"
        "found = {}\n"
        "for kind in json.loads(sys.argv[1]):\n"
        "    source = open_source(source_config({'kind': kind}))\n"
        "    test = next(source.valid_batches(1, 2, source.seq_len))\n"
        "    batches = [source.train_batch(7, 2, source.seq_len, 3), test]\n"
        "    text = json.dumps([part.tolist() for batch in batches for part in batch[:3]])\n"
        "    found[kind] = [source.fingerprint, hashlib.sha256(text.encode()).hexdigest()]\n"
        "print(json.dumps(found))\n"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code, json.dumps(kinds)], capture_output=True, text=True, check=True)
        for kinds in (TASKS, TASKS[::-1])
    ]
    assert json.loads(runs[0].stdout) == json.loads(runs[1].stdout)
