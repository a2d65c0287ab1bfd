"""Write the tables of the networks that conversion is tested with into docs/results/networks.md.

python docs/results/networks.py
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from zoo import (  # noqa: E402
    monai_networks,
    smp_networks,
    timm_networks,
    torchvision_networks,
    transformers_networks,
)
from zoo.listing import Listed  # noqa: E402

PAGE = Path(__file__).with_name("networks.md")
TABLES = {
    "monai": monai_networks,
    "transformers": transformers_networks,
    "torchvision": torchvision_networks,
    "timm": timm_networks,
    "smp": smp_networks,
}


def takes(value: Any) -> str:
    """The shapes of what a network takes."""
    if isinstance(value, Tensor):
        size = f"({', '.join(map(str, value.shape))})"
        return size if value.is_floating_point() else f"{size} {_kind(value)}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {takes(item)}" for name, item in value.items())
    if isinstance(value, list) and value:
        return f"{len(value)} of {takes(value[0])}"
    return ", ".join(map(takes, value))


def _kind(value: Tensor) -> str:
    return "yes or no" if value.dtype == torch.bool else "integers"


def methods(network: Listed) -> str:
    """Which methods it is tried with, and why not with the others."""
    why: dict[str, list[str]] = {}
    for name, reason in network.skipped.items():
        why.setdefault(reason, []).append(name)
    if not why:
        return "all"
    if len(network.skipped) > len(network.methods):
        tried = ", ".join(f"`{name}`" for name in network.methods)
        return f"{tried}; {'; '.join(why)}"
    parts = [f"{', '.join(f'`{n}`' for n in names)}: {reason}" for reason, names in why.items()]
    return f"all but {'; '.join(parts)}"


def table(networks: Mapping[str, Listed]) -> str:
    """A row a network."""
    rows = ["| network | what is built | what it takes | methods |", "|---|---|---|---|"]
    for name, network in networks.items():
        first, *_ = network.build.arguments or ("",)
        made = f"{network.build.name}({first!r})" if isinstance(first, str) else network.build.name
        made = made.removesuffix("('')")
        size = takes(network.inputs(network.batch))
        rows.append(f"| {name} | `{made}` | {size} | {methods(network)} |")
    return "\n".join(rows)


def left_out(reasons: Mapping[str, str]) -> str:
    """What is not tried, by reason."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    rows = ["| left out | why |", "|---|---|"]
    rows += [f"| {', '.join(f'`{n}`' for n in who)} | {reason} |" for reason, who in names.items()]
    return "\n".join(rows)


def filled(page: str) -> str:
    """The page with every table as the lists are now."""
    for key, lists in TABLES.items():
        start, end = f"<!-- {key}:start -->\n", f"<!-- {key}:end -->"
        before, _, rest = page.partition(start)
        _, _, after = rest.partition(end)
        text = table(lists.NETWORKS)
        if hasattr(lists, "LEFT_OUT"):
            text += "\n\n" + left_out(lists.LEFT_OUT)
        count = f"{len(lists.NETWORKS)} networks.\n\n"
        page = f"{before}{start}\n{count}{text}\n\n{end}{after}"
    return page


def main() -> None:
    """Write the page."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
