"""Lightning: the compiled model is a submodule; its checkpoints carry the FP8 state and the loss scale."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from trainers.runs import differences, example

import fp8fx
from fp8fx.trainers.lightning import LossScaling, StatisticsCallback

run = example("train_with_lightning")


@pytest.mark.parametrize("recipe", ["delayed", "direct"])
def test_stopped_and_resumed(recipe: str, tmp_path: Path) -> None:
    whole = run.train(recipe, tmp_path / "whole", steps=7)
    run.train(recipe, tmp_path / "parts", steps=4)
    saved = torch.load(tmp_path / "parts" / "last.ckpt", weights_only=True)
    assert ("LossScaling" in saved) == (recipe == "direct")
    resumed = run.train(recipe, tmp_path / "parts", steps=7, resume=True)
    assert differences(whole, resumed) == []
    assert torch.equal(whole["fast._fp8fx.stream"][1], torch.tensor(7))
    for folder in ("whole", "parts"):
        lines = [json.loads(line) for line in (tmp_path / folder / "fp8.jsonl").read_text().splitlines()]
        assert {line["step"] for line in lines} == {5}
    assert list((tmp_path / "parts" / "tensorboard").iterdir())


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    run.train("delayed", tmp_path, steps=1)
    with pytest.raises(fp8fx.ModelError, match="it holds delayed scales, and recipe 'hybrid' keeps none"):
        run.train("hybrid", tmp_path, steps=2, resume=True)


class Elsewhere(run.Language):  # type: ignore[name-defined,misc]
    """Trains a copy by mistake."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.copies = [p.detach().clone().requires_grad_() for p in self.fast.parameters()]
        return torch.optim.SGD(self.copies, lr=0.1)


def test_an_optimizer_over_other_parameters_is_refused(tmp_path: Path) -> None:
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[StatisticsCallback(jsonl=tmp_path / "fp8.jsonl")],
    )  # fmt: skip
    with pytest.raises(fp8fx.ModelError, match="the optimizer holds none of the 29 trainable parameters of the compiled model 'fast'"):
        trainer.fit(Elsewhere("hybrid"), run.Batches())


def test_loss_scaling_is_a_pass_through_where_none_is_needed() -> None:
    assert LossScaling("hybrid").scaler is None
    scaling = LossScaling("direct", device="cpu")
    assert isinstance(scaling.scaler, fp8fx.GradScaler)
    with scaling.forward_context():
        assert not torch.is_autocast_enabled("cpu")
