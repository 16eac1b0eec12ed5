"""What everything stands on: frozen configs, the registry, devices, files, costs, and the words of errors."""

import enum
import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, fields
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hybridnas
from hybridnas import errors, files, hardware
from hybridnas.config import FrozenConfig, option, parse_value, read_text, read_yaml, spell
from hybridnas.cost import Cost
from hybridnas.errors import ConfigError, HybridNASError, suggest
from hybridnas.hardware import Impl, pick_device
from hybridnas.registry import ALIASES, BLOCKS, Registry, register_block


class Mode(enum.Enum):
    FAST = "fast"
    EXACT = "exact"


@dataclass(frozen=True, kw_only=True)
class Inner(FrozenConfig):
    depth: int = option(2, "how deep [count]", ge=1)


@dataclass(frozen=True, kw_only=True)
class Example(FrozenConfig):
    width: int = option(doc="how wide [channels]", ge=1, le=64)
    rate: float = option(0.5, "how fast [1]", gt=0)
    name: str = option("plain", "what kind", choices=("plain", "fancy"))
    on: bool = option(False, "whether [yes/no]")
    limit: int | None = option(None, "at most [count]", ge=0)
    sizes: tuple[int, ...] = option((), "several [count]", ge=1)
    inner: Inner = option(Inner(), "another config")
    inners: tuple[Inner, ...] = option((), "several configs")
    pairs: tuple[tuple[int, int], ...] = option((), "several pairs")
    paths: str | tuple[str, ...] | None = option(None, "a path or several")
    mode: Mode = option(Mode.FAST, "an enumeration")
    kind: Literal["a", "b"] = option("a", "a literal")
    confirm: str = option("off", "a switch with names", choices=("off", "on"))
    worker: str = option("off", "a switch with a third way", choices=("off", "join"), aliases={"true": "join"})

    @classmethod
    def label(cls):
        return "example"


def test_a_config_keeps_what_it_is_given():
    one = Example(width=3, rate=2, limit=4)
    assert (one.width, one.rate, one.name, one.on, one.limit) == (3, 2, "plain", False, 4)
    with pytest.raises(FrozenInstanceError):
        one.width = 4
    assert one.replace(width=5) == Example(width=5, rate=2, limit=4)
    written = one.to_dict()
    assert json.loads(json.dumps(written)) == written
    assert Example.from_dict(written) == one
    assert (written["sizes"], written["inner"], written["mode"]) == ([], {"depth": 2}, "fast")


@pytest.mark.parametrize(
    ("values", "field", "got", "allowed"),
    [
        ({}, "width", None, "how wide [channels]"),
        ({"width": "3"}, "width", "3", "an integer"),
        ({"width": True}, "width", True, "an integer"),
        ({"width": 3.5}, "width", 3.5, "an integer"),
        ({"width": None}, "width", None, "an integer"),
        ({"width": 0}, "width", 0, ">= 1"),
        ({"width": 65}, "width", 65, "<= 64"),
        ({"width": 3, "rate": 0}, "rate", 0, "> 0"),
        ({"width": 3, "rate": float("inf")}, "rate", float("inf"), "a finite number"),
        ({"width": 3, "name": "odd"}, "name", "odd", ("plain", "fancy")),
        ({"width": 3, "on": 1}, "on", 1, "true or false"),
        ({"width": 3, "limit": "x"}, "limit", "x", "an integer or none"),
        ({"width": 3, "sizes": ["x"]}, "sizes", ["x"], "a list of integer"),
        ({"width": 3, "sizes": [4, 0]}, "sizes", 0, ">= 1"),
        ({"width": 3, "inner": {"depth": 0}}, "inner.depth", 0, ">= 1"),
        ({"width": 3, "inner": 5}, "inner", 5, "Inner"),
        ({"width": 3, "inners": [{"depth": 1}, {"depth": "x"}]}, "inners.depth", "x", "an integer"),
        ({"width": 3, "mode": "slow"}, "mode", "slow", "one of fast, exact"),
        ({"width": 3, "kind": "odd"}, "kind", "odd", "one of a, b"),
    ],
)
def test_a_mistaken_value_is_named_with_what_is_allowed(values, field, got, allowed):
    with pytest.raises(ConfigError) as caught:
        Example.from_dict(values)
    assert (caught.value.field, caught.value.got, caught.value.allowed) == (field, got, allowed)
    assert "\n" not in str(caught.value)


