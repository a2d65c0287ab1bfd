"""Lightning's Trainer with the callback gives the losses of a plain loop, to rounding."""

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
    return {f"{i} {k}": t for i, layer in enumerate(layers) for k, t in layer.memory.items()}


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


@pytest.mark.parametrize("method", ["mbn", "mabn", "cbn"])
def test_a_resumed_run_is_the_whole_one(tmp_path: Path, method: str) -> None:
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


def test_a_training_by_steps_alone_has_to_be_told_its_epochs(tmp_path: Path) -> None:
    module = Classifier(network())
    with pytest.raises(ValueError, match="total_epochs=None"):
        trainer(tmp_path, NormCallback("mbn", batch_size=2), -1, max_steps=3).fit(module, batches())
    module = Classifier(network())
    trainer(tmp_path, NormCallback("mabn"), -1, max_steps=3).fit(module, batches())
    assert len(module.losses) == 3


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'mabn'"):
        NormCallback("mabm")
    with pytest.raises(ValueError, match="options window are of a method"):
        NormCallback(window=3)
    with pytest.raises(ValueError, match="has no anybatch layer"):
        trainer(tmp_path, NormCallback()).fit(Classifier(network()), batches())


def test_no_warning_of_ours(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", anybatch.NoEffectWarning)
        trainer(tmp_path, NormCallback("mabn"), 1).fit(Classifier(network()), batches())
