"""The golden record: what every method computed before a change, and whether it still does.

    python -m tests.golden                        # check all cases, print what differs
    python -m tests.golden --only "numba: mabn*"  # those whose name matches
    python -m tests.golden --full base.pt         # write all tensors to a file, on the old code;
    python -m tests.golden --full base.pt         # then check against all their values
    python -m tests.golden --write                # record anew, where numbers are meant to change;
                                                  # with --only, these cases alone

`record.json` has, for each case (`cases.py`), a hash of its outputs, gradients and state, and a few
of their values. On the machine type of the record the hashes must be equal; a difference that is
meant stands in `allowances.json` with its size and its reason:

    {"numba: mabn*": {"ulps": 1, "why": "the sum of two squares is one fused multiply-add"}}

A difference is given in units in the last place of a tensor's largest value. On another processor
or with another version of torch, Numba or Triton, values are compared within a tolerance instead.

`checkpoints/` has state dicts of trained networks and layers, with what they must give when loaded.
"""

import argparse
import hashlib
import json
import math
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import anybatch
from golden import cases
from golden.cases import Results

HERE = Path(__file__).resolve().parent

RECORD = HERE / "record.json"
ALLOWANCES = HERE / "allowances.json"
CHECKPOINTS = HERE / "checkpoints"
# On another machine, as a share of a tensor's largest value. A network differs most where a ReLU
# lets a value pass or not by rounding; under autocast convolutions round to bfloat16.
CLOSE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 0.05}
CLOSE_IN_CASES = {"*, autocast": 0.05, "*, network*": 0.01}
SECTIONS = ("output", "gradients", "state")


class Allowance(NamedTuple):
    """A difference that is meant."""

    ulps: float
    why: str