def test_an_unknown_field_is_met_with_the_nearest():
    with pytest.raises(ConfigError) as caught:
        Example.from_dict({"width": 3, "wdith": 4})
    assert (caught.value.field, caught.value.got, caught.value.allowed) == ("wdith", "wdith", Example.field_names())
    assert str(caught.value) == "example has no field 'wdith'; did you mean 'width'?"


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("width", 3.0, 3),
        ("width", "3e1", "an integer"),  # YAML reads 3e1 as a number, so this was quoted on purpose
        ("limit", "5k", 5000),
        ("limit", np.int64(4), 4),
        ("rate", np.float32(0.5), 0.5),
        ("on", "yes", True),
        ("sizes", [1, 2], (1, 2)),
        ("sizes", 4, (4,)),
        ("sizes", None, ()),
        ("pairs", [[1, 2.0], (3, 4)], ((1, 2), (3, 4))),
        ("paths", "a", "a"),
        ("paths", ["a", "b"], ("a", "b")),
        ("inner", {"depth": 7}, Inner(depth=7)),
        ("inners", [{"depth": 7}, Inner()], (Inner(depth=7), Inner())),
        ("mode", "exact", Mode.EXACT),
        ("kind", "b", "b"),
        ("confirm", True, "on"),
        ("confirm", False, "off"),
        ("confirm", "yes", "on"),
        ("worker", True, "join"),
        ("worker", False, "off"),
    ],
)
def test_plain_values_are_read_by_the_type_of_their_field(name, given, wanted):
    if wanted == "an integer":
        with pytest.raises(ConfigError) as caught:
            Example(**{"width": 1, name: given})
        assert caught.value.allowed == wanted
        return
    for made in (Example(**{"width": 1, name: given}), Example.from_dict({"width": 1, name: given})):
        assert getattr(made, name) == wanted
        assert type(getattr(made, name)) is type(wanted)


def test_an_error_opens_with_the_place():
    with pytest.raises(ConfigError, match=r"^layer 3 \(M mamba\): example width=0 must be >= 1"):
        Example.from_dict({"width": 0}, where="layer 3 (M mamba)")
    with pytest.raises(ConfigError, match=r"^layer 3 has no field 'dstate'"):
        Example.from_dict({"dstate": 0}, where="layer 3")


@pytest.mark.parametrize(
    ("text", "hint", "wanted"),
    [
        ("32", int, 32),
        ("-3", int, -3),
        ("1e-3", float, 0.001),
        ("32", float, 32.0),
        ("true", bool, True),
        ("False", bool, False),
        ("none", int | None, None),
        ("null", str | None, None),
        ("7", int | None, 7),
        ("abc", str, "abc"),
        ("7", str, "7"),
        (5, int, 5),
        ("1e6", int, 1_000_000),
        ("1M", int, 1_000_000),
        ("0.5k", int, 500),
        ("1_000", int, 1000),
        ("200k", float, 200_000.0),
        ("9007199254740993", int, 9007199254740993),
        ("yes", bool, True),
        ("null", str, "null"),
        ("none", str | None, "none"),
        ("[a.txt,b c.txt]", str | tuple[str, ...], ["a.txt", "b c.txt"]),
        ("[a].txt", str | tuple[str, ...], "[a].txt"),
        ("a,b", str | tuple[str, ...], "a,b"),
        ("[M{d_state=32,expand=1},[M,E]]", tuple[str, ...], ["M{d_state=32,expand=1}", "[M,E]"]),
        ("1,2", tuple[int, ...], [1, 2]),
        ("4", tuple[int, ...], [4]),
        ("[]", tuple[int, ...], []),
        ("{a: {b: [1, x]}}", dict[str, Any], {"a": {"b": [1, "x"]}}),
    ],
)
def test_text_is_read_by_the_type_of_its_field(text, hint, wanted):
    got = parse_value(text, hint, "x")
    assert got == wanted
    assert type(got) is type(wanted)


REFUSED = [
    ("abc", int),
    ("1.5", int),
    ("1.5e0", int),
    ("maybe", bool),
    ("", float),
    ("x", int | None),
    ("{a: [}", dict),
]


@pytest.mark.parametrize(("text", "hint"), REFUSED)
def test_text_of_another_type_is_refused(text, hint):
    with pytest.raises(ConfigError) as caught:
        parse_value(text, hint, "E d_expert")
    assert (caught.value.field, caught.value.got) == ("E d_expert", text)


