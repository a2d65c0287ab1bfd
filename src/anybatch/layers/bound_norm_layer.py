"""A layer that follows the convolution or linear layer whose output it normalizes."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from anybatch.backends import is_traced
from anybatch.backends.aten import patches
from anybatch.backends.aten.patches import ConvCall, Geometry
from anybatch.core.activation_checkpointing import in_backward
from anybatch.core.arguments import first_input
from anybatch.core.norm_layer import NormLayer
from anybatch.core.reduction_scope import ReductionScope
from anybatch.core.tensor_subclasses import as_plain
from anybatch.layers.weight_centralization import centralized_weight, is_centralized

Self = TypeVar("Self", bound="BoundNormLayer")


class BoundBatch(NamedTuple):
    """The normalization batch that a rule is at.

    Attributes:
        feed: What the bound layer did; None where it does not count.
        y: What the bound layer put out, of all normalization batches.
        first: The batch's first example.
        source: Which elements contribute to its statistics; None for all.
    """

    feed: ConvCall | None
    y: Tensor
    first: int
    source: ReductionScope | None = None


class BoundState:
    """State passed from the bound layer's forward to this layer's; nothing of it lasts.

    Attributes:
        feed: Of the bound layer's latest forward.
        weight: That a parametrization has just made.
        batch: That the rule is at.
        key: Shapes that `tables` belong to.
        tables: Of the geometry, as arrays of the compiled kernels.
        method_state: The layer's, which `arrays` belong to.
        arrays: Rings and counters as arrays of the same storage.
    """

    def __init__(self) -> None:
        self.feed: ConvCall | None = None
        self.weight: Tensor | None = None
        self.batch: BoundBatch | None = None
        self.key: Any = None
        self.tables: Any = None
        self.method_state: Any = None
        self.arrays: Any = None


class BoundNormLayer(NormLayer):
    """A layer that sees the input and the weights of the layer that feeds it.

    Attributes:
        geometry: Of the bound layer; None if none is bound.
    """

    geometry: Geometry | None = None
    _settings: tuple[Any, ...] = ()
    _flow: BoundState

    def follows(self) -> bool:
        """True where the bound layer's next forward counts."""
        return self.training and not self.frozen

    def open_memory(self) -> None:
        """Make the state that belongs to the bound layer."""

    def bind(self: Self, module: nn.Module) -> Self:
        """Follow the convolution or linear layer whose output this layer normalizes.

        The weights that it *uses* count: centralized ones, and those of a parametrization or a
        weight norm.

        Args:
            module: ``Conv1d`` to ``3d``, ``ConvTranspose1d`` to ``3d`` or ``Linear``.

        Returns:
            This layer.

        Raises:
            TypeError: For another layer.
            ValueError: If it puts out another number of channels, or one is bound already.
        """
        if not isinstance(module, (_ConvNd, nn.Linear)):
            raise TypeError(
                f"module={type(module).__name__}: give a convolution, a transposed convolution or "
                "a linear layer"
            )
        geometry = patches.geometry_of(module)
        if geometry.outputs != self.num_features:
            raise ValueError(
                f"module={module}: it puts out {geometry.outputs} channels, this layer normalizes "
                f"{self.num_features}"
            )
        if self.geometry is not None:
            raise ValueError("a layer is bound already: unbind it first")
        if geometry.inputs < 1 or isinstance(
            module._parameters.get("weight"), nn.UninitializedParameter
        ):
            raise ValueError(
                f"module={module}: its number of inputs is not known yet; run one batch through "
                "the network first"
            )
        self._follow_settings(module)
        module.register_forward_hook(self._note, with_kwargs=True)
        if parametrize.is_parametrized(module, "weight"):  # reading the weight may change it
            module.parametrizations["weight"].register_forward_hook(self._note_weight)  # type: ignore[index,union-attr]
        self.open_memory()
        return self

    def unbind(self, module: nn.Module) -> None:
        """Undo `bind`; what belongs to the layer is dropped."""
        release(module, self)
        self.geometry = None
        for name in self.per_step_state:
            self.method_state.pop(name, None)
        self._flow = BoundState()
        self.reset_memory()

    def _note(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        """After the bound layer's forward: keep what the next forward of this layer needs."""
        weight, self._flow.weight = self._flow.weight, None
        if not self.follows():
            return
        if in_backward():  # a recomputed forward finds its statistics
            return
        assert self.geometry is not None
        if self.geometry.kernel and self._settings != patches.settings_of(module):
            self._follow_settings(module)
        x = as_plain(first_input(args, kwargs))
        weight = as_plain(_weight_of(module) if weight is None else weight)
        bias: Tensor | None = module.bias  # type: ignore[assignment]
        rows = self.geometry.rows(weight.detach())
        bias = None if bias is None else as_plain(bias).detach()
        self._flow.feed = ConvCall(self.geometry, x.detach(), rows, bias, as_plain(output).detach())

    def _follow_settings(self, module: nn.Module) -> None:
        """Read how the bound layer moves over its input, as often as a network changes it."""
        self.geometry = patches.geometry_of(module)
        self._settings = patches.settings_of(module) if self.geometry.kernel else ()
        self._flow.key = None

    def _note_weight(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """After a parametrization's forward: the weight it made."""
        self._flow.weight = as_plain(output).detach()

    def lender(self: Self, x: Tensor) -> Callable[[Self, tuple[slice, ...], Tensor], None]:
        feed = None if self._flow.feed is None else self.take_feed(x)

        def lend(layer: Self, examples: tuple[slice, ...], part: Tensor) -> None:
            layer._flow.feed = feed and feed.at(*examples)._replace(output=part.detach())

        return lend

    def take_feed(self, y: Tensor) -> ConvCall:
        """Give the call of the bound layer that made ``y``; it is taken once."""
        feed, self._flow.feed = self._flow.feed, None
        if self.geometry is None:
            raise RuntimeError(
                f"{type(self).__name__} is bound to no layer: call .bind(conv) with the layer that "
                'feeds it, or use anybatch.convert(model, "cbn"), or order=0'
            )
        if feed is None:
            raise RuntimeError(
                f"{type(self).__name__}: the layer it is bound to has not run in training mode "
                "since this layer's last forward; both must run in turn"
            )
        if not is_traced() and feed.rows.untyped_storage().size() < feed.rows.nbytes:
            raise RuntimeError(
                f"{type(self).__name__}: the weight of the layer it is bound to has been given "
                "back before this forward; shard the block that holds both (fully_shard(block)), "
                "not each layer by itself"
            )
        dims = len(feed.geometry.kernel)
        itself = is_traced() or y.data_ptr() == feed.output.data_ptr()  # tracers have no pointers
        if y.shape != feed.output.shape or y.dim() != max(2 + dims, 2) or not itself:
            raise ValueError(
                f"input of shape {tuple(y.shape)}: {type(self).__name__} is bound to a layer whose "
                f"output has the shape {tuple(feed.output.shape)}; it must normalize that layer's "
                "latest output, itself and unchanged"
            )
        return feed


def release(module: nn.Module, layer: nn.Module) -> None:
    """Take away the hooks by which a layer follows a module."""
    followed = [module]
    if parametrize.is_parametrized(module, "weight"):
        followed.append(module.parametrizations["weight"])  # type: ignore[index,arg-type]
    for one in followed:
        for key, hook in list(one._forward_hooks.items()):
            if getattr(hook, "__self__", None) is layer:
                del one._forward_hooks[key]
                one._forward_hooks_with_kwargs.pop(key, None)


def _weight_of(module: nn.Module) -> Tensor:
    """The weights that a layer has just used."""
    if is_centralized(module):
        return centralized_weight(module)
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight
