"""The cases of the golden record: every method on every backend, in every situation of training.

A case is a method, a backend and a situation. It trains a layer for a few steps on fixed inputs
and gives all outputs, all gradients and the state at the end. Only public names of anybatch are
used, so that a change inside the package cannot change what a case is.
"""

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anybatch
from anybatch import METHODS
from anybatch.backends import use_fused
from interpreter import cpu_batches_take_gpu_kernels
from processes import spawn

CHANNELS = 6
STEPS = 8

# Short windows and warm-ups, so that eight steps cross every boundary.
MABN = {"window": 3, "warmup_steps": 4, "renorm_warmup_steps": 6, "clip": 1.3, "momentum": 0.1}
QUICK: dict[str, dict[str, Any]] = {
    "sync": {"process_group": "world"},
    "mbn": {"batch_size": 4, "ideal_batch_size": 20},
    "mabn": MABN,
    "brn": {"warmup_steps": 3, "max_r": 1.2, "max_d": 0.3},
    "cbn": {"window": 3, "order": 0, "burn_in": 0.0},
    "ghost": {"ghost_size": 2},
    "bgn": {"num_groups": 3},
    "ns": {"ratio": 0.5},
    "bs": {"ratio": 0.5, "seed": 0},
    "fs": {"ratio": 0.5, "seed": 0},
    "points": {"ratio": 0.5, "seed": 0},
    "vdn": {"num_virtual": 1},
    "fs+vdn": {"num_virtual": 1, "ratio": 0.5, "seed": 0},
    "bs+vdn": {"num_virtual": 1, "ratio": 0.5, "seed": 0},
}
NAMES = [name for name, method in METHODS.items() if method.builder is None and name != "sync"]
RULED = ["bn", "mbn", "mabn", "brn", "ghost", "bgn"]  # methods with GPU kernels and operators
POOLED = [name for name in NAMES if name not in ("l1", "range")]

# Further forms of a method: its name and its options.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "bn cumulative": ("bn", {"momentum": None}),
    "mbn cumulative": ("mbn", {"momentum": None}),
    "mbn batch size read": ("mbn", {"batch_size": None}),
    "brn smooth": ("brn", {"smooth": True}),
    "brn cumulative": ("brn", {"momentum": None}),
    "mabn cumulative": ("mabn", {"momentum": None}),
    "mabn long window": ("mabn", {"window": 5, "warmup_steps": 2}),
    "mabn long warm-up": ("mabn", {"warmup_steps": 6, "renorm_warmup_steps": 3}),
    "ghost 3": ("ghost", {"ghost_size": 3}),
    "bgn examples": ("bgn", {"num_groups": 2, "examples_per_group": 3}),
    "ns size": ("ns", {"ratio": 1 / 32, "size": 2}),
    "fs size": ("fs", {"ratio": 1 / 32, "size": 2}),
    "points size": ("points", {"ratio": 1 / 32, "size": 3}),
    "bn no state": ("bn", {"track_running_stats": False}),
    "bn not affine": ("bn", {"affine": False}),
    **{
        f"mabn {'centered ' * centered}{forward} {backward}": (
            "mabn",
            {"centered": centered, "forward_stats": forward, "backward_stats": backward},
        )
        for centered, forward, backward in itertools.product(
            (False, True), *(("ema", "sma", "batch"),) * 2
        )
    },
}
BOUND: dict[str, dict[str, Any]] = {
    "cbn order 1": {"order": 1},
    "cbn order 2": {"order": 2},
    "cbn window": {"order": 1, "backward_stats": "window", "running_stats": "window"},
}