@given(width=st.integers(1, 64), rate=st.floats(1e-6, 1e6), limit=st.none() | st.integers(0, 9))
def test_a_config_written_and_read_is_the_same(width, rate, limit):
    one = Example(width=width, rate=rate, limit=limit)
    assert Example.from_dict(one.to_dict()) == one
    as_text = {"width": str(width), "rate": repr(rate), "limit": str(limit)}
    assert Example.from_dict(as_text, parse=True) == one


SETTINGS = {  # what a setting can hold, by its type
    int: st.integers(-(2**70), 2**70),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    str: st.text(),
    str | None: st.none() | st.text().filter(lambda text: text != "null"),
    int | None: st.none() | st.integers(),
    tuple[int, ...]: st.lists(st.integers()),
    tuple[str, ...]: st.lists(st.text()),
    str | tuple[str, ...]: st.lists(st.text()),
    dict[str, Any]: st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.lists(st.text())),
}


@pytest.mark.parametrize("hint", SETTINGS, ids=str)
@given(data=st.data())
def test_a_setting_written_on_a_command_line_reads_back(hint, data):
    value = data.draw(SETTINGS[hint])
    assert read_text(spell(value, hint), hint) == value


@pytest.mark.parametrize("text", ["null", "[a]"])
def test_a_setting_that_would_read_back_as_another_is_refused(text):
    with pytest.raises(ConfigError) as caught:
        spell(text, str | tuple[str, ...] | None)
    assert caught.value.got == text


