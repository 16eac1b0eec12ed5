"""hybridnas.graft: what it keeps, how it starts, fits and trains, and what it leaves behind."""

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import hybridnas
from hybridnas.cli import run
from hybridnas.data import open_source, source_config
from hybridnas.data.tokenizers import ByteTokenizer
from hybridnas.errors import ConfigError, DataError, ExportError, PatternError
from hybridnas.export.hf.writing import export_native
from hybridnas.grafting.config import GraftConfig
from hybridnas.grafting.operation import transplant
from hybridnas.registry import BLOCKS
from hybridnas.train.checkpoint import load
from hybridnas.train.distill import Teacher

IDS = torch.arange(24)[None]
TRAIN: dict[str, Any] = {"batch_size": 4, "seq_len": 32, "valid_tokens": 512}


def model(pattern="AFAF", seed=1, **fields):
    found = hybridnas.build(pattern, d_model=16, vocab_size=256, seed=seed, A={"n_heads": 2}, **fields).double()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return found.eval()


def text(corpus):
    return {"kind": "text", "path": str(corpus)}


@torch.no_grad()
def gap(one, other):
    return float((one(IDS).logits - other(IDS).logits).abs().max())


@pytest.mark.parametrize("letter", list(BLOCKS))
def test_an_inserted_layer_of_any_block_leaves_the_function_as_it_is(letter):
    given = model()
    for place in (0, 2, 4):
        found = hybridnas.graft(given, f"+{place}:{letter}")
        assert len(found.arch.pattern) == 5
        assert gap(found, given) == 0, place


def test_what_is_not_touched_keeps_its_weights_under_the_name_of_its_place():
    given = model("AFAFMF", final_norm=True)
    found = transplant(given, "2:A->G; -4", None, GraftConfig())
    own, kept = given.state_dict(), found.model.state_dict()
    assert str(found.model.arch.pattern) == "AFGFF"
    assert found.names["layers.4.branches.0.0.ff.up_proj.weight"] == "layers.5.branches.0.0.ff.up_proj.weight"
    assert {name.split(".")[1] for name in found.names if name.startswith("layers.")} == {"0", "1", "2", "3", "4"}
    assert all(torch.equal(kept[name], own[old]) for name, old in found.names.items())
    named = {name for name, _ in found.model.named_parameters()}
    assert named - set(found.names) == {name for name in named if name.startswith("layers.2.branches.")}
    assert "layers.2.norm.weight" in found.names  # the block under it is new, its norm is not


def test_the_model_that_is_given_stays_as_it_is():
    given = model()
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    found = hybridnas.graft(given, "1:F->F{d_ff=80}; +2:M")
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items())
    assert given.lineage == ()


def test_edits_that_undo_each_other_give_the_model_back():
    given = model("AFMF")
    for there, back in (("0<->2", "0<->2"), ("0>>3", "3>>0"), ("+1:N", "-1")):
        again = hybridnas.graft(hybridnas.graft(given, there), back)
        assert again.arch == given.arch
        assert gap(again, given) == 0, there


def test_a_parallel_layer_is_the_sum_of_both_blocks_over_one_norm():
    given = model()
    found = hybridnas.graft(given, "2|3")
    layer, first, second = found.layers[2], given.layers[2], given.layers[3]
    assert torch.equal(layer.norm.weight, (first.norm.weight + second.norm.weight) / 2)
    x_BLD = torch.randn(1, 6, 16, dtype=torch.float64)
    n_BLD = layer.norm(x_BLD)
    wanted = x_BLD + first.branches[0][0](n_BLD).y_BLD + second.branches[0][0](n_BLD).y_BLD
    torch.testing.assert_close(layer(x_BLD, None, [])[0], wanted)


def test_a_window_wider_than_the_text_changes_nothing():
    given = model()
    assert gap(hybridnas.graft(given, "0:A->S{window=64}; 2{window=64}"), given) == 0
    assert gap(hybridnas.graft(given, "0:A->S{window=2}"), given) > 1e-4


def test_shared_weights_stay_shared():
    given = model("A@sFA@sF")
    found = hybridnas.graft(given, "1:F->M")
    assert found.layers[0].branches[0][0] is found.layers[2].branches[0][0]
    both = hybridnas.graft(given, "2:A@s->A")  # the second use becomes a block of its own, with the same weights
    assert both.layers[0].branches[0][0] is not both.layers[2].branches[0][0]
    assert gap(both, given) == 0


def test_a_block_that_comes_to_share_weights_takes_those_that_are_kept():
    given = model("A@sFAF")
    found = hybridnas.graft(given, "2:A->A@s", init="random")
    shared = found.layers[0].branches[0][0]
    assert found.layers[2].branches[0][0] is shared
    assert torch.equal(shared.qkv_proj.weight, given.layers[0].branches[0][0].qkv_proj.weight)


