"""Methods in MONAI's factory of norms, for the ``norm`` argument of its networks."""

from __future__ import annotations

from functools import partial

from anybatch.conversion.factory import norm_layer
from anybatch.registry import METHODS

try:
    from monai.networks.layers.factories import Norm
except ImportError as error:
    raise ImportError("anybatch.integrations.monai needs MONAI: pip install monai") from error


def register() -> tuple[str, ...]:
    """Add the methods to MONAI's ``Norm`` factory: ``norm=("mabn", {"window": 32})``.

    All but `cbn`, whose layers follow a convolution: build with ``norm="batch"`` and convert. For
    `mabn`, call ``anybatch.convert(model, "mabn", centralize=True)`` on the finished network. MONAI
    does not take names with a plus sign. To register twice does no harm.

    Returns:
        The names.

    Example:
        >>> "mabn" in register()
        True
    """
    names = [m.name for m in METHODS.values() if m.name.isidentifier() and not m.binds]
    for name in names:
        Norm.add_factory_callable(name, partial(norm_layer, name), METHODS[name].summary)
    return tuple(names)
