"""The cost of each method in a network: time of a training step, memory, inference."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, FunctionType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from anybatch.conversion import NoEffectWarning, convert
from anybatch.conversion.norm_types import is_batch_norm
from anybatch.core.arguments import check_choice, check_count
from anybatch.core.norm_layer import NormLayer
from anybatch.layers import VirtualDataset
from anybatch.registry import get_method
from anybatch.schedule import NormScheduler
from anybatch.tools.measurements import Measurement, Setting, counted, timed
from anybatch.tools.memory import kept_bytes, peak_bytes, tensors_of
from anybatch.tools.network_factory import Factory
from anybatch.tools.networks import CHANNELS_LAST, set_channels_last
from anybatch.tools.precision import autocast
from anybatch.tools.run import BASELINE, PRECISIONS, Option
from anybatch.tools.timing import Call, graphed, interleaved

MODES = ("eager", "compiled", "graph")
Show = Callable[[str, int, int], None]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Bench:
    """The settings of a measurement.

    Attributes:
        name: Of the network, for the rows.
        factory: Makes it.
        inputs: Shapes of what it takes, the batch first.
        batch_size: In the place of the first size of each input; None for the inputs' own.
        device: Where.
        precision: "float32"; "bfloat16" or "float16" by autocast.
        channels_last: Weights and inputs of 4 and 5 dimensions in that format.
        mode: "eager", "compiled" by torch.compile, or "graph", replays of a CUDA graph.
        rounds: Blocks a network.
        block_seconds: Length of a block.
        questions: Names of `QUESTIONS`.
    """

    name: str
    factory: Factory
    inputs: tuple[tuple[int, ...], ...]
    batch_size: int | None = None
    device: str = "cpu"
    precision: str = "float32"
    channels_last: bool = False
    mode: str = "eager"
    rounds: int = 15
    block_seconds: float = 0.05
    questions: tuple[str, ...] = ("step", "inference", "kept", "peak")

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("mode", self.mode, MODES)
        check_count("rounds", self.rounds)
        for question in self.questions:
            check_choice("questions", question, QUESTIONS)
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)
        if self.mode == "graph" and torch.device(self.device).type != "cuda":
            raise ValueError(f"mode='graph': device={self.device!r} has no CUDA graphs")

    @property
    def examples(self) -> int:
        """Examples in a batch."""
        return self.inputs[0][0] if self.batch_size is None else self.batch_size

    def setting(self, question: str) -> Setting:
        """Return what the rows of a question have in common."""
        form = "channels_last" if self.channels_last else "contiguous"
        case = f"{self.name}, batch {self.examples}"
        return Setting(question, case, form, self.precision, self.mode)


class Variant(NamedTuple):
    """A method with its options; "torch" leaves the network as it is."""

    method: str
    options: tuple[Option, ...] = ()


@dataclass(frozen=True)
class Costs:
    """The result of a measurement.

    Attributes:
        rows: A row per question and variant.
        failed: Why, of each variant that could not be measured.
    """

    rows: list[Measurement] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def steady_options(method: str) -> dict[str, Any]:
    """Options by which a method does at once what it does in most of a training.

    Example:
        >>> steady_options("brn")
        {'warmup_steps': 1}
    """
    usual: dict[str, dict[str, Any]] = {
        "mabn": {"warmup_steps": 1, "renorm_warmup_steps": 1},
        "brn": {"warmup_steps": 1},
        "cbn": {"burn_in": 0.0},
    }
    return usual.get(method, {})


def costs(bench: Bench, variants: Mapping[str, Variant], show: Show | None = None) -> Costs:
    """Measure a network with each of some methods, in turn in one process.

    A training step is forward, mean square of what comes out, backward and SGD with momentum, on
    random inputs. The baseline is the network as it is, named "torch".

    `show` is called with what is under way, how much is done, and of how much.

    Returns:
        The rows, those of "torch" first; a variant that cannot be measured gives its reason.

    Raises:
        ValueError: If the network cannot be trained as it is, or has no batch norm.
    """
    show = show or (lambda what, done, total: None)
    everyone = {BASELINE: Variant(BASELINE), **variants}
    subjects: dict[str, Subject] = {}
    found = Costs()
    with _room_for_graphs(bench.mode):
        for done, (name, variant) in enumerate(everyone.items(), 1):
            subject = _try(bench, name, partial(Subject, bench, variant), found.failed)
            if subject is not None:
                subjects[name] = subject
            show("first steps", done, len(everyone))
            if not any(map(is_batch_norm, subjects[BASELINE].model.modules())):
                raise ValueError(f"model={bench.name!r}: it has no batch norm to replace")
        for question in bench.questions:
            found.rows.extend(_ask(bench, question, subjects, found.failed, show))
    return found


def _try(bench: Bench, name: str, make: Callable[[], _T], failed: dict[str, str]) -> _T | None:
    """Return what `make` returns, or None and note the reason; a failing baseline raises."""
    try:
        return make()
    except Exception as error:  # of a network, a compiler, a device: anything can go wrong
        reason = " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])
        if name == BASELINE:
            raise ValueError(
                f"model={bench.name!r}: it cannot be trained as it is on inputs of "
                f"{_written(bench)} ({reason})"
            ) from error
        failed[name] = reason
        return None


def _written(bench: Bench) -> str:
    return ", ".join("x".join(map(str, (bench.examples, *s[1:]))) for s in bench.inputs)


def _ask(
    bench: Bench,
    question: str,
    subjects: Mapping[str, "Subject"],
    failed: dict[str, str],
    show: Show,
) -> list[Measurement]:
    setting, asked = bench.setting(question), QUESTIONS[question]
    answers: dict[str, Any] = {}
    for done, (name, one) in enumerate(subjects.items(), 1):
        answer = _try(bench, name, partial(asked.ask, one), failed)
        if answer is not None:
            answers[name] = answer
        if asked.unit != "ms":
            show(asked.doing, done, len(subjects))
    if asked.unit != "ms":
        return counted(setting, answers, BASELINE, asked.unit)
    times = interleaved(
        answers,
        bench.rounds,
        device=bench.device,
        block_seconds=bench.block_seconds,
        on_round=lambda done: show(asked.doing, done, bench.rounds),
    )
    return timed(setting, times, BASELINE)


class Subject:
    """A network with a method, ready to train.

    Attributes:
        bench: How it is measured.
        device: Device of the network.
        model: The network.
        optimizer: Its optimizer.
        network: The network as it is called: compiled if the bench asks for it.
    """

    def __init__(self, bench: Bench, variant: Variant) -> None:
        self.bench, self.device = bench, torch.device(bench.device)
        torch.manual_seed(0)
        model = bench.factory()
        self.inputs = [self._input(shape) for shape in bench.inputs]
        self.model = self._placed(self._converted(model, variant)).train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9)
        self.network: Callable[..., Any] = self.model
        if bench.mode == "compiled":
            self.network = compiled(self.model)
        self.train_step()

    def _input(self, shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(self.bench.examples, *shape[1:], device=self.device)
        last = self.bench.channels_last and x.dim() in CHANNELS_LAST
        return x.contiguous(memory_format=CHANNELS_LAST[x.dim()]) if last else x

    def _converted(self, model: nn.Module, variant: Variant) -> nn.Module:
        if variant.method == BASELINE:
            return model
        method, options = get_method(variant.method), dict(variant.options)
        options = {**steady_options(variant.method), **options}
        virtual = options.pop("num_virtual", 2) if method.wraps else 0
        with _strict_conversion():
            model = convert(
                model,
                variant.method,
                batch_size=self.bench.examples,
                example_inputs=tuple(x.cpu() for x in self.inputs),
                **options,
            )
        if method.wraps:
            model = VirtualDataset(model, 0.0, 1.0, virtual, seed=0)
        if any(isinstance(module, NormLayer) for module in model.modules()):
            NormScheduler(model, 3, last_epoch=1)  # beyond the first epoch, in which some do less
        return model

    def _placed(self, model: nn.Module) -> nn.Module:
        model = model.to(self.device)
        if self.bench.channels_last:
            set_channels_last(model)
        return model

    def train_step(self) -> None:
        """Forward, backward and the optimizer."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def loss(self) -> Tensor:
        """Return the mean square of what the network puts out."""
        with self._autocast():
            out = self.network(*self.inputs)
        values = [t.float().square().mean() for t in _tensors(out) if t.requires_grad]
        if not values:
            raise ValueError("what it puts out has no gradient")
        return values[0] if len(values) == 1 else torch.stack(values).sum()

    def infer(self, network: Callable[..., Any]) -> None:
        """Run a network on the inputs without gradients."""
        with torch.no_grad(), self._autocast():
            network(*self.inputs)

    def _autocast(self) -> AbstractContextManager[Any]:
        # Casts of a capture are no other's.
        return autocast(self.bench.precision, self.device, self.bench.mode != "graph")

    def timed_step(self) -> Call:
        """Return a training step, after a first one."""
        self.model.train()
        return self.warm(self.train_step)

    def timed_inference(self) -> Call:
        """Return inference in evaluation mode, after a first one."""
        self.model.eval()
        return self.warm(partial(self.infer, self.network))

    def warm(self, call: Call) -> Call:
        """Return a call after a first run of it, as a CUDA graph if the bench asks for it."""
        call()
        return graphed(call) if self.bench.mode == "graph" else call

    def kept_bytes(self) -> int:
        """Return the bytes that a training forward keeps for its backward, inputs included."""
        self.model.train()
        return kept_bytes(self.loss, tensors_of(self.model))

    def peak_bytes(self) -> int | None:
        """Return the most bytes that a step takes at a time, without parameters and optimizer."""
        self.model.train()
        self.optimizer.zero_grad()
        return peak_bytes(self.train_step, self.device)


