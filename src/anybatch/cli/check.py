"""``anybatch check``: whether compiled kernels agree with torch's operators on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from anybatch.cli.console import console, plain_errors, print_file, print_lines, print_path
from anybatch.cli.options import AsJson, Output, Rounds, complete_methods
from anybatch.cli.progress import progress_bars, show_parts
from anybatch.cli.settings import check_device, parse_names
from anybatch.core.arguments import check_count


@plain_errors()
def check(
    methods: Annotated[
        str | None,
        typer.Option(
            help="Short names, with commas. [dim]Default: all.[/]", autocompletion=complete_methods
        ),
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(help="cpu, cuda:0 ..., with commas. [dim]Default: all that are present.[/]"),
    ] = None,
    rounds: Rounds = 5,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Check the compiled kernels of every method, type and format on the devices present.

        anybatch check

    Each is compared with torch's operators, and timed beside nn.BatchNorm2d, unless --rounds is 0.
    The exit code is 1 if one disagrees. check.json has all results: attach it to a report of a
    fault.
    """
    from anybatch.tools import check as checks

    check_count("rounds", rounds, 0)
    names = checks.KEPT if methods is None else parse_names(methods)
    for name in names:
        if name not in checks.KEPT:
            raise ValueError(f"methods={name!r}: give one or more of {', '.join(checks.KEPT)}")
    places = None if devices is None else parse_names(devices)
    for place in places or ():
        check_device(place)
        if place.partition(":")[0] not in checks.SIDES:
            raise ValueError(f"devices={place!r}: give cpu, cuda or cuda:N, with commas")
    with progress_bars(as_json) as bars:
        rows = checks.check(names, places, rounds, show_parts(bars))
    path = checks.write(rows, Path(output or "runs/check"))
    faults = [row for row in rows if row.fault is not None]
    if as_json:
        print_file(path)
    else:
        console.print(checks.check_table(rows))
        for row in faults:
            case = f"{row.device}, {row.method}, {row.precision}, {row.format}"
            print_lines([f"{case}: {row.fault}"])
        print_path("report", path)
    if faults:
        raise typer.Exit(1)
