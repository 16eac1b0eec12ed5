"""For each task a solver as plain as can be (an oracle).

It takes the config, the inputs of one example and which places count, and returns {place: target} for all places whose
target the inputs alone decide; it never sees a target.
"""

import itertools
import statistics
from functools import cache

from hybridnas.data import open_source
from hybridnas.data.tasks.dna_motifs import motifs


def mqar(config, inputs, mask):
    start = 2 * config.n_pairs
    values = dict(zip(inputs[0:start:2], inputs[1:start:2], strict=True))
    return {place: values[inputs[place]] for place in range(len(inputs)) if mask[place]}


def selective_copying(config, inputs, mask):
    marker = config.vocab_size - 1
    tokens = [token for token in inputs if token not in (0, marker)]
    places = [place for place, token in enumerate(inputs) if token == marker]
    return dict(zip(places, tokens, strict=True))


def induction_heads(config, inputs, mask):
    return {len(inputs) - 1: inputs[inputs.index(config.vocab_size - 1) + 1]}


def in_context_recall(config, inputs, mask):
    keys = range(config.plain_ids // 2)
    found, values = {}, {}
    for place in range(len(inputs)):
        if inputs[place] not in keys:
            continue
        if inputs[place] in values:
            found[place] = values[inputs[place]]
        elif place + 1 < len(inputs):
            values[inputs[place]] = inputs[place + 1]
    return found if config.multi_query else {len(inputs) - 1: found[len(inputs) - 1]}


def fuzzy_recall(config, inputs, mask):
    n_keys, plain = config.plain_ids // 2, config.plain_ids
    found, values, place = {}, {}, 0
    while place < len(inputs):
        if inputs[place] >= n_keys:
            place += 1
            continue
        stop = place
        while stop < len(inputs) and inputs[stop] < n_keys:
            stop += 1
        end = stop
        while end < len(inputs) and n_keys <= inputs[end] < plain:
            end += 1
        key, value = tuple(inputs[place:stop]), inputs[stop:end]
        for number, token in enumerate(values.get(key, [])):
            found[stop - 1 + number] = token
        values.setdefault(key, value)
        place = end
    return found


def mad_selective_copying(config, inputs, mask):
    marker = inputs.index(config.vocab_size - 1)
    tokens = [token for token in inputs[:marker] if token != config.vocab_size - 2]
    return dict(zip(range(marker + 1, len(inputs)), tokens, strict=True))


def memorisation(config, inputs, mask):
    values = dictionary(config)
    asked = config.vocab_size - 1
    return {place: values[inputs[place - 1]] for place, token in enumerate(inputs) if token == asked}


@cache
def dictionary(config):
    """What a perfect memory keeps of other examples; that no key has two values is part of the task."""
    batch = open_source(config.replace(n_train_examples=None)).train_batch(0, 400, config.seq_len, 12345)
    pairs = {
        (row[place - 1], target[place])
        for row, target, mask in zip(*(part.tolist() for part in batch[:3]), strict=True)
        for place, counts in enumerate(mask)
        if counts
    }
    assert len(dict(pairs)) == len(pairs) == len({value for _, value in pairs})
    return dict(pairs)


def compression(config, inputs, mask):
    return {place: token for place, token in enumerate(inputs) if mask[place]}


def distractor_recall(config, inputs, mask):
    plain, n_keys = config.plain_ids, config.plain_ids // 2
    start = len(inputs) - 2 * config.n_pairs
    shown = [place for place in range(0, start, 2) if inputs[place] < n_keys]
    values = {inputs[place]: inputs[place + 1] for place in shown}
    assert len(values) == config.n_pairs + config.n_distractors
    assert all(n_keys <= value < plain for value in values.values())
    return {place: values[inputs[place]] for place in range(start, len(inputs), 2)}


def parity(config, inputs, mask):
    found, total = {}, 0
    for place, token in enumerate(inputs):
        total = (total + token) % config.vocab_size
        found[place] = total
    return {place: value for place, value in found.items() if mask[place]}


def s5(config, inputs, mask):
    every = list(itertools.permutations(range(config.degree)))
    found, things = {}, tuple(range(config.degree))
    for place, token in enumerate(inputs):
        things = tuple(every[token][thing] for thing in things)
        found[place] = every.index(things)
    return {place: value for place, value in found.items() if mask[place]}


def dna_motifs(config, inputs, mask):
    text = "".join("ACGT"[base] for base in inputs[:-1])
    found = []
    for number, motif in enumerate(motifs(config).tolist()):
        word = "".join("ACGT"[base] for base in motif)
        for strand in (word, word[::-1].translate(str.maketrans("ACGT", "TGCA"))):
            place = text.find(strand)
            found += [(place, number)] if place >= 0 else []
    return {len(inputs) - 1: 5 + min(found)[1]}


def listops(config, inputs, mask):
    operators = {10: max, 11: min, 12: lambda own: int(statistics.median(own)), 13: lambda own: sum(own) % 10}
    lists = [[]]
    for token in inputs:
        if token < 10:
            lists[-1].append(token)
        elif token in operators:
            lists.append([operators[token]])
        elif token == 14:
            operator, *values = lists.pop()
            lists[-1].append(operator(values))
    ((value,),) = lists
    assert inputs[-1] == 14
    return {len(inputs) - 1: value}


def needle(config, inputs, mask):
    width = config.n_digits
    numbers = {inputs[at + 1]: inputs[at + 2 : at + 2 + width] for at, token in enumerate(inputs) if token == 10}
    assert len(numbers) == config.n_needles
    start = inputs.index(11) + 1
    return dict(zip(range(start, start + width), numbers[inputs[start]], strict=True))


def variable_tracking(config, inputs, mask):
    known = {}
    for at, token in enumerate(inputs):
        if token == 1:
            variable, source = inputs[at + 1 : at + 3]
            assert variable not in known
            known[variable] = known.get(source, source)
    assert len(known) == config.assignments and set(known.values()) <= set(range(3, 3 + config.n_values))
    return {len(inputs) - 1: known[inputs[-1]]}


ORACLES = {
    "listops": listops,
    "needle": needle,
    "variable_tracking": variable_tracking,
    "dna_motifs": dna_motifs,
    "compression": compression,
    "distractor_recall": distractor_recall,
    "fuzzy_recall": fuzzy_recall,
    "mad_selective_copying": mad_selective_copying,
    "memorisation": memorisation,
    "noisy_recall": in_context_recall,
    "parity": parity,
    "s5": s5,
    "in_context_recall": in_context_recall,
    "induction_heads": induction_heads,
    "mqar": mqar,
    "selective_copying": selective_copying,
}