def test_moments_of_kept_weights_go_on(corpus, tmp_path):
    given = hybridnas.build("AFAF", d_model=16, vocab_size=256)
    settings = {"tokens": 2048, "eval_at": (512,), "schedule": "constant", "warmup_fraction": 0.0, **TRAIN}
    left = hybridnas.fit(given, text(corpus), folder=tmp_path / "a", max_seconds=0, **settings)
    assert left.status == "stopped"
    moments = load(tmp_path / "a").optimizer
    found = transplant(given, "+0:M; -3", None, GraftConfig(), moments=moments)
    for name, old in found.names.items():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(found.moments[f"{name}.{key}"], moments[f"{old}.{key}"]), name
    assert not any(name.startswith("layers.0.") for name in found.moments)
    hybridnas.fit(found.model, text(corpus), folder=tmp_path / "b", max_seconds=0, moments=found.moments, **settings)
    after = load(tmp_path / "b").optimizer  # one step later
    assert after["embedding.weight.step"] == moments["embedding.weight.step"] + 1
    assert after["layers.0.branches.0.0.D.step"] == 1
    with pytest.raises(ConfigError) as error:
        hybridnas.fit(given.arch, text(corpus), moments=found.moments, **settings)
    assert error.value.field == "moments"


def test_a_fit_brings_a_new_block_nearer_to_the_old_one(corpus):
    given = model().float()
    settings = {"fit_tokens": 3_000, "train": TRAIN}
    for init in ("fit", "qkv+fit"):
        found = hybridnas.graft(given, "2:A->G", text(corpus), init=init, **settings)
        (row,) = found.lineage[-1]["layers"]
        assert row["start"] == ("random+fit" if init == "fit" else init)
        before, after = row["error"]
        assert after < 0.8 * before, init
        loss = found.lineage[-1]["loss"]
        assert set(loss) == {"parent", "start"}
        assert found.lineage[-1]["fit_tokens"] == 3_072  # whole steps


def test_auto_takes_the_start_of_least_loss(corpus):
    given = model().float()
    losses = {}
    for init in ("qkv+fit", "fit", "auto"):
        found = hybridnas.graft(given, "2:A->L", text(corpus), init=init, fit_tokens=1_024, train=TRAIN)
        losses[init] = (found.lineage[-1]["loss"]["start"], found.lineage[-1]["layers"][0]["start"])
    assert losses["auto"] == min(losses["qkv+fit"], losses["fit"])
    assert found.lineage[-1]["fit_tokens"] == 2 * 1_024  # of both


def test_what_is_the_same_function_is_neither_fitted_nor_searched(corpus):
    given = model().float()
    found = hybridnas.graft(given, "1{d_ff=80}; +0:N", text(corpus), fit_tokens=1_024, train=TRAIN)
    assert [(row["start"], row["exact"]) for row in found.lineage[-1]["layers"]] == [("zero", True), ("copy", True)]
    assert found.lineage[-1]["fit_tokens"] == 0
    assert math.isclose(found.lineage[-1]["loss"]["start"], found.lineage[-1]["loss"]["parent"], rel_tol=1e-6)


def test_a_block_is_fitted_anew_to_itself(corpus):
    found = hybridnas.graft(model().float(), "2:A->A", text(corpus), init="fit", fit_tokens=2_048, train=TRAIN)
    (row,) = found.lineage[-1]["layers"]
    assert (row["start"], row["exact"]) == ("random+fit", False)


def test_a_block_without_the_start_that_is_asked_for_starts_another_way_and_says_so():
    found = transplant(model(), "0:A->R; +2:M", None, GraftConfig(init="qkv"))
    assert [row["start"] for row in found.record["layers"]] == ["random", "zero"]
    (note,) = found.notes
    assert "layer 0 (R rg_lru) cannot start by qkv" in note
    assert note.endswith("it starts by random")


def test_without_data_nothing_is_fitted_and_it_says_so():
    found = transplant(model(), "0:A->G", None, GraftConfig())
    assert (found.record["layers"][0]["start"], found.record["fit_tokens"]) == ("qkv", 0)
    assert "no data was given" in found.notes[0]
    assert "loss" not in found.record


