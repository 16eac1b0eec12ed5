"""Linear probes: the condition of a minimum, and what vectors tell of labels."""

import json

import pytest
import torch

from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM
from hybridnas.data import open_source, source_config
from hybridnas.data.tokenizers import ByteTokenizer
from hybridnas.errors import ConfigError
from hybridnas.train.probe import PENALTIES, _fit, features, fit_probe, linear_probe


def test_the_fit_is_the_minimum_of_a_convex_loss():
    draw = torch.Generator().manual_seed(0)
    x_ND, labels_N = torch.randn(80, 3, generator=draw), torch.randint(3, (80,), generator=draw)
    weight, bias = _fit(x_ND, labels_N, 3, 1e-2)
    errors_NK = torch.softmax(x_ND @ weight + bias, dim=1) - torch.nn.functional.one_hot(labels_N, 3)
    # The gradient written from the loss: X^T (p - y) / N + 2 penalty W, and the mean error of each label.
    assert (x_ND.T @ errors_NK / 80 + 2 * 1e-2 * weight).abs().max() < 1e-4
    assert errors_NK.mean(dim=0).abs().max() < 1e-4


def test_a_probe_finds_what_vectors_hold_and_nothing_where_they_hold_nothing():
    draw = torch.Generator().manual_seed(1)
    targets = {part: torch.randint(2, (count,), generator=draw) for part, count in
               (("train", 400), ("valid", 200), ("test", 200))}  # fmt: skip
    noise = {part: torch.randn(len(labels), 5, generator=draw) for part, labels in targets.items()}
    told = {part: noise[part] + 3.0 * labels[:, None] for part, labels in targets.items()}
    good, bad = fit_probe(told, targets, 2), fit_probe(noise, targets, 2)
    assert good.accuracy > 0.98 and good.interval[0] > 0.94 and good.balanced > 0.98
    assert 0.35 < bad.accuracy < 0.65 and bad.interval[0] < 0.5 < bad.interval[1]
    assert good.penalty in PENALTIES


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_the_vectors_of_a_text_do_not_depend_on_its_neighbors(pool):
    model = HybridLM(Arch.from_pattern("MA", d_model=8, vocab_size=256), seed=0)
    texts = [[1, 2, 3], [4, 5], [7, 8, 9], [1]]
    together = features(model, texts, pool=pool)
    for number, ids in enumerate(texts):
        x_LD = model.hidden(torch.tensor([ids])).x_BLD[0].detach()
        wanted = x_LD.mean(dim=0) if pool == "mean" else x_LD[-1]
        assert together[number] == pytest.approx(wanted, abs=1e-5)


def test_a_model_is_probed_in_its_own_tokens_beside_its_untrained_weights(tmp_path):
    rows = [{"text": f"{'aaaa' if n % 4 else 'bbbb'}{n}", "label": "a" if n % 4 else "b"} for n in range(300)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"kind": "labels", "path": str(tmp_path / "rows.jsonl"), "seq_len": 16}
    model = HybridLM(Arch.from_pattern("M", d_model=8, vocab_size=256), seed=0)
    found = linear_probe(model, ByteTokenizer(), open_source(source_config(data)))
    assert found.model.accuracy > 0.9 and found.untrained.accuracy > 0.5
    assert 0.6 < found.commonest < 0.9 and found.labels == 2 and sum(found.texts.values()) == 300
    numbers = [{"text": f"t{n}", "label": n} for n in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in numbers))
    with pytest.raises(ConfigError) as caught:
        linear_probe(model, ByteTokenizer(), open_source(source_config({**data, "target": "number"})))
    assert (caught.value.field, caught.value.got) == ("data.target", "number")
    with pytest.raises(ConfigError) as caught:
        features(model, [[1]], pool="max")
    assert caught.value.allowed == ("mean", "last")
