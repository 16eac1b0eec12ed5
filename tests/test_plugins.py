"""Blocks, presets, tasks and spaces of another package, found through its entry points."""

import subprocess
import sys
import textwrap

import pytest

PLUGIN = '''
"""A package with one block, one preset, one task and one space."""
from dataclasses import dataclass

import numpy as np
from torch import nn

import hybridnas
from hybridnas.layers.block import Block, BlockConfig, BlockOutput
from hybridnas.config import option
from hybridnas.cost import Cost
from hybridnas.data.task import Examples, Task, TaskConfig


@hybridnas.register_block("V", name="scaled")
class Scaled(Block):
    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        d_inner: int = option(64, "inner width [channels]", ge=1)

        def cost(self, seq_len, dtype_bytes=4):
            params = 2 * self.d_model * self.d_inner
            return Cost(params=params, active_params=params, flops_per_token=2.0 * params)

    def __init__(self, config, *, impl="auto"):
        super().__init__(config, impl=impl)
        self.up = nn.Linear(config.d_model, config.d_inner, bias=False)
        self.down = nn.Linear(config.d_inner, config.d_model, bias=False)

    def forward(self, x_BLD, state=None):
        return BlockOutput(self.down(self.up(x_BLD)), state)

    def init_state(self, batch_size, *, device, dtype):
        return ()

    def reset_parameters(self, init_scale=0.1):
        self.up.reset_parameters()
        self.down.reset_parameters()


@hybridnas.register_preset()
def scaled_only(*, d_model=32, n_blocks=2, vocab_size=64):
    """Scaled layers alone."""
    return hybridnas.Arch.from_pattern(f"Vx{n_blocks}", d_model=d_model, vocab_size=vocab_size)


@dataclass(frozen=True, kw_only=True)
class EchoConfig(TaskConfig):
    kind: str = option("echo", "kind of data")


@hybridnas.register_task("echo", config=EchoConfig)
class Echo(Task):
    config: EchoConfig

    def make(self, draws, train):
        inputs_BL = draws.below(self.config.vocab_size, self.config.seq_len)
        return Examples(inputs_BL, inputs_BL, np.ones_like(inputs_BL, dtype=bool))


hybridnas.register_space("scaled", {"letters": ["V", "F"], "motif_length": [2], "reference": "scaled_only"})
'''
POINTS = """
    [hybridnas.blocks]
    V = plugin_of_test
    [hybridnas.presets]
    scaled_only = plugin_of_test
    [hybridnas.tasks]
    echo = plugin_of_test
    [hybridnas.spaces]
    scaled = plugin_of_test
"""
BROKEN = """
    [hybridnas.blocks]
    Q = module_that_is_missing
    [hybridnas.presets]
    nothing = json
    [hybridnas.spaces]
    torn = module_that_is_missing
"""


def install(folder, name, points, **modules):
    """Lay out what pip would have installed: the modules, and the distribution's metadata."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(textwrap.dedent(points))
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)


def python(folder, code):
    """Run a program in a process of its own, since registries are filled once, and return what it printed."""
    program = f"import sys; sys.path.insert(0, {str(folder)!r})\n{textwrap.dedent(code)}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


@pytest.fixture
def site(tmp_path):
    install(tmp_path, "a-package-of-test", POINTS, plugin_of_test=PLUGIN)
    install(tmp_path, "broken-package-of-test", BROKEN)
    return tmp_path


def test_all_four_kinds_are_found_and_used(site):
    code = """
        import hybridnas
        print("torch" in sys.modules)
        arch = hybridnas.build("VF", d_model=16, vocab_size=32).arch
        print(arch.pattern, hybridnas.preset("scaled_only").cost().params == 2 * (2 * 32 * 64 + 64))
        print(hybridnas.list_blocks()["V"], "scaled_only" in hybridnas.list_presets())
        from hybridnas.data import open_source, source_config
        print(open_source(source_config({"kind": "echo"})).train_batch(0, 2, 128, 0).inputs_BL.shape)
        from hybridnas.search_spaces.space import Scale, load_space
        space, scale = load_space("scaled"), Scale(d_model=32, depth=4, multiple=1)
        print("scaled" in hybridnas.list_search_spaces(), space.reference)
        print(abs(space.baseline("mamba", scale).cost().active_params / space.target(scale) - 1) < 0.02)
    """
    assert python(site, code) == [
        "False",
        "VF True",
        "scaled True",
        "torch.Size([2, 128])",
        "True scaled_only",
        "True",
    ]


def test_the_command_describes_what_another_package_registers(site):
    code = """
        from hybridnas.cli import run
        sys.exit(run(["describe", "preset=scaled_only", "preset.n_blocks=3"]) or run(["describe"]))
    """
    lines = python(site, code)
    assert any("V scaled" in line for line in lines)
    assert any(line.startswith("scaled_only") or " scaled_only " in line for line in lines)


def test_the_commands_offer_what_another_package_registers(site):
    code = """
        from hybridnas.cli.compose import compose
        settings = compose("search", ["space=scaled", "data=echo", "data.seq_len=32"])
        print(settings["space"]["letters"], settings["data"]["kind"], settings["data"]["seq_len"])
        print(compose("train", ["preset=scaled_only", "preset.d_model=16"])["preset"])
    """
    assert python(site, code) == ["['V', 'F'] echo 32", "{'name': 'scaled_only', 'd_model': 16}"]


def test_a_broken_entry_point_is_a_warning_and_an_error_when_it_is_asked_for(site):
    code = """
        import logging
        lines = []
        class Keep(logging.Handler):
            def emit(self, record):
                lines.append((record.name, record.levelname, record.getMessage()))
        logging.getLogger("hybridnas").addHandler(Keep())
        import hybridnas
        from hybridnas.registry import BLOCKS
        print(hybridnas.build("ME", d_model=16, vocab_size=32).arch.pattern, "V" in BLOCKS)
        for line in sorted(lines):
            print(*line[:2], "'broken-package-of-test'" in line[2], "module_that_is_missing" in line[2])
        from hybridnas.search_spaces.space import load_space
        for ask in (lambda: BLOCKS.get("Q"), lambda: hybridnas.preset("nothing"), lambda: load_space("torn")):
            try:
                ask()
            except hybridnas.ConfigError as error:
                print(error.got, "'broken-package-of-test'" in str(error))
        try:
            hybridnas.build("MQ", d_model=16, vocab_size=32)
        except hybridnas.PatternError as error:
            print("'broken-package-of-test'" in str(error))
    """
    assert python(site, code) == [
        "ME True",
        "hybridnas.registry WARNING True True",  # Q
        "hybridnas.registry WARNING True False",  # nothing: json registers no preset
        "Q True",
        "nothing True",
        "torn True",
        "True",
    ]


def test_a_name_of_ours_is_refused_when_somebody_registers_it_again(tmp_path):
    code = """
        import hybridnas
        from hybridnas.errors import ConfigError

        def mamba(): ...

        class Mine: ...

        for register, what in (
            (hybridnas.register_preset(), mamba),
            (hybridnas.register_preset(), lambda: None),
            (hybridnas.register_block("M", name="mine"), Mine),
        ):
            try:
                register(what)
            except ConfigError as error:
                print(error.got)
        print("mamba" in hybridnas.list_presets(), hybridnas.list_blocks()["M"])
    """
    assert python(tmp_path, code) == ["mamba", "<lambda>", "M", "True mamba"]
