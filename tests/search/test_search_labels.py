"""Searches ranked by accuracy on what has one answer for a whole sequence: labels, numbers, passages, lists."""

import json

import pytest

from hybridnas.cli import run
from hybridnas.studies import load_study

pytestmark = pytest.mark.slow

ROWS = [{"text": f"{'ab'[n % 2] * 6} {n}", "label": "one" if n % 2 else "two", "size": n % 2 + n / 1000}
        for n in range(200)]  # fmt: skip
DATA = {
    "labels": ["data=labels", "data.path=rows.jsonl", "data.seq_len=16"],
    "numbers": ["data=labels", "data.path=rows.jsonl", "data.seq_len=16", "data.label_field=size",
                "data.target=number", "data.pool=mean"],
    "retrieval": ["data=retrieval", "data.seq_len=34", "data.max_bytes=1000000", "data.n_test_examples=32"],
    "listops": ["data=listops", "data.seq_len=16", "data.n_test_examples=32", "data.pool=mean"],
    "dna_motifs": ["data=dna_motifs", "data.seq_len=16", "data.width=4", "data.n_test_examples=32"],
}  # fmt: skip
SAYS = {"labels": "is right in", "numbers": "always the mean", "retrieval": "about 50 %",
        "listops": "always", "dna_motifs": "always"}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_a_search_ranks_by_accuracy_and_says_what_a_constant_answer_scores(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYBRIDNAS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    small = ["budget=smoke", "budget.d_model=8", "budget.tokens_per_active_param=8", "budget.valid_tokens=512"]
    asked = ["search", "study=s", "space=hybrid", *DATA[name], *small, "objectives=[accuracy]", "n_trials=2"]
    assert run([*asked, "tracking=off", "device=cpu"]) == 0
    study = load_study("runs/s")
    done = [record for record in study.records if record.state == "COMPLETE"]
    assert done and max(done, key=lambda record: record.accuracy).number == study.best.number
    assert all(record.objectives == {"accuracy": record.accuracy} for record in done)
    page = (tmp_path / "runs" / "s" / "report.html").read_text().replace("&#39;", "'")
    assert SAYS[name] in page
    assert ("test accuracy, " in page) == (name != "numbers")
