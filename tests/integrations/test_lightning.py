"""Lightning's Trainer with the callback gives the losses of a plain loop, to rounding."""

import contextlib
import logging
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import anybatch
from anybatch.core.norm_layer import NormLayer
from anybatch.integrations.lightning import NormCallback, framework

pytestmark = pytest.mark.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(23, 3, 6, 6, generator=GENERATOR)
Y = torch.randint(4, (23,), generator=GENERATOR)


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    )


def batches() -> DataLoader:
    return DataLoader(TensorDataset(X, Y), batch_size=2)


class Classifier(framework.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("loss", F.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def trainer(folder: Path, callback: NormCallback, epochs: int = 3, **options) -> framework.Trainer:
    return framework.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def plain(method: str, epochs: int, micro_batches: int, **options) -> tuple[list[float], nn.Module]:
    """The loop that people write by hand."""
    model = anybatch.convert(network(), method, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    scheduler = anybatch.NormScheduler(model, epochs)
    steps = anybatch.accumulate(model, micro_batches) if micro_batches > 1 else None
    losses = []
    for _ in range(epochs):
        for number, (x, y) in enumerate(batches(), 1):
            loss = F.cross_entropy(model(x), y)
            losses.append(loss.item())
            (loss / micro_batches).backward()
            if number % micro_batches == 0 or number == len(batches()):
                optimizer.step()
                optimizer.zero_grad()
                if steps is not None:
                    steps.end_step()
        scheduler.step()
    if steps is not None:
        steps.remove()
    return losses, model


def memory(model: nn.Module) -> dict[str, Tensor]:
    layers = [m for m in model.modules() if isinstance(m, NormLayer)]
    return {f"{i} {k}": t for i, layer in enumerate(layers) for k, t in layer.method_state.items()}


@pytest.mark.few(1)
@pytest.mark.parametrize("micro_batches", [1, 5])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("bn", {}),
        ("mbn", {"batch_size": 2}),
        ("mabn", {"warmup_steps": 4, "renorm_warmup_steps": 8}),
        ("cbn", {"batch_size": 2, "burn_in": 0.0}),
        ("brn", {"warmup_steps": 4}),
    ],
)
def test_losses_and_state_are_a_plain_loops(
    tmp_path: Path, method: str, options: dict, micro_batches: int
) -> None:
    if micro_batches > 1 and method == "mbn":
        options = {}
    module = Classifier(network())
    callback = NormCallback(method, **options)
    trainer(tmp_path, callback, accumulate_grad_batches=micro_batches).fit(
        module, batches(), batches()
    )
    losses, model = plain(method, 3, micro_batches, **options)
    assert module.losses == pytest.approx(losses, rel=1e-6)
    state, expected = module.model.state_dict(), model.state_dict()
    for name in state:
        torch.testing.assert_close(state[name], expected[name])
    assert memory(module).keys() == memory(model).keys()
    for name, tensor in memory(module).items():
        torch.testing.assert_close(tensor, memory(model)[name])


class Scaled(framework.plugins.MixedPrecision):
    """Scales the loss, twice as much after each step, and computes in float32."""

    def __init__(self, scale: float = 1024.0) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1)
        super().__init__("16-mixed", "cpu", scaler)

    def forward_context(self) -> contextlib.nullcontext:
        return contextlib.nullcontext()


def scaled_training(
    folder: Path, method: str, epochs: int, checkpoint: Path | None = None, **options
) -> tuple[Classifier, framework.Trainer]:
    module = Classifier(network())
    run = trainer(folder, NormCallback(method, total_epochs=2, **options), epochs, plugins=Scaled())
    run.fit(module, batches(), ckpt_path=checkpoint)
    return module, run


@pytest.mark.parametrize(
    ("method", "options"),
    [("mabn", {"warmup_steps": 4, "renorm_warmup_steps": 8}), ("cbn", {"burn_in": 0.0})],
)
def test_lightning_s_scale_of_the_loss_changes_no_loss(
    tmp_path: Path, method: str, options: dict
) -> None:
    module, run = scaled_training(tmp_path, method, 2, **options)
    assert run.scaler.get_scale() == 1024 * 2**24
    expected, model = plain(method, 2, 1, **options)
    assert module.losses == pytest.approx(expected, rel=1e-6)
    _, stopped = scaled_training(tmp_path, method, 1, **options)
    stopped.save_checkpoint(tmp_path / "half.ckpt")
    rest, _ = scaled_training(tmp_path, method, 2, tmp_path / "half.ckpt", **options)
    assert module.losses[12:] == pytest.approx(rest.losses, rel=1e-6)
    assert all(m.loss_scale == 1 for m in module.modules() if isinstance(m, NormLayer))
    for name, tensor in memory(model).items():  # the next training may have no scale
        torch.testing.assert_close(memory(module)[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["mbn", "mabn", "cbn"])
def test_a_resumed_lightning_run_gives_the_numbers_of_the_whole_one(
    tmp_path: Path, method: str
) -> None:
    whole, first, rest = (Classifier(network()) for _ in range(3))
    options = {"burn_in": 0.0} if method == "cbn" else {}
    made = {"batch_size": 2, "total_epochs": 4, **options}
    trainer(tmp_path, NormCallback(method, **made), 4).fit(whole, batches())
    stopped = trainer(tmp_path, NormCallback(method, **made), 2)
    stopped.fit(first, batches())
    stopped.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path, NormCallback(method, **made), 4).fit(
        rest, batches(), ckpt_path=tmp_path / "half.ckpt"
    )
    assert first.losses + rest.losses == whole.losses
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, rest.state_dict()[name]), name


