"""What holds for the package as a whole: its imports, its public names, its version."""

import ast
import collections
import importlib.metadata
import inspect
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import anybatch
import structure

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "anybatch"

# Each part may import itself and what stands before it; "" is the package's own `__init__`.
ORDER = [
    "version",
    "backends",
    "core",
    "layers",
    "theory",
    "registry",
    "conversion",
    "schedule",
    "evaluation",
    "tools",
    "comparison",
    "",
    "integrations",
    "cli",
    "__main__",
]

# What breaks a rule of `structure.py` today. An entry that no longer does must go.
KNOWN_CYCLES: set[str] = set()
KNOWN_FOREIGN_NAMES: set[str] = set()
KNOWN_LONG_FILES: set[str] = set()
# Ceilings that only come down: to 300 lines for NormLayer and 20,000 for the package.
NORM_LAYER_LINES = 225
PACKAGE_LINES = 36492

EXPORTED = list(anybatch.__all__)
PUBLIC = {name: getattr(anybatch, name, None) for name in EXPORTED}
LAYERS = [
    name
    for name, thing in PUBLIC.items()
    if inspect.isclass(thing) and issubclass(thing, nn.Module)
]
FUNCTIONS = [name for name, thing in PUBLIC.items() if inspect.isfunction(thing)]
CLASSES = [
    name
    for name, thing in PUBLIC.items()
    if inspect.isclass(thing) and name not in LAYERS and not issubclass(thing, Warning)
]
# Underscored names that torch gives to modules, tensors and functions; and tuples to themselves.
TORCHS = frozenset(
    name
    for thing in (
        nn.ConvTranspose2d(1, 1, 1),
        torch.Tensor,
        torch.optim.SGD,
        nn.modules.batchnorm,
        collections.namedtuple("Pair", "a b"),
    )
    for name in dir(thing)
    if name.startswith("_") and not name.startswith("__")
)


