"""What everything stands on: frozen configs, the registry, devices, files, costs, and the words of errors."""

import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hybridnas
from hybridnas import errors, files, hardware
from hybridnas.config import FrozenConfig, option, parse_value, read_yaml
from hybridnas.cost import Cost
from hybridnas.errors import ConfigError, HybridNASError, KernelUnavailableError, suggest
from hybridnas.hardware import Impl, pick_device, resolve_impl
from hybridnas.registry import ALIASES, BLOCKS, Registry, register_block


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
    sizes: tuple[int, ...] = option((), "several [count]")
    inner: Inner = option(Inner(), "another config")

    @classmethod
    def label(cls):
        return "example"


def test_a_config_keeps_what_it_is_given():
    one = Example(width=3, rate=2, limit=4)
    assert (one.width, one.rate, one.name, one.on, one.limit) == (3, 2, "plain", False, 4)
    with pytest.raises(FrozenInstanceError):
        one.width = 4
    assert one.replace(width=5) == Example(width=5, rate=2, limit=4)
    assert one.to_dict() == {
        "width": 3,
        "rate": 2,
        "name": "plain",
        "on": False,
        "limit": 4,
        "sizes": [],
        "inner": {"depth": 2},
    }


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "example needs a value for 'width': how wide [channels]"),
        ({"width": 3, "wdith": 4}, "example has no field 'wdith'; did you mean 'width'?"),
        ({"width": "3"}, "example width='3' must be an integer, got str"),
        ({"width": True}, "example width=True must be an integer, got bool"),
        ({"width": 3.0}, "example width=3.0 must be an integer, got float"),
        ({"width": None}, "example width=None must be an integer, got NoneType"),
        ({"width": 0}, "example width=0 must be >= 1"),
        ({"width": 65}, "example width=65 must be <= 64"),
        ({"width": 3, "rate": 0}, "example rate=0 must be > 0"),
        ({"width": 3, "rate": float("nan")}, "example rate=nan must be a finite number"),
        ({"width": 3, "rate": float("inf")}, "example rate=inf must be a finite number"),
        ({"width": 3, "name": "odd"}, "example name='odd' must be one of plain, fancy"),
        ({"width": 3, "on": 1}, "example on=1 must be true or false, got int"),
        ({"width": 3, "limit": "x"}, "example limit='x' must be an integer or none, got str"),
        ({"width": 3, "sizes": 4}, "example sizes=4 must be tuple"),
        ({"width": 3, "inner": {"depth": 1}}, "example inner={'depth': 1} must be Inner, got dict"),
    ],
)
def test_a_mistaken_value_is_named_with_what_is_allowed(values, words):
    with pytest.raises(ConfigError) as caught:
        Example.from_dict(values)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


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
    ],
)
def test_text_is_read_by_the_type_of_its_field(text, hint, wanted):
    got = parse_value(text, hint, "x")
    assert got == wanted
    assert type(got) is type(wanted)


@pytest.mark.parametrize(("text", "hint"), [("abc", int), ("1.5", int), ("yes", bool), ("", float), ("x", int | None)])
def test_text_of_another_type_is_refused(text, hint):
    with pytest.raises(ConfigError, match="E d_expert="):
        parse_value(text, hint, "E d_expert")


@given(width=st.integers(1, 64), rate=st.floats(1e-6, 1e6), limit=st.none() | st.integers(0, 9))
def test_a_config_written_and_read_is_the_same(width, rate, limit):
    one = Example(width=width, rate=rate, limit=limit)
    plain = {**one.to_dict(), "sizes": one.sizes, "inner": one.inner}
    assert Example.from_dict(plain) == one
    as_text = {"width": str(width), "rate": repr(rate), "limit": str(limit)}
    assert Example.from_dict(as_text, parse=True) == one


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
    table = Registry("colour")
    table.add("red", 1)
    assert table.get("red") == 1
    assert "red" in table
    assert list(table) == ["red"]
    assert len(table) == 1
    with pytest.raises(ConfigError, match="colour 'red' is already registered by 1; choose another name"):
        table.add("red", 2)
    with pytest.raises(ConfigError, match="unknown colour 'rod'; did you mean 'red'"):
        table.get("rod")
    table.remove("red")
    assert len(table) == 0


def test_a_room_with_a_broken_file_is_reported_every_time(tmp_path, monkeypatch):
    (tmp_path / "room_of_test").mkdir()
    (tmp_path / "room_of_test/bad.py").write_text("raise ValueError('broken')")
    monkeypatch.syspath_prepend(tmp_path)
    table = Registry("thing", "room_of_test")
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


def test_an_implementation_runs_or_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_impl("auto", cpu, "scan") is Impl.CPU
    assert resolve_impl("auto", cuda, "scan") is Impl.TRITON
    assert resolve_impl("reference", cuda, "scan") is Impl.REFERENCE
    with pytest.raises(KernelUnavailableError, match=r"scan impl='triton' needs a CUDA device, .*; use impl='cpu'"):
        resolve_impl("triton", cpu, "scan")
    with pytest.raises(ConfigError, match="impl='fast' must be one of auto, reference, cpu, triton"):
        Impl.of("fast")
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