@pytest.mark.parametrize(
    ("settings", "field", "got"),
    [
        ({"init": "fit"}, "data", None),
        ({"init": "qkv+fit"}, "data", None),
        ({"tokens": 1000}, "data", None),
        ({"init": "grow"}, "init", "grow"),
        ({"noise": -1}, "noise", -1),
        ({"tokns": 3}, "tokns", 3),
        ({"train": {"tokens": 3}}, "train.tokens", 3),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings, field, got):
    with pytest.raises(ConfigError) as error:
        hybridnas.graft(model(), "0:A->G", **settings)
    assert error.value.field == field
    assert error.value.got in (got, field)


def test_a_layer_that_changes_the_stream_itself_is_not_inserted():
    with pytest.raises(ConfigError) as error:
        hybridnas.graft(model(), "+1:F{norm_position=stream}")
    assert (error.value.field, error.value.got, error.value.allowed) == ("norm_position", "stream", "pre")


def test_data_of_more_tokens_than_the_model_knows_is_refused(corpus):
    given = hybridnas.build("AF", d_model=16, vocab_size=100)
    with pytest.raises(DataError) as error:
        hybridnas.graft(given, "0:A->G", text(corpus), train=TRAIN)
    assert (error.value.field, error.value.got) == ("vocab_size", 100)


def test_a_training_after_the_graft_moves_everything_and_is_recorded(corpus, tmp_path):
    given = model().float()
    settings = {"init": "qkv", "tokens": 1_024, "train": TRAIN, "distill_logits": 0.5, "distill_hidden": 0.5}
    found = hybridnas.graft(given, "2:A->G", text(corpus), folder=tmp_path / "run", **settings)
    record = found.lineage[-1]
    assert (record["tokens"], record["distill"]) == (1_024, {"logits": 0.5, "hidden": 0.5})
    assert set(record["loss"]) == {"parent", "start", "end"}
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"distill_logits", "distill_hidden"} <= set(rows[-1]["aux"])
    again = hybridnas.graft(given, "2:A->G", text(corpus), folder=tmp_path / "run", **settings)  # read back
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), again.parameters(), strict=True))
    assert gap(hybridnas.graft(given, "2:A->G", init="qkv"), found) > 1e-3


