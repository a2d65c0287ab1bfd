"""``anybatch tune``: find the best example weight of a trained network."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anybatch.cli.console import console, plain_errors, typed_command
from anybatch.cli.options import (
    AsJson,
    Config,
    Device,
    Model,
    Options,
    Output,
    Root,
    TunedData,
    complete_method,
    complete_metric,
)
from anybatch.cli.settings import check_device, read_settings

if TYPE_CHECKING:
    from anybatch.tools.run import Run
    from anybatch.tools.training import Row


@plain_errors()
def tune(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(help="Of anybatch train, or a file with a state_dict.")
    ],
    data: TunedData = None,
    root: Root = None,
    model: Model = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Short name of the method, or torch for torch's batch norm. "
            "[dim]Default: the checkpoint's, or torch.[/]",
            autocompletion=complete_method,
        ),
    ] = None,
    metric: Annotated[
        str, typer.Option(help="loss, top1 or top5.", autocompletion=complete_metric)
    ] = "loss",
    candidates: Annotated[
        str | None, typer.Option(help="Example weights with commas. [dim]Default: 16 of them.[/]")
    ] = None,
    recalibrate: Annotated[
        bool, typer.Option(help="Take running statistics from the training examples first.")
    ] = False,
    device: Device = "cpu",
    option: Options = None,
    config: Config = None,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Find the example weight with which a trained network does best.

    Tuned on one half of the held-out examples, reported on the other:

        anybatch tune runs/train-digits/runs/*.pt

    A checkpoint of your own, of one of the networks here:

        anybatch tune weights.pt --data cifar10 --root data/cifar10 --model resnet18
    """
    from anybatch.core.arguments import check_choice
    from anybatch.evaluation.example_weight_search import METRICS
    from anybatch.tools import tune as tuning
    from anybatch.tools.config import parse_options
    from anybatch.tools.report_files import output_folder

    given = read_settings(context, config)
    check_choice("metric", given["metric"], METRICS)
    check_device(given["device"])
    stored, state = tuning.read_checkpoint(checkpoint)
    options = parse_options(given["option"] or [])
    method = None if given["method"] is None else given["method"].lower()
    network = {**{name: given[name] for name in ("data", "root", "model")}, "method": method}
    typed = {name: value for name, value in network.items() if value is not None}
    run = _tuned_run(stored, typed, given["device"])
    if options:
        wrong = ", ".join(sorted(set(options) - {run.method}))
        if wrong:
            raise ValueError(f"option={wrong}: the network's method is {run.method!r}")
        run = run.but(options=options[run.method])
    folder = output_folder(Path(given["output"] or f"runs/tune-{run.data_name}"))
    shown = False if given["as_json"] else None
    weights = None if given["candidates"] is None else _parse_weights(str(given["candidates"]))
    outcome = tuning.tune(
        run,
        checkpoint,
        state,
        given["metric"],
        weights,
        given["recalibrate"],
        shown,
        typed_command(),
    )
    page = tuning.write(outcome, folder)
    if given["as_json"]:
        print((folder / "tune.json").read_text(encoding="utf-8"), end="")
        return
    print(f"{outcome.tuned}\n")
    console.print(tuning.judged_table(outcome))
    console.print(f"report  {page.resolve()}", soft_wrap=True, highlight=False)


def _tuned_run(stored: "Row | None", given: dict[str, Any], device: str) -> "Run":
    """Return the run of a checkpoint, with the settings that were typed."""
    from anybatch.tools.run import BASELINE, Run

    if stored is not None:
        try:
            run = Run.from_dict(stored)
        except (TypeError, ValueError) as error:
            raise ValueError(f"checkpoint: its run is not one of this version ({error})") from error
        if given.get("method", run.method) != run.method:
            run = run.but(options=())
        return run.but(**given, device=device, precision="float32")
    data = given.get("data", "digits")
    usual = {"model": "mlp" if data == "digits" else "resnet8", "method": BASELINE}
    return Run(**{**usual, **given, "device": device})


def _parse_weights(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"candidates={text!r}: give numbers with commas, as in 0,0.1") from error