def test_yaml_has_the_numbers_and_booleans_of_its_version_1_2(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: on\nb: 1e6\nc: no\nd: true\ne: 012\nf: 1:30\ng: null\nh: [~, 1.5, -3]\ni: 2026-11-27\n")
    want = {"a": "on", "b": 1e6, "c": "no", "d": True, "e": 12, "f": "1:30", "g": None, "h": [None, 1.5, -3]}
    assert read_yaml(path) == {**want, "i": "2026-11-27"}


def test_one_value_can_be_checked_without_the_others():
    Example.check_value("width", 3)
    with pytest.raises(ConfigError, match="example width=0 must be >= 1"):
        Example.check_value("width", 0)
    with pytest.raises(ConfigError, match="example has no field 'widht'; did you mean 'width'"):
        Example.check_value("widht", 0)


def test_an_option_needs_its_meaning():
    with pytest.raises(TypeError, match="needs a one-line doc"):
        option(3)


def test_suggestions():
    assert suggest("mamab", ["mamba", "moe"]) == "; did you mean 'mamba'?"
    assert suggest("zzz", ["b", "a"]) == "; allowed: a, b"
    assert suggest("zzz", []) == ""


def test_every_error_has_one_root_and_is_public():
    own = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(own) > 10
    for error in own:
        assert issubclass(error, HybridNASError)
        assert getattr(hybridnas, error.__name__) is error


def test_every_public_name_resolves():
    for name in hybridnas.__all__:
        assert getattr(hybridnas, name) is not None
    assert set(hybridnas.__all__) <= set(dir(hybridnas))
    assert set(hybridnas._LAZY) <= set(hybridnas.__all__)
    assert hybridnas.__version__ == importlib.metadata.version("hybridnas")
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = hybridnas.nonsense
    assert hybridnas.list_blocks()["M"] == "mamba"
    assert "mamba_moe" in hybridnas.list_search_spaces()
    assert "moe_mamba" in hybridnas.list_presets()


def test_importing_the_package_is_light():
    heavy = "torch mlflow optuna datasets triton matplotlib networkx rich tokenizers transformers numpy yaml hydra"
    code = f"import hybridnas, sys; print(sorted(set({heavy.split()}) & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_build_takes_what_names_an_architecture():
    sizes = {"d_model": 16, "n_blocks": 1, "n_experts": 2, "vocab_size": 32}
    model = hybridnas.build("moe_mamba", **sizes)
    again = hybridnas.build(model.arch)
    assert again.arch.fingerprint() == hybridnas.build(model.arch.to_dict()).arch.fingerprint()
    assert hybridnas.build("ME", d_model=16, vocab_size=32).arch.d_model == 16
    with pytest.raises(ConfigError, match="did you mean 'moe_mamba'"):
        hybridnas.build("moe_mamb")
    with pytest.raises(ConfigError, match="build takes a preset name, pattern, Arch, dict or folder, got int"):
        hybridnas.build(3)


def test_a_registry_names_what_it_has():
    table = Registry("color")
    table.add("red", 1)
    assert table.get("red") == 1
    assert "red" in table
    assert list(table) == ["red"]
    assert len(table) == 1
    with pytest.raises(ConfigError, match="color 'red' is already registered by 1; choose another name"):
        table.add("red", 2)
    with pytest.raises(ConfigError, match="unknown color 'rod'; did you mean 'red'"):
        table.get("rod")
    table.remove("red")
    assert len(table) == 0


def test_a_package_with_a_broken_file_is_reported_every_time(tmp_path, monkeypatch):
    (tmp_path / "package_of_test").mkdir()
    (tmp_path / "package_of_test/bad.py").write_text("raise ValueError('broken')")
    monkeypatch.syspath_prepend(tmp_path)
    table = Registry("thing", "package_of_test")
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            list(table)


@pytest.mark.parametrize("letter", ["", "m", "MM", "1", "É"])
def test_a_letter_is_one_capital(letter):
    with pytest.raises(ConfigError, match="must be one capital letter A to Z"):
        register_block(letter, name="odd")(type("Odd", (), {}))


def test_a_letter_and_an_alias_belong_to_one_block():
    class Odd:
        class Config:
            pass

    with pytest.raises(ConfigError, match="block letter 'M' is already registered by"):
        register_block("M", name="odd")(Odd)
    with pytest.raises(ConfigError, match=r"'\*' already stands for block letter 'A'"):
        register_block("Q", name="odd", aliases=("*",))(Odd)
    assert "Q" not in BLOCKS
    assert not hasattr(Odd, "letter")
    assert ALIASES["*"] == "A"


@pytest.mark.parametrize("letter", list(BLOCKS))
def test_every_field_of_every_block_says_what_it_is(letter):
    for field in fields(BLOCKS.get(letter).Config):
        assert field.metadata.get("doc"), f"{letter} {field.name}"


def test_costs_add_up():
    one = Cost(params=1, active_params=2, embedding_params=3, flops_per_token=4.0, state_bytes=5)
    assert one + one == Cost(params=2, active_params=4, embedding_params=6, flops_per_token=8.0, state_bytes=10)
    assert one.without_params() == Cost(flops_per_token=4.0, state_bytes=5)
    assert sum([one, one], Cost()) == one + one


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device().type in ("cpu", "cuda")
    with pytest.raises(ConfigError, match="device='gpu7' is not a device; use auto, cpu, cuda or cuda:N"):
        pick_device("gpu7")
    with pytest.raises(ConfigError, match="device='meta' does not train models"):
        pick_device("meta")


def test_an_absent_cuda_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device='cuda' needs CUDA, this machine has none; use device=cpu"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="device='cuda:2' is not there: this machine has 2 CUDA devices"):
        pick_device("cuda:2")


def test_an_unknown_implementation_is_refused_with_those_that_exist():
    with pytest.raises(ConfigError) as refused:
        Impl.of("fast")
    assert (refused.value.field, refused.value.got) == ("impl", "fast")
    assert refused.value.allowed == ["auto", "reference", "torch", "native", "triton", "fla"]
    assert torch.__version__ in hardware.describe_machine()


def test_files_are_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.json"
    files.write_json(path, {"a": 1})
    assert path.read_text() == '{\n "a": 1\n}\n'

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(path, "other")
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"a": float("nan")})


def test_a_written_file_has_the_mode_of_any_other(tmp_path):
    files.write_text(tmp_path / "ours", "x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_yaml_is_a_mapping_or_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: [1, 2]\n2: b\n")
    assert read_yaml(path) == {"a": [1, 2], "2": "b"}
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"a.yaml is not YAML"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("built", "said", "expected"),
    [
        (None, "", "torch 2.0, which was built without it"),
        ("13.0", "The NVIDIA driver is too old (found version 11040). Please update", "too old (found version 11040)"),
    ],
)
def test_a_gpu_whose_driver_or_torch_does_not_fit_is_named_in_one_sentence(monkeypatch, built, said, expected):
    def refuse():
        raise RuntimeError(said)

    monkeypatch.setattr(hardware.Path, "exists", lambda path: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", refuse)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch, "__version__", "2.0")
    with pytest.raises(ConfigError) as caught:
        hardware.pick_device("cuda")
    assert (caught.value.field, caught.value.got, caught.value.allowed) == ("device", "cuda", ["auto", "cpu"])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