@torch.no_grad()
def test_a_teacher_asks_for_the_divergence_of_its_predictions(corpus):
    student, other = model(seed=1).float(), model(seed=2).float()
    source = open_source(source_config(text(corpus)))
    batch = source.train_batch(0, 2, 16, 0)
    teacher = Teacher(other, logits=0.7, hidden=0.3, temperature=2.0, layers={1: 2})
    with teacher.watching(student) as streams:
        x_BLD = student.hidden(batch.inputs_BL).x_BLD
    found = teacher.losses(batch, student, x_BLD, streams)
    p = F.softmax(other(batch.inputs_BL).logits / 2.0, dim=-1)
    q = F.softmax(student(batch.inputs_BL).logits / 2.0, dim=-1)
    wanted = 0.7 * 4.0 * (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(found["distill_logits"], wanted)
    assert set(found) == {"distill_logits", "distill_hidden"}
    same = Teacher(model(seed=1).float(), logits=1.0, hidden=1.0, layers={0: 0, 3: 3})
    with same.watching(student) as streams:
        x_BLD = student.hidden(batch.inputs_BL).x_BLD
    assert all(value.abs() < 1e-6 for value in same.losses(batch, student, x_BLD, streams).values())
    for wrong in ({"logits": 0.0}, {"logits": -1.0}, {"temperature": 0.0}):
        with pytest.raises(ConfigError) as error:
            Teacher(other, **wrong)
        assert error.value.field == next(iter(wrong))


def test_the_lineage_is_exported_and_read_back(corpus, tmp_path):
    found = hybridnas.graft(hybridnas.graft(model().float(), "+0:M"), "1:A->G", seed=3)
    found.save_pretrained(tmp_path / "out")
    again = hybridnas.load(tmp_path / "out")
    assert [record["edits"] for record in again.lineage] == [["+0:M"], ["1:A->G"]]
    assert again.lineage[1]["parent"]["pattern"] == "MAFAF"
    assert again.lineage[1]["fingerprint"] == again.arch.fingerprint()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "1. `+0:M` of `AFAF`" in card
    assert "2. `1:A->G` of `MAFAF`" in card
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lineage": 3}))
    with pytest.raises(ExportError) as error:
        hybridnas.load(tmp_path / "out")
    assert error.value.field == "lineage"


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    found = hybridnas.build("AFAF", d_model=16, vocab_size=256, A={"n_heads": 2})
    found.save_pretrained(folder / "model", source=open_source(source_config(text(corpus))))
    return folder / "model"


def command(folder, corpus, *settings):
    small = [f"train.{name}={value}" for name, value in TRAIN.items()]
    data = ["data=text", f"data.path={corpus}"]
    return run(["graft", "json=true", f"model={folder}", *data, *small, *settings])


@pytest.mark.slow
def test_the_command_writes_a_model_that_describe_tells_the_story_of(trained, corpus, tmp_path, capsys):
    out = tmp_path / "hybrid"
    edit = "edit=0:A->G; +4:F{d_ff=24}; 1<->3"
    assert command(trained, corpus, edit, f"out={out}", "fit_tokens=512", "tokens=512", "arch.G.head_dim=8") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["status"], found["pattern"]) == ("completed", "GFAFF{d_ff=24}")
    assert found["graft"]["tokens"] == 512
    assert found["cost"]["after"]["state_bytes"] < found["cost"]["before"]["state_bytes"]
    assert hybridnas.load(out).lineage[0]["edits"] == ["0:A->G", "+4:F{d_ff=24}", "1<->3"]
    assert run(["describe", f"model={out}", "json=true"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [record["edits"] for record in told["lineage"]] == [found["graft"]["edits"]]
    assert told["fingerprint"] == found["fingerprint"]
    assert command(out, corpus, "edit=-4", f"out={tmp_path / 'less'}", "init=zero") == 0  # a graft of a graft
    capsys.readouterr()
    assert len(hybridnas.load(tmp_path / "less").lineage) == 2
    assert run(["describe", f"model={out}", "pattern=AF", "arch.d_model=8"]) == 2


@pytest.mark.slow
def test_a_run_that_was_left_is_grafted_with_its_moments(corpus, tmp_path, capsys):
    given = hybridnas.Arch.from_pattern("AFAF", d_model=16, vocab_size=256)
    hybridnas.fit(given, text(corpus), folder=tmp_path / "run", max_seconds=0, tokens=2048, **TRAIN)
    assert command(tmp_path / "run", corpus, "edit=+1:M", f"out={tmp_path / 'out'}") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["graft"]["moments"] is True


@pytest.mark.slow
def test_a_training_that_was_stopped_goes_on_with_the_same_command(trained, corpus, tmp_path, capsys):
    def grafted(out, *more):
        assert command(trained, corpus, "edit=0:A->G", "init=qkv", "tokens=1024", f"out={out}", *more) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    assert grafted(tmp_path / "parts", "max_seconds=1e-9")["status"] == "stopped"
    assert hybridnas.load(tmp_path / "parts").lineage[0]["tokens"] == 0
    assert grafted(tmp_path / "parts")["status"] == grafted(tmp_path / "whole")["status"] == "completed"
    parts, whole = (hybridnas.load(tmp_path / name) for name in ("parts", "whole"))
    assert all(torch.equal(a, b) for a, b in zip(parts.parameters(), whole.parameters(), strict=True))


@pytest.mark.slow
def test_a_model_of_transformers_is_grafted(corpus, tmp_path, capsys):
    dense = {"activation": "silu", "gated": True, "bias": False}
    arch = hybridnas.Arch.from_pattern(
        "AFAF", d_model=16, vocab_size=256, norm="rmsnorm", final_norm=True, A={"n_heads": 2}, F=dense
    )
    export_native(hybridnas.build(arch), tmp_path / "llama", format="llama", tokenizer=ByteTokenizer(), check=False)
    edit = "edit=2:A->G; 1:F->E{n_experts=2,gated=true,activation=silu}"
    assert command(tmp_path / "llama", corpus, edit, "init=upcycle", f"out={tmp_path / 'out'}") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["start"] for row in found["graft"]["layers"]] == ["upcycle", "random"]
    assert "layer 2 (G gated_deltanet) cannot start by upcycle" in found["notes"][0]


REFUSED = [  # settings, the error, its field
    (["edit=9:A->G", "out=OUT"], ConfigError, "edit"),
    (["edit=0:A=>G", "out=OUT"], PatternError, "edit"),
    (["edit=0:A->G", "out=OUT", "init=none"], ConfigError, "init"),
    (["edit=0:A->G", "out=MODEL"], ConfigError, "out"),
    (["edit=0:A->G", "out=OTHER"], ExportError, None),
    (["edit=0:A->G", "out=OUT", "arch.G.head_dim=x"], ConfigError, "arch.G.head_dim"),
    (["edit=0:A->G"], ConfigError, "out"),
    (["out=OUT"], ConfigError, "edit"),
    (["edit=0:A->G", "out=OUT", "train.tokens=3"], ConfigError, "train.tokens"),
]


@pytest.mark.parametrize(("settings", "kind", "field"), REFUSED, ids=str)
def test_a_mistake_is_one_sentence_and_nothing_is_overwritten(settings, kind, field, trained, corpus, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    places = {"OUT": tmp_path / "out", "MODEL": trained, "OTHER": other}
    before = {path: path.read_bytes() for path in trained.iterdir()}
    given = [item.rpartition("=")[0] + f"={places[item.rpartition('=')[2]]}" if item.startswith("out=") else item
             for item in settings]  # fmt: skip
    assert command(trained, corpus, *given) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == kind.__name__
    assert field is None or error["field"] == field
    assert not (tmp_path / "out").exists()
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]
    assert {path: path.read_bytes() for path in trained.iterdir()} == before
