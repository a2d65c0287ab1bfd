"""Replayed statistics are those of the joined batch at today's weights."""

from collections import deque

import torch

import anybatch
from anybatch.tools.data import load
from anybatch.tools.run import Run
from anybatch.tools.training import prepare
from papers.studies.replayed import replay, table, train_replayed

RUN = Run(method="bn", batch_size=4, epochs=1, train_size=40, test_size=20)


def test_statistics_of_a_replayed_forward_are_those_of_all_inputs() -> None:
    training = prepare(RUN, load(RUN))
    norm = next(m for m in training.model.modules() if isinstance(m, anybatch.BatchNorm1d))
    norm.momentum = 1.0
    anybatch.accumulate(training.model, 2)
    seen: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    training.model.train()
    old, new = torch.randn(8, 64), torch.randn(4, 64)
    replay(training, deque([old[:4], old[4:]]))
    assert not any(p.grad is not None for p in training.model.parameters())
    training.model(new)
    torch.testing.assert_close(norm.running_mean, torch.cat(seen).mean(0))
    torch.testing.assert_close(norm.running_var, torch.cat(seen).var(0))


def test_one_batch_replays_nothing_and_more_train() -> None:
    data = load(RUN)
    assert train_replayed(RUN, data, 1).accuracy == train_replayed(RUN, data, 1).accuracy
    assert 0 <= train_replayed(RUN, data, 3).accuracy <= 1


def test_the_table_has_accuracy_spread_and_seconds_of_each_row() -> None:
    rows = table(RUN.but(batch_size=2), 1)
    assert [row["row"] for row in rows][:2] == ["BN, 16", "BN, 2"]
    assert all(0 <= row["accuracy"] <= 100 and row["seconds"] >= 0 for row in rows)
