"""What a layer's docstring takes from that of its base."""

import inspect

import pytest

from anybatch.core.described import completed
from anybatch.core.norm_layer import NormLayer
from anybatch.layers.momentum_batch_norm import MomentumBatchNorm

BASE = """Base.

    Args:
        size: How many.
        rate: How fast, of
            all that there are.

    Shape:
        Any.

    Raises:
        ValueError: For a size below 1.
    """


def test_own_entries_stay_and_others_come_in_the_order_of_the_arguments() -> None:
    own = "Own.\n\nMore.\n\nArgs:\n    rate: Of its own.\n    color: Red.\n\nSource: me."
    assert completed(own, BASE, ["size", "color", "rate", "unknown"]).splitlines() == [
        "Own.",
        "",
        "More.",
        "",
        "Args:",
        "    size: How many.",
        "    color: Red.",
        "    rate: Of its own.",
        "",
        "Shape:",
        "    Any.",
        "",
        "Raises:",
        "    ValueError: For a size below 1.",
        "",
        "Source: me.",
    ]


@pytest.mark.parametrize("end", ["", "\n\n    Example:\n        >>> 1\n        1\n    "])
def test_a_docstring_without_arguments_gets_them_before_its_example(end: str) -> None:
    found = completed("Own." + end, BASE, ["rate"])
    arguments = "Args:\n    rate: How fast, of\n        all that there are."
    assert found.startswith(f"Own.\n\n{arguments}\n\nShape:")
    assert found.endswith("    1" if end else "below 1.")


def test_a_class_of_a_user_is_documented_whole() -> None:
    class Slow(MomentumBatchNorm):
        """Slow.

        Args:
            slowness: How slow.
        """

        def __init__(self, num_features: int, slowness: float, **common: object) -> None:
            super().__init__(num_features, **common)
            self.slowness = slowness

    class Slow2d(Slow, dims=2):
        pass

    for layer in (Slow, Slow2d):
        doc = inspect.getdoc(layer) or ""
        assert "slowness: How slow." in doc
        assert "outlier_limit: A batch in which" in doc
        assert "Input and output ``(N, C)``" in doc


def test_a_class_without_a_docstring_has_that_of_its_base() -> None:
    class Plain(NormLayer):
        pass

    assert inspect.getdoc(Plain) == inspect.getdoc(NormLayer)
