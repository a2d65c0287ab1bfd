"""Messages to the library's user: the logger, and warnings that are given once."""

import logging
import warnings
from dataclasses import dataclass

LOGGER = logging.getLogger("anybatch")
LOGGER.addHandler(logging.NullHandler())


class NoEffectWarning(UserWarning):
    """A call had no effect, or not all of the effect that was asked for.

    Example:
        >>> issubclass(NoEffectWarning, UserWarning)
        True
    """


@dataclass
class Notice:
    """A warning that is given once, by whichever of the layers that share it comes first.

    Args:
        given: Whether it was given.
    """

    given: bool = False

    def warn(self, message: str) -> None:
        """Give the warning, unless it was given."""
        if not self.given:
            self.given = True
            warnings.warn(message, NoEffectWarning, stacklevel=2)
