"""Finding the norms that can compute the ReLU, or the addition and the ReLU, that follow them.

Each block, a module whose own forward calls norms, is traced alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from anybatch.conversion.norm_types import is_norm
from anybatch.conversion.relu_fusion.block_trace import (
    Unsound,
    check_class,
    code_of,
    is_list,
    is_passed_over,
    trace_block,
)
from anybatch.conversion.relu_fusion.fused_block import Fusion
from anybatch.conversion.relu_fusion.rewrite import LAST_IN_BLOCK, GraphWriter


@dataclass
class Found:
    """The fusions of a network, and the reasons why norms are not fused.

    Args:
        blocks: the blocks to fuse, with what they are to run.
        fused: what each norm does, once for each of its calls that is fused.
        obstacles: why calls of a norm are not fused.
    """

    blocks: dict[nn.Module, Fusion] = field(default_factory=dict)
    fused: dict[nn.Module, list[str]] = field(default_factory=dict)
    obstacles: dict[nn.Module, list[str]] = field(default_factory=dict)

    def of(self, norm: nn.Module) -> tuple[str | None, str]:
        """A norm's fusion, or None, with a sentence about it."""
        done = list(dict.fromkeys(self.fused.get(norm, [])))
        if done:
            return " / ".join(done), f"fused with {' / '.join(done)}"
        reasons = list(dict.fromkeys(self.obstacles.get(norm, [])))
        if len(reasons) > 1:  # a chain that ends in it is called by a block that says more
            reasons = [reason for reason in reasons if reason != LAST_IN_BLOCK]
        return None, f"not fused: {'; '.join(reasons) or 'no block that calls it was found'}"


def find_fusions(model: nn.Module, norms: Iterable[nn.Module]) -> Found:
    """Find what norms can do in their own pass; the model is left as it was.

    `norms` are those that are layers of anybatch, or will be.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        >>> find_fusions(model, [model[1]]).of(model[1])
        ('relu', 'fused with relu')
    """
    wanted, found = set(norms), Found()
    names = {module: name for name, module in model.named_modules()}
    for block in list(names):
        reached = [part for module in _callers(block) for part in module._modules.values()]
        called = [part for part in reached if part in wanted]
        if not called or is_norm(block) or is_list(block):
            continue
        try:
            fusion, stay = _fusion_of(block, wanted)
        except Unsound as error:
            where = names[block] or type(block).__name__
            for norm in called:
                found.obstacles.setdefault(norm, []).append(f"the forward of {where!r} {error}")
            continue
        for norm, reason in stay:
            found.obstacles.setdefault(norm, []).append(reason)
        if fusion is not None:
            found.blocks[block] = fusion
            for name, what in fusion.fused.items():
                found.fused.setdefault(block.get_submodule(name), []).append(what)
    return found


def _callers(block: nn.Module) -> Iterator[nn.Module]:
    """A block and what it passes over: the modules whose parts its forward calls."""
    yield block
    for part in block._modules.values():
        if part is not None and (is_passed_over(part) or is_list(part)):
            yield from _callers(part)


def _fusion_of(
    block: nn.Module, wanted: set[nn.Module]
) -> tuple[Fusion | None, list[tuple[nn.Module, str]]]:
    """The fusion of a block, or None, with the reasons why norms in it stay as they are."""
    check_class(block)
    graph, inputs = trace_block(block)
    writer = GraphWriter(graph, dict(block.named_modules(remove_duplicate=False)), wanted)
    writer.rewrite()
    if not writer.fused:
        return None, writer.stay
    source, names = code_of(graph)
    callers = list(_callers(block))
    parts = tuple((module, dict(module._modules)) for module in callers)
    over = [module for module in callers[1:] if not is_list(module)]
    passed = tuple(dict.fromkeys([*writer.passed, *over]))
    return Fusion(source, names, inputs, parts, passed, writer.fused), writer.stay
