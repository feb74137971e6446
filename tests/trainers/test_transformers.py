"""transformers.Trainer: its own checkpoints carry the FP8 state; the example ends where the uninterrupted run ends."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from trainers.runs import differences, example
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import load_sharded_checkpoint

import fp8fx
from fp8fx.trainers.transformers import StatisticsCallback, use_scaler

run = example("train_with_transformers")


@pytest.mark.parametrize("recipe", ["delayed", "direct"])
def test_stopped_and_resumed(recipe: str, tmp_path: Path) -> None:
    whole = run.train(recipe, tmp_path / "whole", steps=6)
    run.train(recipe, tmp_path / "parts", steps=5)
    resumed = run.train(recipe, tmp_path / "parts", steps=6, resume=True)
    assert differences(whole, resumed) == []
    assert any(key.startswith("_fp8fx.") and key.endswith(".history") for key in whole) == (recipe == "delayed")
    checkpoint = tmp_path / "parts" / "checkpoint-5"
    assert (checkpoint / "scaler.pt").exists() == (recipe == "direct")
    if recipe == "direct":
        assert torch.load(checkpoint / "scaler.pt", weights_only=True)["fp8fx_steps"] == 5
    first, *_ = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert first["loss"] < math.log(256)  # it learns
    assert 0.1 < first["grad_norm"] < 10  # unscaled before it is clipped: else a loss scale of 2^16 would show here
    lines = [json.loads(line) for line in (tmp_path / "parts" / "fp8.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {5}
    assert {line["role"] for line in lines} >= {"input", "weight", "grad_output"}
    assert list((tmp_path / "parts" / "tensorboard").iterdir())
    plain = fp8fx.strip(resumed)
    loaded = LlamaForCausalLM.from_pretrained(checkpoint).state_dict()  # says that the FP8 entries are unexpected, and loads the rest
    assert loaded.keys() == plain.keys()


def test_checkpoints_in_several_files_and_export(tmp_path: Path) -> None:
    """Loaded file by file, as the Trainer does: the FP8 state is spread over them. The original saves an ordinary checkpoint."""
    fast = fp8fx.compile(run.tiny_llama(), "delayed")
    tokens = torch.randint(256, (2, 8))
    fast(input_ids=tokens, labels=tokens).loss.backward()
    torch.optim.SGD(fast.parameters(), lr=0.1).step()
    fast.save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    torch.manual_seed(1)
    other = fp8fx.compile(run.tiny_llama(), "delayed")
    load_sharded_checkpoint(other, str(tmp_path / "parts"), strict=False)
    assert differences(other.state_dict(), fast.state_dict()) == []
    fp8fx.unwrap(fast).save_pretrained(tmp_path / "plain")
    loaded, report = LlamaForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not report["unexpected_keys"]
    assert differences(loaded.state_dict(), fp8fx.strip(fast.state_dict())) == []


@pytest.mark.parametrize("recipe", ["delayed", "direct"])
def test_parts_in_any_order(recipe: str) -> None:
    fast, other = (fp8fx.compile(torch.nn.Linear(4, 4), recipe) for _ in range(2))
    for _ in range(2):
        fast(torch.ones(2, 4)).sum().backward()
        torch.optim.SGD(fast.parameters(), lr=0.1).step()
    state = list(fast.state_dict().items())
    for first in range(3):
        other.load_state_dict(dict(state[first::3]), strict=False)
    assert differences(other.state_dict(), fast.state_dict()) == []


def test_a_part_of_a_state_is_left_out_with_a_warning() -> None:
    fast = fp8fx.compile(torch.nn.Linear(4, 4), "delayed")
    fast(torch.ones(2, 4)).sum().backward()
    entries = fp8fx.state_dict(fast)
    before = {key: value.clone() for key, value in entries.items()}
    fast.load_state_dict({"_fp8fx.input.scale": torch.tensor(8.0)}, strict=False)
    with pytest.warns(fp8fx.FP8Warning, match="only a part of the FP8 state"):
        fast(torch.ones(2, 4))
    assert differences(fp8fx.state_dict(fast), before | {"_fp8fx.stream": torch.tensor([0, 0, 2])}) == []


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    """By the Trainer's own loading, before anything of the model is changed."""
    fp8fx.compile(run.tiny_llama(), "delayed").save_pretrained(tmp_path)
    made = trainer(tmp_path, model=fp8fx.compile(run.tiny_llama(), "hybrid"))
    before = {key: value.clone() for key, value in made.model.state_dict().items()}
    with pytest.raises(fp8fx.ModelError, match="it holds delayed scales, and recipe 'hybrid' keeps none"):
        made._load_from_checkpoint(str(tmp_path))
    assert differences(made.model.state_dict(), before) == []


def trainer(folder: Path, **options: object) -> Trainer:
    arguments = TrainingArguments(str(folder), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no")
    return Trainer(args=arguments, train_dataset=run.Windows(), **options)  # type: ignore[arg-type]


def test_an_optimizer_over_other_parameters_is_refused(tmp_path: Path) -> None:
    fast, copy = fp8fx.compile(run.tiny_llama(), "delayed"), run.tiny_llama()
    optimizer = torch.optim.SGD(copy.parameters(), lr=0.1)
    made = trainer(tmp_path, model=fast, callbacks=[StatisticsCallback(jsonl=tmp_path / "fp8.jsonl")], optimizers=(optimizer, None))
    with pytest.raises(fp8fx.ModelError, match=r"the optimizer holds none of the 20 trainable parameters of the compiled model"):
        made.train()


def test_scalers_that_cannot_be_used(tmp_path: Path) -> None:
    made = trainer(tmp_path, model=fp8fx.compile(run.tiny_llama(), "direct"))
    with pytest.raises(fp8fx.ModelError, match=r"takes an fp8fx.GradScaler\(recipe\), got str"):
        use_scaler(made, "direct")  # type: ignore[arg-type]
    use_scaler(made, fp8fx.GradScaler("hybrid"))  # needs none: nothing is set
    assert made.accelerator.scaler is None
    use_scaler(made, fp8fx.GradScaler("direct"))
    with pytest.raises(fp8fx.ModelError, match="has a scaler already"):
        use_scaler(made, fp8fx.GradScaler("direct"))
