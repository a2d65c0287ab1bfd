"""Factories of networks: those of the tools by name, and a user's own."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from anybatch.core.arguments import closest
from anybatch.tools import networks
from anybatch.tools.data import Dataset
from anybatch.tools.run import is_own

_CLASSES = 10
_EXAMPLE = {"mlp": (64,)}  # what a network here takes where nothing is said
_IMAGE = (3, 32, 32)
Factory = Callable[[], nn.Module]


def example_shape(name: str) -> tuple[int, ...] | None:
    """Return the shape of an example for a network of the tools, None for any other."""
    return _EXAMPLE.get(name, _IMAGE) if name in networks.BUILDERS else None


def factory(name: str, example: tuple[int, ...] | None = None) -> Factory:
    """Return a function that builds a network.

    Args:
        name: A network of the tools, or ``module:factory``: a module that can be imported
            from here, or the path of a Python file, and a class or function in it that needs no
            argument.
        example: Shape of an example, for a network of the tools.

    Returns:
        A function without arguments; it raises ValueError where the factory fails, TypeError where
        it makes something else.

    Raises:
        ValueError: If there is no such network, module or factory.

    Example:
        >>> factory("torch.nn:Identity")()
        Identity()
    """
    if name in networks.BUILDERS:
        shape = example or example_shape(name)
        assert shape is not None
        return lambda: networks.build(name, _CLASSES, shape)
    make = find("model", name, networks.MODELS)
    if isinstance(make, nn.Module):
        raise ValueError(
            f"model={name!r}: it is {type(make).__name__}; give a function or class that makes "
            "a torch.nn.Module without arguments, as each method needs a fresh one"
        )

    return lambda: check_network(f"model={name!r}", call("model", name, make))


def check_network(given: str, made: object) -> nn.Module:
    """Return what a user's function made, if it is a network; `given` names it in the error."""
    if not isinstance(made, nn.Module):
        raise TypeError(
            f"{given}: it gave {type(made).__name__}; give a function or class that makes a "
            "torch.nn.Module without arguments"
        )
    return made


def build(name: str, data: Dataset) -> nn.Module:
    """Build the network of a run.

    Raises:
        ValueError: If the network does not take such examples, or cannot be built.
    """
    if data.network is not None:
        return data.network()
    if is_own(name):
        return factory(name)()
    return networks.build(name, data.classes, data.shape)


def find(argument: str, name: str, known: Sequence[str] = ()) -> Callable[[], Any]:
    """Import a user's function or class.

    Args:
        argument: What it is given as, for errors.
        name: ``module:function``: a module that can be imported from here, or the path of a Python
            file, and a name in it.
        known: Other names that the argument takes, for errors.

    Raises:
        ValueError: If there is no such module or function, or it cannot be called.
    """
    module_name, colon, attribute = name.rpartition(":")
    if not (colon and module_name and attribute):
        hint = closest(name, known)
        others = f"one of {', '.join(known)}, or " if known else ""
        raise ValueError(
            f"{argument}={name!r}: {hint}give {others}module:function, as in "
            "torchvision.models:resnet18 or mine.py:network"
        )
    found = _module(f"{argument}={name!r}", module_name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            hint = closest(part, dir(found)).rstrip()
            hint = f"; {hint}" if hint else ""
            raise ValueError(f"{argument}={name!r}: there is no {part!r} in it{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(
            f"{argument}={name!r}: it is {type(found).__name__}; give a function or class that "
            "is called without arguments"
        )
    make: Callable[[], Any] = found
    return make


def call(argument: str, name: str, make: Callable[[], Any]) -> Any:
    """Call a user's function.

    Raises:
        ValueError: If it fails.
    """
    try:
        return make()
    except Exception as error:  # anything can go wrong in there
        raise ValueError(f"{argument}={name!r}: calling it failed ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _module(given: str, module_name: str) -> Any:
    path = Path(module_name)
    try:
        if path.suffix == ".py":
            return _file(path)
        here = str(Path.cwd())
        if here not in sys.path:  # as `python -m` has it
            sys.path.insert(0, here)
        return importlib.import_module(module_name)
    except Exception as error:  # a module may raise anything as it is loaded
        raise ValueError(
            f"{given}: {module_name!r} cannot be imported ({_reason(error)})"
        ) from error


def _file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:  # a file imports its neighbours
        sys.path.insert(0, folder)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module