class Results(NamedTuple):
    """Everything that a case computes.

    Attributes:
        output: Output of each step, then of evaluation.
        gradients: Gradients of the input of each step, then of the parameters after the last.
        state: The state at the end.
    """

    output: list[Tensor]
    gradients: list[Tensor]
    state: dict[str, Tensor]


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal random numbers that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def batch(step: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs whose channels differ in mean and spread, and drift."""
    x = numbers(*shape, seed=step, dtype=torch.float64)
    channel = torch.arange(shape[1], dtype=torch.float64).view(1, -1, *(1,) * (len(shape) - 2))
    return (x * (1 + 0.02 * step + 0.2 * channel) + 0.3 * channel - 0.02 * step).to(dtype)


def last(x: Tensor) -> Tensor:
    """A tensor with its channels innermost in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def build(form: str, *, dims: int = 2, **options: Any) -> nn.Module:
    """A layer with given scale and shift, its schedule in the middle; bound to a convolution."""
    if form in BOUND:
        conv = nn.Conv2d(4, CHANNELS, 2, padding=1)
        norm = METHODS["cbn"].build(
            CHANNELS, 2, **{"window": 3, "gradient_sample": None, **BOUND[form], **options}
        )
        network = nn.Sequential(conv, norm.bind(conv))
    else:
        name, own = FORMS.get(form, (form, {}))
        norm = METHODS[name].build(CHANNELS, dims, **{**QUICK.get(name, {}), **own, **options})
        network = nn.Sequential(norm)
    with torch.no_grad():
        for number, p in enumerate(network.parameters()):
            p.copy_(numbers(*p.shape, seed=90 + number, dtype=p.dtype) * 0.3)
        if norm.weight is not None:
            norm.weight.add_(1.0)
    norm.set_progress(2, 3)
    return network.train()


class Training:
    """A layer in training: collects what its steps give.

    Args:
        network: The layer, in a `Sequential`.
        run: How it is called (default: as it is).
        move: Whether parameters move between steps.
    """

    def __init__(
        self, network: nn.Module, run: Callable[..., Tensor] | None = None, move: bool = False
    ) -> None:
        self.network, self.run, self.move = network, run or network, move
        self.output: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def step(self, x: Tensor, seed: int, run: Callable[..., Tensor] | None = None) -> None:
        """One forward and backward with a random gradient of the output."""
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        self.network.zero_grad()
        y = (run or self.run)(x)
        dy = numbers(*y.shape, seed=1000 + seed, dtype=y.dtype)
        y.backward(dy if y.is_contiguous() or y.dim() < 3 else last(dy))
        self.output.append(y.detach())
        if x.grad is not None:
            self.gradients.append(x.grad)
        if self.move:
            with torch.no_grad():
                for p in self.network.parameters():
                    if p.grad is not None:
                        p.sub_(p.grad, alpha=0.02)

    def results(self, x: Tensor | None = None) -> Results:
        """What the case gives; `x` is evaluated at the end."""
        own = [p.grad.clone() for p in self.network.parameters() if p.grad is not None]
        state = copy.deepcopy(dict(self.network.state_dict()))
        if x is not None:
            self.network.eval()
            with torch.no_grad():
                self.output.append(self.network(x))
        return Results(self.output, [*self.gradients, *own], state)


def usual(form: str, shape: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The shape of a batch of four, of the convolution's input where there is one."""
    return shape or ((4, 4, 4, 3) if form in BOUND else (4, CHANNELS, 4, 3))


# --- situations -------------------------------------------------------------------------------


def plain(
    form: str,
    wrap: Callable[[nn.Module], Any] = lambda network: network,
    *,
    shape: tuple[int, ...] | None = None,
    sizes: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    form_of_memory: Callable[[Tensor], Tensor] = lambda x: x,
    steps: int = STEPS,
    spike: int | None = None,
    **options: Any,
) -> Results:
    """Some steps of training, then an evaluation."""
    shape = usual(form, shape)
    if dtype == torch.float64:
        options["dtype"] = dtype
    network = build(form, dims=max(len(shape) - 2, 1), **options)
    training = Training(network, wrap(network), form in BOUND)
    for number in range(steps):
        examples = sizes[number % len(sizes)] if sizes else shape[0]
        x = form_of_memory(batch(number, (examples, *shape[1:]), dtype))
        if number == spike:
            x[:, 1] *= 100
        training.step(x, number)
    return training.results(form_of_memory(batch(77, (3, *shape[1:]), dtype)))


def masked(form: str, wrap: Callable[[nn.Module], Any] = lambda network: network) -> Results:
    """Steps with a mask that differs from step to step, one of them with an empty example."""
    network = build(form)
    run = wrap(network[0])
    training = Training(network)
    for number in range(STEPS):
        x = batch(number, usual(form))
        mask = numbers(x.shape[0], *x.shape[2:], seed=500 + number) > -0.5
        if number == 2:
            mask[1] = False
        training.step(x, number, partial(run, mask=mask))
    return training.results(batch(77, usual(form)))


def accumulated(form: str, wrap: Callable[[nn.Module], Any] = lambda network: network) -> Results:
    """Two micro-batches of different size make a step."""
    network = build(form)
    anybatch.accumulate(network, 2)
    training = Training(network, wrap(network), form in BOUND)
    shape = usual(form)
    for number in range(2 * STEPS):
        training.step(batch(number, (2 + number % 2, *shape[1:])), number)
    return training.results(batch(77, shape))


def checkpointed(form: str, *, reentrant: bool) -> Results:
    """Forwards that are computed again in backward."""
    network = build(form)
    run = partial(checkpoint, network, use_reentrant=reentrant)
    training = Training(network, run, form in BOUND)
    for number in range(STEPS):
        training.step(batch(number, usual(form)), number)
    return training.results(batch(77, usual(form)))


def weighed(form: str) -> Results:
    """Inference example weighing of a trained layer."""
    network = build(form)
    training = Training(network)
    for number in range(4):
        training.step(batch(number, usual(form)), number)
    for alpha in (0.3, 1.0):
        network[-1].example_weight = alpha
        training.results(batch(70, usual(form)))
        training.results(last(batch(71, usual(form))))
        network.train()
    return training.results(batch(77, (3, CHANNELS, 4, 3)))


def frozen(form: str, wrap: Callable[[nn.Module], Any] = lambda network: network) -> Results:
    """Steps before, while and after statistics are frozen, and one that must not count."""
    network = build(form)
    training = Training(network, wrap(network), form in BOUND)
    for number in range(8):
        if number == 3:
            anybatch.freeze(network)
        if number == 5:
            anybatch.thaw(network)
        with anybatch.no_update() if number == 6 else nullcontext():
            training.step(batch(number, usual(form)), number)
    return training.results(batch(77, usual(form)))


def activated(form: str, wrap: Callable[[nn.Module], Any] = lambda network: network) -> Results:
    """The norm does the addition and the ReLU that follow it."""
    network = build(form)
    run = wrap(network[0])
    training = Training(network)
    for number in range(STEPS):
        x = batch(number, usual(form))
        residual = batch(number + 30, usual(form)) if number % 2 else None
        training.step(x, number, partial(run, residual=residual, activation="relu"))
    return training.results(batch(77, usual(form)))


class Block(nn.Module):
    """A residual block with two norms."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


def converted(method: str, fuse: bool = False, **options: Any) -> nn.Module:
    """A small network of a method, as `convert` writes it."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Block(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    with torch.no_grad():
        for number, p in enumerate(network.parameters()):
            if p.dim() > 1:
                p.copy_(numbers(*p.shape, seed=90 + number) * (2 / p[0].numel()) ** 0.5)
    # The record is older than a faster start of running statistics.
    options = {**dict.fromkeys(METHODS[method].at_start, 0), **options}
    # `example_inputs` trains nothing; without virtual examples the batch is the network's own.
    network = anybatch.convert(
        network, method, batch_size=4, example_inputs=torch.zeros(4, 3, 6, 6), fuse=fuse, **options
    )
    if METHODS[method].wraps:
        network = anybatch.VirtualDataset(network, [0.1, 0.2, 0.3], [1.0, 1.1, 0.9])
    return network.train()


def network(form: str, fuse: bool = False) -> Results:
    """A converted network in training by SGD, then evaluated, written back as BN and folded."""
    own = {"mabn": {"window": 3, "warmup_steps": 2, "renorm_warmup_steps": 4}}
    own["cbn"] = {"window": 3, "burn_in": 0.0}
    own["brn"] = {"warmup_steps": 2}
    model = converted(form, fuse, **own.get(form, {}))
    schedule = anybatch.NormScheduler(model, 3)
    optimizer = torch.optim.SGD(
        anybatch.param_groups(model, 0.01) if form == "bn" else model.parameters(), 0.05, 0.9
    )
    output = []
    for number in range(6):
        torch.manual_seed(number)  # virtual examples are drawn from it
        y = model(batch(number, (4, 3, 6, 6)))
        optimizer.zero_grad()
        y.backward(numbers(*y.shape, seed=1000 + number))
        optimizer.step()
        output.append(y.detach())
        if number % 2:
            schedule.step()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    state = copy.deepcopy(dict(model.state_dict()))
    model.eval()
    x = batch(77, (3, 3, 6, 6))
    with torch.no_grad():
        output.append(model(x))
        if METHODS[form].folds:
            output.append(anybatch.to_batchnorm(copy.deepcopy(model))(x))
            output.append(anybatch.fold(copy.deepcopy(model))(x))
        anybatch.recalibrate(model, [batch(60 + i, (4, 3, 6, 6)) for i in range(3)])
        output.append(model.eval()(x))
    return Results(output, gradients, state)


# --- backends ---------------------------------------------------------------------------------


@contextmanager
def backend_choice(backend: str) -> Iterator[None]:
    """Batches go through one backend."""
    use_fused({"torch": "never", "compile": "always"}.get(backend, "auto"))
    try:
        with cpu_batches_take_gpu_kernels() if backend == "triton" else nullcontext():
            yield
    finally:
        use_fused("auto")


def _autocast(module: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = module(x)
        return y

    return run


def _compiled(module: nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(module, backend="aot_eager", dynamic=False)


def eager_cases() -> dict[str, Callable[[], Results]]:
    """Cases of the torch operators, and of Numba's loops."""
    bound, layers = [*NAMES, *BOUND], NAMES
    found: dict[str, Callable[[], Results]] = {}

    def add(situation: str, forms: list[str], work: Any, *wrap: Any, **told: Any) -> None:
        for form in forms:
            found[f"{form}, {situation}"] = partial(work, form, *wrap, **told)

    add("plain", [*bound, *FORMS], plain)
    add("sizes", bound, plain, sizes=(3, 5, 4, 2))
    add("one example", layers, plain, sizes=(2, 1))
    add("channels last", bound, plain, form_of_memory=last)
    add("rows", layers, plain, shape=(6, CHANNELS))
    add("volumes", layers, plain, shape=(3, CHANNELS, 2, 2, 3))
    add("float64", layers, plain, dtype=torch.float64)
    add("bfloat16", layers, plain, dtype=torch.bfloat16)
    add("autocast", [*BOUND, "bn", "mabn"], plain, _autocast)
    add("large", layers, plain, shape=(8, CHANNELS, 40, 40), steps=3)
    add(
        "large channels last",
        layers,
        plain,
        shape=(8, CHANNELS, 40, 40),
        form_of_memory=last,
        steps=3,
    )
    add("norm batch size", layers, plain, sizes=(5, 4, 6), norm_batch_size=2)
    add("outlier limit", layers, plain, spike=5, outlier_limit=3.0)
    add("mask", layers, masked)
    add("accumulation", [name for name in bound if name in POOLED or name in BOUND], accumulated)
    add("checkpointing", bound, checkpointed, reentrant=False)
    add("reentrant checkpointing", layers, checkpointed, reentrant=True)
    add("example weight", layers, weighed)
    add("frozen", bound, frozen)
    add("relu", layers, activated)
    add("network", list(METHODS), network)
    add("network fused", list(METHODS), network, fuse=True)
    return found


def interpreted_cases() -> dict[str, Callable[[], Results]]:
    """Cases of Triton's interpreter, which is slow."""
    found: dict[str, Callable[[], Results]] = {}
    for form in RULED:
        steps = STEPS if form in ("mabn", "brn") else 3
        found[f"{form}, plain"] = partial(plain, form, steps=steps)
        found[f"{form}, channels last"] = partial(plain, form, form_of_memory=last, steps=3)
        found[f"{form}, rows"] = partial(plain, form, shape=(6, CHANNELS), steps=2)
        found[f"{form}, bfloat16"] = partial(plain, form, dtype=torch.bfloat16, steps=2)
        found[f"{form}, norm batch size"] = partial(
            plain, form, sizes=(5, 4), steps=2, norm_batch_size=2
        )
        found[f"{form}, outlier limit"] = partial(plain, form, steps=3, spike=1, outlier_limit=3.0)
    for form in FORMS:
        if form.startswith(("mabn", "brn smooth", "bgn")) and "centered" not in form:
            found[f"{form}, plain"] = partial(plain, form, steps=STEPS)
    found["mabn, frozen"] = partial(frozen, "mabn")
    found["mabn, checkpointing"] = partial(checkpointed, "mabn", reentrant=False)
    found["mabn, accumulation"] = partial(accumulated, "mabn")
    found["mabn, mask"] = partial(masked, "mabn")
    return found


def compiled_cases() -> dict[str, Callable[[], Results]]:
    """Cases of the operators under `torch.compile`."""
    found: dict[str, Callable[[], Results]] = {}
    for form in [*RULED, "brn smooth", "bs", "fs", "l1", "range"]:
        found[f"{form}, plain"] = partial(plain, form, _compiled)
    for form in RULED:
        found[f"{form}, channels last"] = partial(plain, form, _compiled, form_of_memory=last)
        found[f"{form}, bfloat16"] = partial(plain, form, _compiled, dtype=torch.bfloat16)
        found[f"{form}, norm batch size"] = partial(
            plain, form, _compiled, shape=(5, CHANNELS, 4, 3), norm_batch_size=2
        )
    for form in ("bn", "mabn"):
        found[f"{form}, mask"] = partial(masked, form, _compiled)
        found[f"{form}, frozen"] = partial(frozen, form, _compiled)
        found[f"{form}, relu"] = partial(activated, form, _compiled)
    return found


# --- processes --------------------------------------------------------------------------------


def synchronized(form: str, rank: int) -> Results:
    """Two processes with batches of different size normalize by the statistics of both."""
    options = {} if form == "sync" else {"process_group": "world"}
    network = build(form, **options)
    training = Training(network, move=form in BOUND)
    shape = usual(form)
    for number in range(STEPS):
        examples = 3 - rank if number % 3 else 2
        x = batch(10 * number + rank, (examples, *shape[1:]))
        run = None
        if number == 5 and form not in BOUND:
            mask = numbers(x.shape[0], *x.shape[2:], seed=500 + number + rank) > -0.5
            run = partial(network[0], mask=mask)
        training.step(x, 10 * number + rank, run)
    return training.results(batch(77, shape))


GROUPED = [*NAMES, "sync", "cbn order 1"]


def _work(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for backend in ("torch", "numba"):
        with backend_choice(backend):
            for form in GROUPED:
                case = f"{backend}: {form}, process group"
                try:
                    found[case] = tuple(synchronized(form, rank))
                except (ValueError, TypeError) as error:
                    found[case] = str(error)
                dist.barrier()
    torch.save(found, f"{folder}/{rank}.pt")


def grouped_results(folder: str) -> dict[str, Results]:
    """The cases of two processes; the results of both, one after the other."""
    spawn(_work, folder)
    ranks = [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in (0, 1)]
    found = {}
    for case in ranks[0]:
        if isinstance(ranks[0][case], str):
            continue
        first, second = (Results(*rank[case]) for rank in ranks)
        state = {
            f"{rank}.{k}": v for rank in (0, 1) for k, v in (first, second)[rank].state.items()
        }
        found[case] = Results(
            first.output + second.output, first.gradients + second.gradients, state
        )
    return found


def cases() -> dict[str, Callable[[], Results]]:
    """Every case of one process, by name: ``backend: form, situation``."""
    found = {}
    for backends, make in (
        (("torch", "numba"), eager_cases),
        (("triton",), interpreted_cases),
        (("compile",), compiled_cases),
    ):
        for backend in backends:
            found |= {f"{backend}: {name}": work for name, work in make().items()}
    return found


def run(case: str, work: Callable[[], Results]) -> Results:
    """What a case gives on its backend."""
    torch.manual_seed(0)
    with backend_choice(case.partition(":")[0]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return work()
