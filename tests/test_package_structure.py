"""What holds for the package as a whole: its imports, its public names, its version."""

import ast
import importlib.metadata
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import anybatch

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "anybatch"

# Each part may import itself and what stands before it.
ORDER = [
    "backends",
    "core",
    "layers",
    "theory",
    "registry",
    "conversion",
    "schedule",
    "evaluation",
    "tools",
    "integrations",
    "cli",
]

LAYERS = [
    f"{prefix}{dims}d"
    for prefix in (
        "BatchNorm",
        "MomentumBatchNorm",
        "MovingAverageBatchNorm",
        "BatchRenorm",
        "GhostBatchNorm",
        "BatchGroupNorm",
    )
    for dims in (1, 2, 3)
]
FUNCTIONS = [
    "convert",
    "plan",
    "to_batchnorm",
    "fold",
    "weight_centralization",
    "freeze",
    "thaw",
    "no_update",
    "decay_plan",
    "param_groups",
    "diagnose",
    "recalibrate",
    "example_weighing",
    "set_example_weight",
    "tune_example_weight",
    "eval_norm",
]
EXPORTED = getattr(anybatch, "__all__", [])
PUBLIC = [*LAYERS, *FUNCTIONS, "NormScheduler", "GammaDecay", "theory"]


def modules_loaded_by(statement: str) -> set[str]:
    """Names of the modules that `statement` loads in a process that has imported torch."""
    code = (
        "import sys, torch; before = set(sys.modules); "
        f"{statement}; print('\\n'.join(set(sys.modules) - before))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(answer.stdout.split())


def test_importing_anybatch_loads_torch_and_the_standard_library_only():
    allowed = {"torch", "anybatch"} | set(sys.stdlib_module_names)
    loaded = modules_loaded_by("import anybatch")
    assert {name for name in loaded if name.partition(".")[0] not in allowed} == set()


def test_importing_anybatch_does_not_load_the_compiler():
    loaded = modules_loaded_by("import anybatch")
    assert {name for name in loaded if name in {"torch._dynamo", "torch._inductor"}} == set()


def test_importing_anybatch_leaves_tools_and_command_line_alone():
    loaded = modules_loaded_by("import anybatch")
    assert {name for name in loaded if name.startswith(("anybatch.tools", "anybatch.cli"))} == set()


def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything a source file imports, wherever in the file."""
    package = ("anybatch", *path.relative_to(PACKAGE).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "anybatch":
                found |= {f"anybatch.{alias.name}" for alias in node.names}
            else:
                found.add(module)
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


SOURCES = sorted(
    path for path in PACKAGE.rglob("*.py") if part_of(path) not in {"__init__", "__main__"}
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    part = part_of(path)
    assert part in ORDER, f"{part} has no place in the order of imports: {ORDER}"
    allowed = set(ORDER[: ORDER.index(part) + 1])
    names = {name.split(".")[1] for name in imported_modules(path) if name.startswith("anybatch.")}
    if part == "evaluation":
        allowed |= {"__version__"}
    if part in {"tools", "cli"}:
        allowed |= set(EXPORTED) | {"__version__"}
    assert names <= allowed


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_named_after_what_they_hold(path):
    assert path.stem not in {"utils", "helpers", "common", "misc"}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_exported(name):
    assert name in EXPORTED
    assert hasattr(anybatch, name)


@pytest.mark.parametrize("name", EXPORTED)
def test_everything_exported_is_there(name):
    assert hasattr(anybatch, name)


def own_parameters(thing) -> list[str]:
    """Parameters a reader must find in the docstring: not self, *args or **kwargs."""
    skipped = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    parameters = inspect.signature(thing).parameters.values()
    return [p.name for p in parameters if p.kind not in skipped]


@pytest.mark.parametrize("name", [*FUNCTIONS, "NormScheduler", "GammaDecay"])
def test_docstrings_explain_every_argument(name):
    thing = getattr(anybatch, name)
    assert thing.__doc__, f"anybatch.{name} has no docstring"
    missing = [p for p in own_parameters(thing) if not re.search(rf"\b{p}\b", thing.__doc__)]
    assert missing == []


@pytest.mark.parametrize("name", LAYERS)
def test_layers_explain_their_own_arguments(name):
    layer = getattr(anybatch, name)
    assert layer.__doc__, f"anybatch.{name} has no docstring"
    described = "\n".join(base.__doc__ or "" for base in layer.__mro__ if is_ours(base))
    missing = [p for p in own_parameters(layer) if not re.search(rf"\b{p}\b", described)]
    assert set(missing) <= {"self", "device", "dtype"}


def is_ours(cls: type) -> bool:
    return cls.__module__.startswith("anybatch.")


def test_version_is_the_same_everywhere():
    version = anybatch.__version__
    assert importlib.metadata.version("anybatch") == version
    assert f'\nversion: "{version}"\n' in (ROOT / "CITATION.cff").read_text()
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def requirements(extra: str | None) -> set[str]:
    """Names of the distributions that the package, or one of its extras, asks for directly."""
    found = set()
    for line in importlib.metadata.requires("anybatch") or []:
        name = re.split(r"[^A-Za-z0-9_.-]", line)[0].lower()
        marker = re.search(r"extra == ['\"](.+?)['\"]", line)
        if (marker.group(1) if marker else None) == extra:
            found.add(name)
    return found


def test_torch_is_the_only_dependency():
    assert requirements(None) == {"torch"}


def test_no_extra_changes_which_torch_is_installed():
    extras = importlib.metadata.metadata("anybatch").get_all("Provides-Extra")
    asked = set().union(*(requirements(extra) for extra in extras))
    assert asked & {"torchvision", "torchaudio", "timm"} == set()  # triton has no torch to ask for


def test_package_is_marked_as_typed():
    assert (PACKAGE / "py.typed").exists()
