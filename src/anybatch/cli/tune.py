"""``anybatch tune``: find the best example weight of a trained network."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anybatch.cli import options
from anybatch.cli.console import console, plain_errors, print_file, print_path, typed_command
from anybatch.cli.settings import (
    check_device,
    method_options,
    parse_numbers,
    read_settings,
    results_folder,
    usual_model,
)

if TYPE_CHECKING:
    from anybatch.tools.run import Run
    from anybatch.tools.training import Row


@plain_errors()
def tune(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(help="Of anybatch train, or a file with a state_dict.")
    ],
    data: options.TunedData = None,
    root: options.Root = None,
    model: options.Model = None,
    method: options.TunedMethod = None,
    metric: Annotated[
        str, typer.Option(help="loss, top1 or top5.", autocompletion=options.complete_metric)
    ] = "loss",
    candidates: Annotated[
        str | None, typer.Option(help="Example weights with commas. [dim]Default: 16 of them.[/]")
    ] = None,
    recalibrate: Annotated[
        bool, typer.Option(help="Take running statistics from the training examples first.")
    ] = False,
    device: options.Device = "cpu",
    option: options.Options = None,
    config: options.Config = None,
    output: options.Output = None,
    as_json: options.AsJson = False,
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
    from anybatch.tools.checkpoint import read_checkpoint

    given = read_settings(context, config)
    check_choice("metric", given["metric"], METRICS)
    check_device(given["device"])
    stored, state = read_checkpoint(checkpoint)
    method = None if given["method"] is None else given["method"].lower()
    network = {**{name: given[name] for name in ("data", "root", "model")}, "method": method}
    typed = {name: value for name, value in network.items() if value is not None}
    run = _tuned_run(stored, typed, given["device"])
    if given["option"]:
        run = run.but(options=method_options(given, run.method, "the network's method"))
    folder = results_folder(given, f"tune-{run.data_name}")
    shown = False if given["as_json"] else None
    weights = given["candidates"]
    if weights is not None:
        weights = parse_numbers("candidates", str(weights), float, "0,0.1")
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
        print_file(folder / "tune.json")
        return
    print(f"{outcome.tuned}\n")
    console.print(tuning.judged_table(outcome))
    print_path("report", page)


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
    usual = {"model": usual_model(data), "method": BASELINE}
    return Run(**{**usual, **given, "device": device})