def test_the_layers_know_the_epoch_and_are_left_plain(tmp_path: Path) -> None:
    module = Classifier(anybatch.convert(network(), "mbn", batch_size=2))
    seen = []

    class Watch(framework.Callback):
        def on_train_batch_start(self, *_: object) -> None:
            seen.append((module.model[1].progress, module.model[1].step is None))

    run = trainer(tmp_path, NormCallback(), 3, accumulate_grad_batches=6)
    run.callbacks.append(Watch())
    run.fit(module, batches())
    assert seen == [((epoch, 3), False) for epoch in (1, 2, 3) for _ in range(12)]
    assert module.model[1].step is None


@pytest.mark.parametrize("method", ["frozen", "gn"])
def test_accumulation_joins_nothing_where_no_norm_depends_on_batches(
    method: str, tmp_path: Path
) -> None:
    module = Classifier(network())
    trainer(tmp_path, NormCallback(method), 1, accumulate_grad_batches=4).fit(module, batches())
    assert module.losses


def test_a_training_by_steps_alone_has_to_be_told_its_epochs(tmp_path: Path) -> None:
    module = Classifier(network())
    with pytest.raises(ValueError, match="total_epochs=None"):
        trainer(tmp_path, NormCallback("mbn", batch_size=2), -1, max_steps=3).fit(module, batches())
    module = Classifier(network())
    trainer(tmp_path, NormCallback("mabn"), -1, max_steps=3).fit(module, batches())
    assert len(module.losses) == 3


def test_the_lightning_callback_refuses_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'mabn'"):
        NormCallback("mabm")
    with pytest.raises(ValueError, match="options window are of a method"):
        NormCallback(window=3)
    with pytest.raises(ValueError, match="has no anybatch layer"):
        trainer(tmp_path, NormCallback()).fit(Classifier(network()), batches())


def test_the_lightning_callback_causes_no_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", anybatch.NoEffectWarning)
        trainer(tmp_path, NormCallback("mabn"), 1).fit(Classifier(network()), batches())


class Twice(Classifier):
    """Two forwards a batch, as in contrastive learning."""

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y) + F.cross_entropy(self.model(x.flip(3)), y)


@pytest.mark.parametrize("first_epoch", [1, 4])
@pytest.mark.parametrize("kind", [Classifier, Twice])
def test_steps_end_with_the_optimizer_where_accumulation_changes(
    tmp_path: Path, kind: type[Classifier], first_epoch: int
) -> None:
    """12 batches: an epoch by fours has 3 steps; one by ones has 12, or 24 of two forwards."""
    module = kind(anybatch.convert(network(), "bn"))
    run = trainer(tmp_path, NormCallback(), 2)
    schedule = {0: first_epoch, 1: 5 - first_epoch}
    run.callbacks.append(framework.callbacks.GradientAccumulationScheduler(schedule))
    run.fit(module, batches())
    forwards = 2 if kind is Twice else 1
    assert module.model[1].num_batches_tracked.item() == 3 + 12 * forwards
    assert module.model[1].step is None


def test_a_method_that_cannot_join_batches_is_refused_before_any_batch(tmp_path: Path) -> None:
    module = Classifier(network())
    run = trainer(tmp_path, NormCallback("l1"), 2)
    run.callbacks.append(framework.callbacks.GradientAccumulationScheduler({1: 4}))
    with pytest.raises(ValueError, match="do not pool"):
        run.fit(module, batches())
    assert not module.losses


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_fit_that_is_cut_off_leaves_nothing_joined(tmp_path: Path, error: type) -> None:
    class Fails(Classifier):
        def training_step(self, batch: list[Tensor], number: int) -> Tensor:
            if number == 6:
                raise error("stop")
            return super().training_step(batch, number)

    module = Fails(network())
    with pytest.raises((RuntimeError, SystemExit)):
        trainer(tmp_path, NormCallback("bn"), accumulate_grad_batches=4).fit(module, batches())
    layer = module.model[1]
    assert layer.step is None
    assert not any("step." in name for name in module.state_dict())
    module.model(X[:2])
    module.model(X[:2])
    assert layer.num_batches_tracked.item() == 2 + 2  # one whole step of four, two batches