def surroundings() -> dict[str, str]:
    """What the bits of a result may depend on beside the code."""
    found = {"python": platform.python_version().rpartition(".")[0], "torch": torch.__version__}
    for name in ("numba", "llvmlite", "triton", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    found["vectors"] = torch.backends.cpu.get_cpu_capability()
    found["processor"] = _processor()
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    family = [told.get(name, "").strip() for name in ("vendor_id", "cpu family", "model")]
    return " ".join([*family, hashlib.sha256(told.get("flags", "").encode()).hexdigest()[:8]])


# --- what is kept of a case ---------------------------------------------------------------------


def sections(results: Results) -> dict[str, dict[str, Tensor]]:
    """All tensors of a case by name."""
    lists = {"output": results.output, "gradients": results.gradients}
    found = {name: {str(i): t for i, t in enumerate(tensors)} for name, tensors in lists.items()}
    return {**found, "state": results.state}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, types, shapes and every bit."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def sample(tensor: Tensor, count: int) -> list[float]:
    """The largest magnitude of a tensor, and some of its values."""
    flat = tensor.detach().reshape(-1).double()
    if not flat.numel():
        return [0.0]
    places = torch.linspace(0, flat.numel() - 1, min(count, flat.numel())).long()
    finite = flat[flat.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return [float(f"{value:.9g}") for value in (scale, *flat[places].tolist())]


def kept(tensors: Mapping[str, Tensor], section: str) -> dict[str, list[float]]:
    """A few values of a section: the last output of training and of evaluation, all state."""
    names = list(tensors)
    if section == "output":
        names = names[-2:]
    elif section == "gradients":
        names = [names[0], *names[-3:]] if len(names) > 4 else names
    return {name: sample(tensors[name], 2 if section == "state" else 3) for name in names}


def entry(results: Results) -> dict[str, list[Any]]:
    """What the record keeps of a case."""
    return {
        name: [digest(tensors), kept(tensors, name)] for name, tensors in sections(results).items()
    }


# --- comparison -----------------------------------------------------------------------------------


def distance(value: float, expected: float, scale: float, dtype: torch.dtype) -> float:
    """How far a value is off, in units in the last place of the tensor's largest value."""
    if value == expected or (math.isnan(value) and math.isnan(expected)):
        return 0.0
    unit = torch.finfo(dtype).eps if dtype.is_floating_point else 1.0
    largest = 2.0 ** math.floor(math.log2(scale)) if scale else 1.0
    found = abs(value - expected) / (largest * unit)
    # Nine digits are less than a double: nearer than that is equal.
    found = 0.0 if dtype == torch.float64 and abs(value - expected) < 1e-8 * scale else found
    return math.inf if math.isnan(found) else found


def whole_distance(value: Tensor, expected: Tensor) -> float:
    """The largest distance of two tensors."""
    if value.shape != expected.shape or value.dtype != expected.dtype:
        return math.inf
    a, b = value.double(), expected.double()
    apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs()).nan_to_num(math.inf)
    largest = apart.max().item() if apart.numel() else 0.0
    if not largest:
        return 0.0
    scale = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
    unit = torch.finfo(value.dtype).eps if value.dtype.is_floating_point else 1.0
    return largest / (unit * (2.0 ** math.floor(math.log2(scale)) if scale else 1.0))


class Difference(NamedTuple):
    """A section of a case that differs from the record.

    Attributes:
        case: The case.
        section: output, gradients or state.
        ulps: The largest distance of the values that are known.
        allowed: Whether an allowance covers it.
        note: What else there is to say.
    """

    case: str
    section: str
    ulps: float
    allowed: bool
    note: str

    def __str__(self) -> str:
        mark = "allowed" if self.allowed else "DIFFERS"
        return f"{mark}  {self.case}: {self.section} by {self.ulps:.3g} ulp{self.note}"


def allowances() -> dict[str, Allowance]:
    """The differences that are meant, by pattern of case."""
    told = json.loads(ALLOWANCES.read_text())
    return {pattern: Allowance(float(one["ulps"]), one["why"]) for pattern, one in told.items()}


def compare(
    case: str,
    results: Results,
    record: Mapping[str, Any],
    same_machine: bool,
    allowed: Mapping[str, Allowance],
    full: Mapping[str, Any] | None = None,
) -> list[Difference]:
    """Where a case differs from the record.

    Args:
        case: Its name.
        results: What it gives now.
        record: All recorded cases.
        same_machine: Whether hashes must be equal; else values may differ by rounding.
        allowed: Differences that are meant.
        full: Whole tensors of the recorded cases, if there.
    """
    found = []
    limit = max((a.ulps for p, a in allowed.items() if fnmatchcase(case, p)), default=0.0)
    share = max((s for p, s in CLOSE_IN_CASES.items() if fnmatchcase(case, p)), default=0.0)
    for section, tensors in sections(results).items():
        expected, values = record[case][section]
        if digest(tensors) == expected:
            continue
        worst, note = 0.0, ""
        for name, (scale, *told) in values.items():
            if name not in tensors:
                worst, note = math.inf, f", {name} is missing"
                continue
            tensor = tensors[name]
            _, *now = sample(tensor, len(told))
            close = max(share, CLOSE.get(tensor.dtype, 0.0))
            slack = 0.0 if same_machine else close * scale
            for a, b in zip(now, told, strict=True):
                if not abs(a - b) <= slack:
                    worst = max(worst, distance(a, b, scale, tensor.dtype))
        if set(tensors) != set(values) and section == "state":
            worst, note = math.inf, f", state is {sorted(tensors)}"
        if full is not None and case in full:
            whole = full[case][section]
            for name in whole.keys() & tensors.keys():
                worst = max(worst, whole_distance(tensors[name], whole[name]))
        if not same_machine and worst == 0:
            continue
        twin = record.get(f"torch: {case.partition(': ')[2]}")
        if twin and case[:5] != "torch" and digest(tensors) == twin[section][0]:
            note += ", which is what the torch operators give: does the backend still serve it?"
        elif worst == 0:
            note += " in the values that are recorded, elsewhere more"
        found.append(
            Difference(case, section, worst, 0 < worst <= limit or bool(limit and worst == 0), note)
        )
    return found


# --- checkpoints ----------------------------------------------------------------------------------


def checkpoint_makers() -> dict[str, Callable[[], tuple[torch.nn.Module, Tensor]]]:
    """Models that have a checkpoint, by file name: an untrained one, and its input."""
    found: dict[str, Any] = {}
    x, image = cases.batch(77, (3, cases.CHANNELS, 4, 3)), cases.batch(77, (3, 3, 6, 6))
    for form in cases.NAMES:
        found[f"layer-{form}"] = lambda form=form: (cases.build(form), x)
        found[f"network-{form}"] = lambda form=form: (cases.converted(form), image)
    found["layer-outliers"] = lambda: (cases.build("bn", outlier_limit=3.0), x)
    found["layer-frozen"] = lambda: (anybatch.freeze(cases.build("mabn"), affine=True), x)
    found["layer-accumulating"] = lambda: (_accumulating(), x)
    found["layer-mabn-centered"] = lambda: (cases.build("mabn centered sma sma"), x)
    features = cases.batch(77, (3, 4, 4, 3))
    for form in cases.BOUND:
        found[f"layer-{form.replace(' ', '-')}"] = lambda form=form: (cases.build(form), features)
    return found


def _accumulating() -> torch.nn.Module:
    model = cases.build("mabn")
    anybatch.accumulate(model, 2)
    return model


def probe(model: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output in evaluation, then of one more step of training, and its gradient."""
    with cases.backend_choice("torch"):
        torch.manual_seed(0)
        with torch.no_grad():
            evaluated = model.eval()(x)
        training = cases.Training(model.train())
        training.step(x, 5)
        return {"eval": evaluated, "train": training.output[0], "gradient": training.gradients[0]}


def write_checkpoints() -> None:
    """Train every model for five steps, store its state and what it must give."""
    CHECKPOINTS.mkdir(exist_ok=True)
    for name, make in checkpoint_makers().items():
        torch.manual_seed(0)
        model, x = make()
        with cases.backend_choice("torch"):
            training = cases.Training(model, move=True)
            for number in range(5):
                training.step(cases.batch(number, (2, *x.shape[1:])), number)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        expected = probe(model, x)
        torch.save({"state": state, "expected": expected}, CHECKPOINTS / f"{name}.pt")


def check_checkpoint(name: str) -> list[str]:
    """What goes wrong where a checkpoint of the record is loaded."""
    kept = torch.load(CHECKPOINTS / f"{name}.pt", weights_only=True)
    model, x = checkpoint_makers()[name]()
    model.load_state_dict(kept["state"], strict=True)
    found = []
    for what, tensor in probe(model, x).items():
        expected = kept["expected"][what]
        if not torch.allclose(tensor, expected, rtol=1e-4, atol=1e-5):
            ulps = whole_distance(tensor, expected)
            found.append(f"DIFFERS  checkpoint {name}: {what} by {ulps:.3g} ulp")
    return found


# --- the command ----------------------------------------------------------------------------------


def everything(chosen: Callable[[str], bool]) -> Iterable[tuple[str, Results]]:
    """Run the chosen cases, those of two processes last."""
    for case, work in cases.cases().items():
        if chosen(case):
            yield case, cases.run(case, work)
    names = [f"{b}: {form}, process group" for b in ("torch", "numba") for form in cases.GROUPED]
    if any(chosen(name) for name in names):
        with tempfile.TemporaryDirectory() as folder:
            for case, results in cases.grouped_results(folder).items():
                if chosen(case):
                    yield case, results


def write(only: str, full: Path | None) -> None:
    """Record the cases that a pattern fits, or every case and all checkpoints."""
    told = json.loads(RECORD.read_text())
    if only != "*" and told["surroundings"] != surroundings():
        raise SystemExit("the record is of another machine or other versions: record all of it")
    found, tensors = told["cases"] if only != "*" else {}, {}
    for case, results in everything(lambda case: fnmatchcase(case, only)):
        found[case] = entry(results)
        tensors[case] = sections(results)
    lines = (f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in found.items())
    about, text = json.dumps(surroundings()), ",\n".join(lines)
    RECORD.write_text(f'{{"surroundings": {about},\n"cases": {{\n{text}\n}}}}\n')
    if full is not None:
        torch.save(tensors, full)
    if only == "*":
        write_checkpoints()
    print(f"{len(tensors)} cases recorded")


def check(
    chosen: Callable[[str], bool] = lambda case: True, full: Mapping[str, Any] | None = None
) -> tuple[list[Difference], int, bool]:
    """Compare cases with the record.

    Returns:
        The differences, the number of cases, and whether this is the machine of the record.
    """
    told = json.loads(RECORD.read_text())
    same_machine = told["surroundings"] == surroundings()
    record, allowed = told["cases"], allowances()
    found: list[Difference] = []
    seen = set()
    for case, results in everything(lambda case: case in record and chosen(case)):
        seen.add(case)
        found += compare(case, results, record, same_machine, allowed, full)
    for case in record.keys() - seen:
        if chosen(case):
            found.append(Difference(case, "case", math.inf, False, ", which is gone"))
    return found, len(seen), same_machine


def main() -> int:
    """Write the record or check against it; the exit status."""
    parser = argparse.ArgumentParser(
        "python -m tests.golden", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--write", action="store_true", help="record anew")
    parser.add_argument("--check", action="store_true", help="check (default)")
    parser.add_argument("--only", default="*", help="pattern of the cases")
    parser.add_argument("--full", type=Path, help="whole tensors: written if the file is not there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.write:
        write(given.only, given.full)
        return 0
    full = None
    if given.full is not None:
        if not given.full.exists():
            found = {case: sections(r) for case, r in everything(lambda case: True)}
            torch.save(found, given.full)
            print(f"{len(found)} cases written to {given.full}")
            return 0
        full = torch.load(given.full, weights_only=True)
    found, number, same_machine = check(lambda case: fnmatchcase(case, given.only), full)
    for one in found:
        print(one)
    wrong = [one for one in found if not one.allowed]
    failed = []
    if given.only == "*":
        failed = [line for name in checkpoint_makers() for line in check_checkpoint(name)]
        print("\n".join(failed))
    how = "bit for bit" if same_machine else "within a tolerance, as this is another machine"
    print(
        f"{number} cases compared {how}: {len({one.case for one in wrong})} differ, "
        f"{len({one.case for one in found}) - len({one.case for one in wrong})} within allowances; "
        f"{len(failed)} checkpoints differ"
    )
    return int(bool(wrong or failed))
