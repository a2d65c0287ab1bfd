"""Operations on a layer's output in its own pass: adding another tensor, taking a ReLU."""

from typing import NamedTuple

from torch import Tensor, nn

from anybatch import backends


class Activation(NamedTuple):
    """A ReLU that follows a norm.

    Attributes:
        residual: What is added before it, or None.
    """

    residual: Tensor | None

    def is_plain(self) -> bool:
        """True if what is added is memory to read."""
        return self.residual is None or type(self.residual) in (Tensor, nn.Parameter)

    def of(self, y: Tensor, fresh: bool = False) -> Tensor:
        """The same by torch's operators, which keep the ReLU's output for backward alone.

        Args:
            y: The norm's output.
            fresh: Whether nothing else sees or keeps it, so that it may be written over.
        """
        fresh = fresh and not backends.is_traced()
        if self.residual is not None:
            y = y.add_(self.residual) if fresh else y + self.residual
        return y.relu_() if fresh else y.relu()


_ALONE = Activation(None)


def read_activation(activation: str | None, residual: Tensor | None, x: Tensor) -> Activation:
    """Check what a layer is to do behind the norm.

    Args:
        activation: As given to a layer.
        residual: As given to a layer.
        x: Its input.

    Returns:
        The same, to be applied.

    Raises:
        ValueError: For another activation than "relu", a residual without one, or of another shape
            than the input.
        TypeError: For a residual that is no tensor of the input's type.
    """
    if activation != "relu":
        given = f"activation={activation!r}"
        hint = " with a residual, or add that to the output" if activation is None else " or None"
        raise ValueError(f"{given}: give 'relu'{hint}")
    if residual is None:
        return _ALONE
    if not isinstance(residual, Tensor) or residual.dtype != x.dtype:
        what = residual.dtype if isinstance(residual, Tensor) else type(residual).__name__
        raise TypeError(f"residual of type {what}: give a tensor of the input's type, {x.dtype}")
    if residual.shape != x.shape:
        raise ValueError(
            f"residual of shape {tuple(residual.shape)}: give one of the input's shape, "
            f"{tuple(x.shape)}"
        )
    return Activation(residual)