def statistics_match(module: Classifier) -> bool:
    """Whether running statistics are those of the training data at the module's weights."""
    layer = module.model[1]
    x = module.model[0](X)
    expected = x.var((0, 2, 3)), x.mean((0, 2, 3))
    found = layer.running_var, layer.running_mean
    return all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(expected, found, strict=True)
    )


AVERAGING = {
    "StochasticWeightAveraging": {"swa_lrs": 0.5, "swa_epoch_start": 1},
    "EMAWeightAveraging": {"decay": 0.9},
    "WeightAveraging": {},
}


@pytest.mark.parametrize("kind", AVERAGING)
@pytest.mark.parametrize("method", ["mbn", "cbn"])
def test_averaged_weights_get_their_statistics(tmp_path: Path, method: str, kind: str) -> None:
    if not hasattr(framework.callbacks, kind):
        pytest.skip(f"this Lightning has no {kind}")
    module = Classifier(network())
    run = trainer(tmp_path, NormCallback(method))
    run.callbacks.append(getattr(framework.callbacks, kind)(**AVERAGING[kind]))
    run.fit(module, batches())
    assert statistics_match(module)
    assert "log" not in vars(module)


def test_averaging_without_recalibration_warns(tmp_path: Path) -> None:
    run = trainer(tmp_path, NormCallback("bn", recalibrate_batches=0))
    run.callbacks.append(framework.callbacks.StochasticWeightAveraging(0.5, 1))
    with pytest.warns(UserWarning, match="call anybatch.recalibrate"):
        run.fit(Classifier(network()), batches())


class Finetuned(Classifier):
    def __init__(self, model: nn.Sequential) -> None:
        super().__init__(model)
        self.backbone = model[:3]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05)


@pytest.mark.parametrize("train_bn", [True, False])
@pytest.mark.parametrize("convert_first", [True, False])
def test_a_finetuned_backbone_trains_its_norms_as_batch_norms(
    tmp_path: Path, convert_first: bool, train_bn: bool
) -> None:
    """With Lightning's own callback: norms train until the backbone does, then if train_bn."""
    seen: list[list[bool]] = []

    class Watch(framework.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_: object) -> None:
            weight = pl_module.model[1].weight
            seen[-1].append(weight.grad is not None and bool(weight.grad.any()))

    for ours in (False, True):
        seen.append([])
        model = network()
        callbacks = [framework.callbacks.BackboneFinetuning(2, train_bn=train_bn), Watch()]
        if ours and convert_first:
            anybatch.convert(model, "bn")
        run = trainer(tmp_path, NormCallback(None if convert_first else "bn"), 4)
        run.callbacks[:1] = [callbacks[0], *run.callbacks[:1] * ours, callbacks[1]]
        run.fit(Finetuned(model), batches())
    assert seen[1][:24] == seen[0][:24] == [True] * 24
    if train_bn:
        assert seen[1] == seen[0]
    else:  # torch's get gradients that no optimizer uses
        assert not any(seen[1][24:])


def test_callbacks_in_an_order_that_cannot_work_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, NormCallback("bn"))
    run.callbacks.append(framework.callbacks.BackboneFinetuning(1))
    with pytest.raises(ValueError, match="list BackboneFinetuning before NormCallback"):
        run.fit(Finetuned(network()), batches())


def test_a_callback_that_is_added_to_a_running_fit_joins_it(tmp_path: Path) -> None:
    late = NormCallback("mbn")

    class Adds(framework.Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            if late not in trainer.callbacks:
                trainer.callbacks.append(late)

    run = trainer(tmp_path, Adds(), 3)
    module = Classifier(network())
    run.fit(module, batches())
    norm = module.model[1]
    assert isinstance(norm, anybatch.MomentumBatchNorm2d)
    assert norm.step is None


class Small(Classifier):
    def __init__(self) -> None:
        super().__init__(network())


class Data(framework.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return batches()


CONFIG = """
trainer:
  max_epochs: 2
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  accumulate_grad_batches: 2
  callbacks:
    - class_path: anybatch.integrations.lightning.NormCallback
      init_args:
        method: mabn
        recalibrate_batches: 3
      dict_kwargs:
        window: 8
"""


def test_the_command_line_of_lightning_takes_the_callback_from_yaml(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI  # of the package that `framework` is

    (tmp_path / "config.yaml").write_text(CONFIG)
    cli = LightningCLI(
        Small,
        Data,
        args=["fit", "--config", str(tmp_path / "config.yaml")],
        save_config_callback=None,
    )
    layers = [m for m in cli.model.modules() if isinstance(m, anybatch.MovingAverageBatchNorm2d)]
    assert layers
    assert {layer.window for layer in layers} == {8}