class Question(NamedTuple):
    """A question about a network.

    Attributes:
        doing: What a progress bar says meanwhile.
        unit: "ms" if the answer is a call to be timed, else a million of what it counts.
        ask: Returns the answer; None if this device has none.
    """

    doing: str
    unit: str
    ask: Callable[[Subject], Call | int | None]


# Questions by name. Whoever asks more adds theirs here.
QUESTIONS = {
    "step": Question("training steps", "ms", Subject.timed_step),
    "inference": Question("inference", "ms", Subject.timed_inference),
    "kept": Question("memory kept", "MB", Subject.kept_bytes),
    "peak": Question("most memory", "MB", Subject.peak_bytes),
}


@contextmanager
def _strict_conversion() -> Iterator[None]:
    """A conversion without effect is an error; other warnings are not told for each method."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", NoEffectWarning)
        warnings.filterwarnings("ignore", ".*became constants", NoEffectWarning)  # as costly as any
        yield


def _tensors(out: Any) -> Iterator[Tensor]:
    """Floating-point tensors in nests of tuples, lists and mappings, objects' fields included."""
    if isinstance(out, Tensor):
        if out.is_floating_point():
            yield out
    elif isinstance(out, Mapping):
        for value in out.values():
            yield from _tensors(value)
    elif isinstance(out, (tuple, list)):
        for value in out:
            yield from _tensors(value)
    elif hasattr(out, "__dict__"):
        yield from _tensors(vars(out))


def compiled(network: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a network for itself: its graphs are found without looking through those of others.

    torch keeps compiled graphs by the code of a function, up to a limit, and looks through them
    at each call; so this gives each network a function whose code is its own.
    """

    def call(*inputs: Any) -> Any:
        return network(*inputs)

    code: CodeType = call.__code__
    own = FunctionType(code.replace(), call.__globals__, closure=call.__closure__)
    done: Callable[..., Any] = torch.compile(own, dynamic=False)
    return done


@contextmanager
def _room_for_graphs(mode: str) -> Iterator[None]:
    """Room for the graphs of all networks, where their inner functions are shared."""
    if mode != "compiled":
        yield
        return
    with torch._dynamo.config.patch(cache_size_limit=256):
        yield
