"""Checks of a source tree: import cycles, foreign underscored names, sizes of files and classes.

Each check takes the directory of a package and gives what is wrong, by place. Modules are named
without the package: ``core.norm_layer``; ``core`` is its ``__init__``, and "" the package's own.
"""

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

MAX_FILE = 450


def modules(package: Path) -> dict[str, Path]:
    """The files of a package by module."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def trees(package: Path) -> dict[str, ast.Module]:
    """The syntax trees of a package by module."""
    return {name: parsed(path.read_text()) for name, path in modules(package).items()}


@cache
def parsed(source: str) -> ast.Module:
    """Source code as a tree."""
    return ast.parse(source)


def imports(package: Path) -> dict[str, set[str]]:
    """The modules of the package that each module imports, wherever in the file."""
    parsed, files = trees(package), modules(package)
    return {
        module: {target for _, target, _ in _imported(files, parsed, module, package.name)}
        - {module}
        for module in parsed
    }


def _imported(
    files: Mapping[str, Path], parsed: Mapping[str, ast.Module], module: str, package: str
) -> Iterator[tuple[str, str, str | None]]:
    """Local name, module and, where it is not a module that is imported, name of each import."""
    is_init = files[module].name == "__init__.py"
    for node in ast.walk(parsed[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                head, _, tail = alias.name.partition(".")
                if head == package and tail in parsed:
                    yield alias.asname or head, tail, None
        elif isinstance(node, ast.ImportFrom):
            origin = _origin(package, module, is_init, node)
            if origin is None:
                continue
            for alias in node.names:
                name = alias.asname or alias.name
                inner = f"{origin}.{alias.name}".lstrip(".")
                if inner in parsed:
                    yield name, inner, None
                elif alias.name != "__version__":
                    yield name, origin, alias.name


def _origin(package: str, module: str, is_init: bool, node: ast.ImportFrom) -> str | None:
    """The module of the package that a statement imports from; None for others."""
    if not node.level:
        head, _, tail = (node.module or "").partition(".")
        return tail if head == package else None
    parts = module.split(".") if module else []
    base = parts[: len(parts) + is_init - node.level]
    return ".".join([*base, *([node.module] if node.module else [])])


def modules_in_cycles(package: Path) -> set[str]:
    """Modules that import themselves by way of others."""
    edges = imports(package)

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = list(edges[start])
        while waiting:
            module = waiting.pop()
            if module not in found:
                found.add(module)
                waiting += edges[module]
        return found

    return {module for module in edges if module in reached(module)}


def foreign_private_names(package: Path, allowed: frozenset[str] = frozenset()) -> set[str]:
    """Uses of another module's underscored names, as ``module: receiver._name``.

    Such a use is an import, an attribute of an imported module, or an attribute (also by `getattr`
    and the like) that this module never defines and another one does. A subclass may use what it
    inherits, through ``self``, ``cls`` and ``super()``.

    Args:
        package: Its directory.
        allowed: Underscored attributes of libraries that modules may use.
    """
    parsed, files = trees(package), modules(package)
    defined = {module: set(_defined(tree)) for module, tree in parsed.items()}
    found = set()
    for module, tree in parsed.items():
        names = {}
        for name, origin, imported in _imported(files, parsed, module, package.name):
            if imported is None:
                names[name] = origin
            elif _is_private(imported):
                found.add(f"{module}: {origin}.{imported}")
        others = set().union(*(own for other, own in defined.items() if other != module))
        for receiver, attribute in _attributes(tree):
            if receiver in names and receiver not in ("self", "cls"):
                found.add(f"{module}: {names[receiver]}.{attribute}")
            elif receiver in ("self", "cls", "super()") or attribute in allowed:
                continue
            elif attribute in others - defined[module]:
                found.add(f"{module}: {receiver}.{attribute}")
    return found


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _defined(tree: ast.Module) -> Iterator[str]:
    """Underscored names that a module gives a meaning."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if ast.unparse(node.value) not in ("self", "cls"):
                continue
            name = node.attr
        else:
            continue
        if _is_private(name):
            yield name


def _attributes(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Receiver and name of each use of an underscored attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            yield ast.unparse(node.value), node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id not in ("getattr", "setattr", "hasattr", "delattr"):
                continue
            if len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                name = str(node.args[1].value)
                if _is_private(name):
                    yield ast.unparse(node.args[0]), name


def lines_over(package: Path, limit: int = MAX_FILE) -> dict[str, int]:
    """Files of more lines than the limit."""
    sizes = {
        path.relative_to(package).as_posix(): len(path.read_text().splitlines())
        for path in modules(package).values()
    }
    return {name: size for name, size in sizes.items() if size > limit}


def total_lines(package: Path) -> int:
    """Lines of all files."""
    return sum(lines_over(package, -1).values())


def class_lines(package: Path, name: str) -> int:
    """Lines of a class."""
    for tree in trees(package).values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name == name:
                assert node.end_lineno is not None
                return node.end_lineno - node.lineno + 1
    raise ValueError(f"name={name!r}: no class in {package} has it")


def parts_out_of_order(package: Path, order: list[str]) -> set[str]:
    """Imports from a part of the package that stands later in the order, as ``module: target``."""
    place = {part: number for number, part in enumerate(order)}
    found = set()
    for module, targets in imports(package).items():
        for target in targets:
            here, there = (name.partition(".")[0] for name in (module, target))
            if here not in place or there not in place or place[there] > place[here]:
                found.add(f"{module}: {target}")
    return found


def unlisted_exports(package: Path) -> set[str]:
    """Public names that an ``__init__`` only imports and does not list, or lists and has not."""
    found = set()
    for module, path in modules(package).items():
        tree = parsed(path.read_text())
        listed = _listed(tree)
        if listed is None:
            continue
        given = set(_top_level(tree))
        found |= {f"{module}: {name} is not there" for name in listed - given}
        if path.name == "__init__.py":
            used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            own = {name for name in _ours(package.name, tree) if not name.startswith("_")} - used
            found |= {f"{module}: {name} is not in __all__" for name in own - listed}
    return found


def _listed(tree: ast.Module) -> set[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return None


def _top_level(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (ast.unparse(target) for target in node.targets)
        elif isinstance(node, ast.AnnAssign):
            yield ast.unparse(node.target)


def _ours(package: str, tree: ast.Module) -> Iterator[str]:
    """Names that come from the package, or are made here."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            if node.level or (node.module or "").partition(".")[0] == package:
                yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