def test_importing_anybatch_loads_torch_and_the_standard_library_only() -> None:
    """Nor torch's compiler, tools or the command line; a batch on a CPU loads Numba alone."""
    code = (
        "import sys, torch, torch.utils.checkpoint; before = set(sys.modules); "
        "import anybatch; print(*set(sys.modules) - before); "
        "anybatch.BatchNorm1d(4)(torch.randn(2, 4)); print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, with_a_batch = (set(line.split()) for line in done.stdout.splitlines())
    allowed = {"torch", "anybatch"} | set(sys.stdlib_module_names)
    assert {name for name in loaded if name.partition(".")[0] not in allowed} == set()
    assert loaded & {"torch._dynamo", "torch._inductor"} == set()
    assert {name for name in loaded if name.startswith(("anybatch.tools", "anybatch.cli"))} == set()
    assert "triton" not in with_a_batch
    assert ("numba" in with_a_batch) == (find_spec("numba") is not None)


def test_parts_import_only_parts_before_them() -> None:
    parts = {module.partition(".")[0] for module in structure.modules(PACKAGE)}
    assert parts == set(ORDER), "each part has a place in the order of imports"
    assert structure.parts_out_of_order(PACKAGE, ORDER) == set()


def test_modules_have_no_import_cycles_but_known_ones() -> None:
    assert structure.modules_in_cycles(PACKAGE) == KNOWN_CYCLES


def test_modules_use_no_foreign_underscored_names_but_known_ones() -> None:
    assert structure.foreign_private_names(PACKAGE, TORCHS) == KNOWN_FOREIGN_NAMES


def test_files_are_short_but_known_ones() -> None:
    assert set(structure.lines_over(PACKAGE)) == KNOWN_LONG_FILES


def test_the_base_layer_and_the_package_grow_no_longer() -> None:
    assert structure.class_lines(PACKAGE, "NormLayer") <= NORM_LAYER_LINES
    assert structure.total_lines(PACKAGE) <= PACKAGE_LINES


def test_exports_are_listed() -> None:
    assert structure.unlisted_exports(PACKAGE) == set()


def test_files_are_named_after_what_they_hold() -> None:
    stems = {path.stem for path in structure.modules(PACKAGE).values()}
    assert stems & {"utils", "helpers", "common", "misc"} == set()


@pytest.mark.parametrize("name", EXPORTED)
def test_every_exported_name_exists(name: str) -> None:
    assert hasattr(anybatch, name)


def test_every_layer_of_a_method_is_exported() -> None:
    for method in anybatch.METHODS.values():
        for dims in (1, 2, 3):
            layer = method.layer(dims)
            assert layer.__module__.startswith("torch.") or layer.__name__ in EXPORTED


def own_parameters(thing: Any) -> list[str]:
    """Parameters a reader must find in the docstring: not private ones, *args or **kwargs."""
    skipped = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    parameters = inspect.signature(thing).parameters.values()
    return [p.name for p in parameters if p.kind not in skipped and p.name[0] != "_"]


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_docstrings_explain_every_argument(name: str) -> None:
    thing = getattr(anybatch, name)
    assert thing.__doc__, f"anybatch.{name} has no docstring"
    missing = [p for p in own_parameters(thing) if not re.search(rf"\b{p}\b", thing.__doc__)]
    assert missing == []


@pytest.mark.parametrize("name", LAYERS)
def test_layers_explain_their_own_arguments(name: str) -> None:
    layer = getattr(anybatch, name)
    assert layer.__doc__, f"anybatch.{name} has no docstring"
    described = "\n".join(base.__doc__ or "" for base in layer.__mro__ if is_ours(base))
    missing = [p for p in own_parameters(layer) if not re.search(rf"\b{p}\b", described)]
    assert set(missing) <= {"self", "device", "dtype"}


def is_ours(cls: type) -> bool:
    return cls.__module__.startswith("anybatch.")


def test_no_two_tests_have_the_same_name() -> None:
    names = collections.Counter(
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in structure.parsed(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_version_is_the_same_everywhere() -> None:
    version = anybatch.__version__
    assert importlib.metadata.version("anybatch") == version
    assert f'\nversion: "{version}"\n' in (ROOT / "CITATION.cff").read_text()
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def requirements(distribution: str, extra: str | None) -> set[str]:
    """Names of the distributions that one, or an extra of it, asks for directly."""
    found = set()
    for line in importlib.metadata.requires(distribution) or []:
        name = re.split(r"[^A-Za-z0-9_.-]", line)[0].lower()
        marker = re.search(r"extra == ['\"](.+?)['\"]", line)
        if (marker.group(1) if marker else None) == extra:
            found.add(name)
    return found


def test_only_torch_and_what_torch_needs_is_installed() -> None:
    assert requirements("anybatch", None) <= {"torch"} | requirements("torch", None)


def test_no_extra_changes_which_torch_is_installed() -> None:
    extras = importlib.metadata.metadata("anybatch").get_all("Provides-Extra")
    asked = set().union(*(requirements("anybatch", extra) for extra in extras))
    assert asked & {"torchvision", "torchaudio", "timm"} == set()  # triton has no torch to ask for


def test_package_is_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


# --- the checks themselves, on trees with planted violations --------------------------------------


def tree(root: Path, files: dict[str, str]) -> Path:
    """A package ``pkg`` of these files."""
    package = root / "pkg"
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


@pytest.mark.parametrize(
    "back",
    [
        "from pkg import a",
        "import pkg.a",
        "from . import a",
        "from pkg.a import A",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pkg.a import A",
        "def late() -> None:\n    from pkg.a import A",
    ],
)
def test_an_import_cycle_is_found_however_it_is_written(tmp_path: Path, back: str) -> None:
    files = {"__init__.py": "", "a.py": "from pkg.b import B\nA = 1", "c.py": "import pkg.a"}
    assert structure.modules_in_cycles(tree(tmp_path, {**files, "b.py": "B = 1"})) == set()
    assert structure.modules_in_cycles(tree(tmp_path, {**files, "b.py": back})) == {"a", "b"}


def test_an_import_cycle_of_three_modules_is_found(tmp_path: Path) -> None:
    files = {
        "x/__init__.py": "",
        "x/a.py": "from .b import f",
        "x/b.py": "from ..y import c",
        "y/__init__.py": "",
        "y/c.py": "from ..x.a import g",
        "y/d.py": "from . import c",
    }
    assert structure.modules_in_cycles(tree(tmp_path, files)) == {"x.a", "x.b", "y.c"}


@pytest.mark.parametrize(
    ("use", "found"),
    [
        ("from pkg.a import _f", "b: a._f"),
        ("from pkg import a\nx = a._f", "b: a._f"),
        ("import pkg.a as other\nx = other._f()", "b: a._f"),
        ("def g(layer):\n    return layer._kept", "b: layer._kept"),
        ("def g(layer):\n    return getattr(layer, '_kept')", "b: layer._kept"),
        ("def g(layer):\n    layer.part._kept = 2", "b: layer.part._kept"),
        ("class B(A):\n    def g(self):\n        return self.other._kept", "b: self.other._kept"),
    ],
)
def test_a_foreign_underscored_name_is_found(tmp_path: Path, use: str, found: str) -> None:
    own = "def _f(): ...\nclass A:\n    def __init__(self):\n        self._kept = self._f = 1"
    package = tree(tmp_path, {"__init__.py": "", "a.py": own, "b.py": use})
    assert structure.foreign_private_names(package) == {found}


@pytest.mark.parametrize(
    "use",
    [
        "from pkg.a import A\nclass B(A):\n    def g(self):\n        return self._kept",
        "class B:\n    _kept = 1\ndef g(b):\n    return b._kept",
        "def g(x):\n    return x._version, x.__dict__",
        "from pkg.a import __doc__",
    ],
)
def test_own_and_inherited_underscored_names_are_allowed(tmp_path: Path, use: str) -> None:
    own = "class A:\n    def __init__(self):\n        self._kept = 1"
    package = tree(tmp_path, {"__init__.py": "", "a.py": own, "b.py": use})
    assert structure.foreign_private_names(package) == set()


def test_sizes_and_order_and_exports_are_checked(tmp_path: Path) -> None:
    package = tree(
        tmp_path,
        {
            "__init__.py": "from pkg.low import f, g\nimport os\n__all__ = ['f', 'gone']",
            "low.py": "from pkg.high import h\n" + "x = 1\n" * 450,
            "high.py": "class Tall:\n    a = 1\n    b = 2\n",
        },
    )
    assert structure.lines_over(package) == {"low.py": 451}
    assert structure.class_lines(package, "Tall") == 3
    assert structure.parts_out_of_order(package, ["low", "high", ""]) == {"low: high"}
    assert structure.parts_out_of_order(package, ["high", "low", ""]) == set()
    assert structure.unlisted_exports(package) == {": g is not in __all__", ": gone is not there"}
