"""All architectures of transformers that build batch norms."""

import ast
from pathlib import Path

import pytest

from zoo.checks import check_batch_of_one, check_conversion, require
from zoo.listing import Listed, cases, each
from zoo.transformers_networks import BACKBONES, LEFT_OUT, NETWORKS, VERSION

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # those of transformers


@pytest.mark.parametrize(("network", "method"), cases(NETWORKS))
def test_a_transformers_network_converts_trains_and_goes_back(network: Listed, method: str) -> None:
    require(network, "transformers", VERSION)
    check_conversion(network, method)


@pytest.mark.parametrize("method", ["bn", "mabn"])
@pytest.mark.parametrize("network", each(NETWORKS))
def test_a_transformers_network_trains_at_batch_1(network: Listed, method: str) -> None:
    require(network, "transformers", VERSION)
    check_batch_of_one(network, method)


def builders_of_batch_norm() -> set[str]:
    """Folders of transformers.models with a class that makes a torch batch norm."""
    root = Path(transformers.__file__).parent / "models"
    texts = {path: path.read_text("utf-8") for path in root.rglob("modeling_*.py")}
    return {
        path.parent.name
        for path, text in texts.items()
        if "BatchNorm" in text and any(map(_makes_batch_norm, ast.walk(ast.parse(text))))
    }


def _makes_batch_norm(node: ast.AST) -> bool:
    made = node.func if isinstance(node, ast.Call) else None
    return isinstance(made, ast.Attribute) and made.attr in {f"BatchNorm{d}d" for d in (1, 2, 3)}


@pytest.mark.slow
def test_every_architecture_is_listed_or_left_out_with_a_reason() -> None:
    there = builders_of_batch_norm()
    listed = {name.partition(" ")[0] for name in NETWORKS}
    if not transformers.__version__.startswith(f"{VERSION}."):
        new = sorted(there - listed - set(LEFT_OUT))
        pytest.skip(f"the list is of transformers {VERSION}; new here: {new}")
    assert there - listed - set(LEFT_OUT) == set()
    assert listed - there == BACKBONES
    assert listed & set(LEFT_OUT) == set()
