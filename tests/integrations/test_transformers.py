"""The Trainer of transformers with the callback gives the losses of a plain loop, to rounding."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import anybatch

pytest.importorskip("accelerate", reason="the Trainer of transformers needs it")
transformers = pytest.importorskip("transformers")

from anybatch.integrations.transformers import NormCallback, from_pretrained  # noqa: E402
from anybatch.registry import METHODS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(22, 3, 32, 32, generator=GENERATOR)
Y = torch.randint(4, (22,), generator=GENERATOR)


class Pictures(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": X[index], "labels": Y[index]}


def network() -> nn.Module:
    """A real one, with batch norms: ResNet of transformers, two small stages."""
    torch.manual_seed(3)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
    )
    return transformers.ResNetForImageClassification(config)


class InOrder(transformers.Trainer):
    """Batches in the order of the data, and the loss of each."""

    def _get_train_sampler(self, *_: object) -> None:
        return None

    def compute_loss(self, model, inputs, *args, **kwargs):
        found = super().compute_loss(model, inputs, *args, **kwargs)
        loss = found[0] if isinstance(found, tuple) else found
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return found


def trainer(model: nn.Module, folder: Path, callback: NormCallback, **options: object) -> InOrder:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        num_train_epochs=3,
        learning_rate=0.05,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    return InOrder(model, arguments, train_dataset=Pictures(), callbacks=[callback])


def plain(model: nn.Module, epochs: int, micro_batches: int = 1, divisor: int = 1) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    scheduler = anybatch.NormScheduler(model, epochs)
    steps = anybatch.accumulate(model, micro_batches) if micro_batches > 1 else None
    losses, total = [], len(X) // 2
    model.train()
    for _ in range(epochs):
        for number in range(1, total + 1):
            rows = slice(2 * number - 2, 2 * number)
            loss = model(pixel_values=X[rows], labels=Y[rows]).loss
            losses.append(loss.item())
            (loss / divisor).backward()
            if number % micro_batches == 0 or number == total:
                optimizer.step()
                optimizer.zero_grad()
                if steps is not None:
                    steps.end_step()
        scheduler.step()
    return losses


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["mbn", "mabn", "cbn"])
def test_losses_are_a_plain_loops(tmp_path: Path, method: str) -> None:
    model = anybatch.convert(network(), method, batch_size=2)
    run = trainer(model, tmp_path, NormCallback())
    run.train()
    assert run.losses == pytest.approx(
        plain(anybatch.convert(network(), method, batch_size=2), 3), rel=1e-5
    )


@pytest.mark.parametrize(
    ("method", "options"),
    [("mabn", {"warmup_steps": 4, "renorm_warmup_steps": 8}), ("cbn", {"burn_in": 0.0})],
)
def test_the_trainers_scale_of_the_loss_changes_no_loss(
    tmp_path: Path, method: str, options: dict
) -> None:
    model = anybatch.convert(network(), method, **options)
    run = trainer(model, tmp_path, NormCallback())
    # As in float16 on a GPU, and twice as much after each step.
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    run.accelerator.scaler = scaler
    run.train()
    assert scaler.get_scale() == 1024 * 2**33
    by_hand = anybatch.convert(network(), method, **options)
    assert run.losses == pytest.approx(plain(by_hand, 3), rel=1e-5)
    for name, tensor in by_hand.state_dict().items():  # the next training may have no scale
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.exhaustive
def test_a_callback_that_is_added_to_a_running_training_joins_it(tmp_path: Path) -> None:
    class Adds(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_: object) -> None:
            if state.global_step == 2:
                run.add_callback(NormCallback("mbn"))

    model = network()
    run = trainer(model, tmp_path, Adds())
    run.train()
    kinds = {type(module) for module in model.modules()}
    assert anybatch.MomentumBatchNorm2d in kinds


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["bn", "mabn"])
def test_accumulated_batches_are_one_step(tmp_path: Path, method: str) -> None:
    """Eleven batches by fives: the last step of an epoch has one."""
    model = anybatch.convert(network(), method)
    layer = next(m for m in model.modules() if isinstance(m, anybatch.core.norm_layer.NormLayer))
    run = trainer(model, tmp_path, NormCallback(), gradient_accumulation_steps=5)
    run.train()
    # The Trainer leaves the mean over batches to networks whose forward takes **kwargs.
    divisor = 1 if run.model_accepts_loss_kwargs else 5
    expected = plain(anybatch.convert(network(), method), 1, 5, divisor)
    assert run.losses[:11] == pytest.approx(expected, rel=1e-5)
    assert layer.num_batches_tracked.item() == 9
    assert layer.step is None


@pytest.mark.exhaustive
def test_a_resumed_trainer_run_gives_the_numbers_of_the_whole_one(tmp_path: Path) -> None:
    whole = trainer(
        anybatch.convert(network(), "mbn", batch_size=2), tmp_path / "a", NormCallback()
    )
    whole.train()
    rest = trainer(anybatch.convert(network(), "mbn", batch_size=2), tmp_path / "a", NormCallback())
    rest.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-11"))
    assert rest.losses == whole.losses[11:]


def test_a_model_that_is_not_converted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no anybatch layer"):
        trainer(network(), tmp_path, NormCallback()).train()


class Stops(InOrder):
    """A Trainer that fails in its sixth batch."""

    error: type[BaseException] = RuntimeError

    def compute_loss(self, model, inputs, *args, **kwargs):
        if len(getattr(self, "losses", [])) == 5:
            raise self.error("stop")
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.few(1)
@pytest.mark.parametrize("use", ["forward", "state_dict", "another training"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_training_that_is_cut_off_leaves_nothing_joined(
    tmp_path: Path, error: type[BaseException], use: str
) -> None:
    model = anybatch.convert(network(), "bn")
    layer = next(m for m in model.modules() if isinstance(m, anybatch.core.norm_layer.NormLayer))
    run = trainer(model, tmp_path, NormCallback(), gradient_accumulation_steps=4)
    run.__class__, run.error = Stops, error
    with pytest.raises(error, match="stop"):
        run.train()
    if use == "forward":
        model.train()
        before = int(layer.num_batches_tracked)
        model(pixel_values=X[:2])
        model(pixel_values=X[:2])
        assert int(layer.num_batches_tracked) == before + 2
        assert not model._forward_pre_hooks
        assert not model._state_dict_pre_hooks
    elif use == "state_dict":
        assert not any("step." in name for name in model.state_dict())
    else:
        other = trainer(model, tmp_path / "other", NormCallback(), max_steps=3)
        other.train()
        assert int(layer.num_batches_tracked) == 2 + 3
    assert layer.step is None


@pytest.mark.exhaustive
def test_a_smaller_batch_size_is_found_without_a_joined_model(tmp_path: Path) -> None:
    model = anybatch.convert(network(), "bn")
    layer = next(m for m in model.modules() if isinstance(m, anybatch.core.norm_layer.NormLayer))

    class OutOfMemory(InOrder):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if len(inputs["labels"]) > 1:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            assert layer.step is not None
            return super().compute_loss(model, inputs, *args, **kwargs)

    options = {"gradient_accumulation_steps": 4, "auto_find_batch_size": True}
    run = trainer(model, tmp_path, NormCallback(), **options)
    run.__class__ = OutOfMemory
    run.train()
    assert layer.step is None
    assert int(layer.num_batches_tracked) == 3 * 6  # 22 batches of one, by fours


# save_pretrained


EXACT = [name for name, method in METHODS.items() if method.exact_eval and not method.wraps]


def trained(method: str, steps: int = 4) -> nn.Module:
    model = anybatch.convert(network(), method)
    train(model, steps)
    return model


def train(model: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for step in range(steps):
        rows = slice(2 * step, 2 * step + 2)
        loss = model.train()(pixel_values=X[rows], labels=Y[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=X[:8]).logits


@pytest.mark.parametrize("method", EXACT)
def test_a_saved_network_loads_with_the_same_output_in_plain_transformers(
    tmp_path: Path, method: str
) -> None:
    model = trained(method)
    model.save_pretrained(tmp_path)
    plain = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert not any(type(module).__module__.startswith("anybatch") for module in plain.modules())
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)
    assert not hasattr(model.config, "anybatch")


@pytest.mark.few(2)
@pytest.mark.parametrize("method", [*EXACT, "bgn"])
def test_a_saved_network_trains_on_where_it_was(tmp_path: Path, method: str) -> None:
    model = trained(method)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    again = from_pretrained(transformers.AutoModelForImageClassification, tmp_path)
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    assert train(again, 3) == pytest.approx(train(model, 3), rel=1e-5)
    again.save_pretrained(tmp_path / "again")


SETTINGS = {
    "memories of brn": ("brn", {"norm_batch_size": 1, "memories": 2, "warmup_steps": 0}),
    "memories of cbn": ("cbn", {"norm_batch_size": 1, "memories": 2, "burn_in": 0.0}),
    "frozen": ("frozen", {}),
    "group norm": ("gn", {"num_groups": 4}),
    "bn, then frozen": ("bn", {}),
    "mabn, then frozen": ("mabn", {}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_memories_and_frozen_statistics_are_saved_too(tmp_path: Path, name: str) -> None:
    method, options = SETTINGS[name]
    model = network()
    train(model, 2)
    anybatch.convert(model, method, **options)
    train(model, 3)
    if name.endswith("then frozen"):
        anybatch.freeze(model)
    model.save_pretrained(tmp_path)
    again = from_pretrained(transformers.AutoModelForImageClassification, tmp_path)
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    assert again.state_dict().keys() == model.state_dict().keys()
    assert train(again, 3) == pytest.approx(train(model, 3), rel=1e-5)


def test_a_network_that_plain_code_cannot_load_is_saved_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"(?s)gives other outputs.*example_weight"):
        trained("bgn").save_pretrained(tmp_path)


def test_a_copy_saves_itself_and_a_plain_network_as_ever(tmp_path: Path) -> None:
    model = trained("mabn")
    twin = copy.deepcopy(model)
    train(twin, 2)
    twin.save_pretrained(tmp_path / "twin")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "twin")
    weight = twin.resnet.embedder.embedder.convolution.weight
    found = loaded.embedder.embedder.convolution.weight
    torch.testing.assert_close(found, weight - weight.mean((1, 2, 3), keepdim=True))
    anybatch.to_batchnorm(model)
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"not saved after anybatch\.convert"):
        from_pretrained(transformers.AutoModel, tmp_path / "plain")


def test_a_network_of_another_head_starts_fresh_with_a_warning(tmp_path: Path) -> None:
    trained("ghost").save_pretrained(tmp_path)
    body = from_pretrained(transformers.ResNetForImageClassification, tmp_path)
    assert isinstance(body.resnet.embedder.embedder.normalization, anybatch.GhostBatchNorm2d)


@pytest.mark.exhaustive
def test_a_resumed_trainer_run_of_centred_weights_is_the_whole_one(tmp_path: Path) -> None:
    whole = trainer(anybatch.convert(network(), "mabn"), tmp_path / "a", NormCallback())
    whole.train()
    rest = trainer(anybatch.convert(network(), "mabn"), tmp_path / "a", NormCallback())
    rest.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-11"))
    assert rest.losses == whole.losses[11:]
    plain = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "a" / "checkpoint-33"
    )
    torch.testing.assert_close(logits(plain), logits(whole.model), rtol=1e-4, atol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["mbn", "mabn"])
def test_the_trainer_converts_by_name_and_resumes(tmp_path: Path, method: str) -> None:
    options = {"batch_size": 2} if method == "mbn" else {"window": 4}
    whole = trainer(network(), tmp_path / "a", NormCallback(method, **options))
    whole.train()
    by_hand = trainer(anybatch.convert(network(), method, **options), tmp_path, NormCallback())
    by_hand.train()
    assert whole.losses == by_hand.losses
    rest = trainer(network(), tmp_path / "a", NormCallback(method, **options))
    rest.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-22"))
    assert rest.losses == whole.losses[22:]


@pytest.mark.exhaustive
def test_a_callback_that_is_added_late_converts_when_training_begins(tmp_path: Path) -> None:
    run = trainer(network(), tmp_path, transformers.TrainerCallback())
    run.add_callback(NormCallback("bn"))
    run.train()
    assert isinstance(run.model.resnet.embedder.embedder.normalization, anybatch.BatchNorm2d)


@pytest.mark.parametrize(
    ("arguments", "words"), [(("mabm",), "did you mean 'mabn'"), ((), "give method=")]
)
def test_wrong_names_and_options_are_refused(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NormCallback(*arguments, window=3)
