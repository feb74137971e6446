"""What goes wrong for somebody who is new here: each mistake gets a message that says what to do, as PyTorch or better."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import fp8fx
from fp8fx.arithmetic import matmul
from fp8fx.cli import app
from fp8fx.targets import sample_inputs


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.memory(x)[0])


# -- models ---------------------------------------------------------------------------------------------------------------


def test_a_plan_before_the_backend_was_called_says_to_call_it() -> None:
    compiled = torch.compile(net(), backend="fp8fx", options={"recipe": "hybrid"})
    with pytest.raises(fp8fx.ModelError, match="call it once before its plan"):
        fp8fx.plan(compiled)
    compiled(torch.randn(2, 8))
    assert {row.decision for row in fp8fx.plan(compiled).rows} == {"fp8"}


@pytest.mark.parametrize("recipe", ["hybrid", "direct", "delayed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_operands_of_two_dtypes_fail_as_in_the_plain_model(recipe: str, dtype: torch.dtype) -> None:
    x, fast = torch.randn(2, 8, dtype=dtype), fp8fx.compile(net(), recipe)
    with pytest.raises(RuntimeError, match="must have the same dtype"):
        net()(x)
    with pytest.raises(RuntimeError, match="must have the same dtype"):
        fast(x)
    assert fast(x.float()).dtype == torch.float32
    assert {row.decision for row in fast.plan().rows} >= {"fp8"}


def test_autocast_brings_two_dtypes_together() -> None:
    fast = fp8fx.compile(net(), "hybrid")
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(torch.randn(2, 8)).dtype == torch.bfloat16
        assert fast(torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16
    assert {row.decision for row in fast.plan().rows} == {"fp8"}


def test_an_export_is_refused_rather_than_exported_without_fp8() -> None:
    fast, x = fp8fx.compile(net(), "hybrid"), torch.randn(2, 8)
    with pytest.raises(Exception, match=r"cannot be exported .*fp8fx\.unwrap\(model\)"):
        torch.export.export(fast, (x,))
    torch.export.export(fp8fx.unwrap(fast), (x,))
    assert fast(x).shape == (2, 4)


def test_the_plan_names_the_recurrent_layer_that_keeps_a_forward_out() -> None:
    fast = fp8fx.compile(Recurrent(), "hybrid")
    with pytest.warns(fp8fx.FP8Warning, match="no layer runs in FP8"):
        fast(torch.randn(2, 3, 8))
    assert "calls a recurrent layer ('memory', LSTM)" in fast.plan()["head"].reason


def test_strip_and_listing_of_a_model_say_what_they_take() -> None:
    fast = fp8fx.compile(net(), "hybrid")
    with pytest.raises(fp8fx.ModelError, match=r"fp8fx\.strip\(model\.state_dict\(\)\)"):
        fp8fx.strip(fast)  # type: ignore[arg-type]
    with pytest.raises(fp8fx.ModelError, match=r"fast\.graph\('insert_qdq'\)"):
        fp8fx.listing(fast)  # type: ignore[arg-type]


# -- recipes and formats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("E4M3FN", "'e4m3fn'?"),
        ("INT8", "'int8'?"),
        ("torch.float8_e5m2", "'e5m2'?"),
        ("MXFP4", "'mxfp4'?"),
        ("fp8", "'e4m3fn' or 'e5m2'?"),
        ("float8", "'e4m3fn' or 'e5m2'?"),
        ("fp8_e4m3", "e4m3fn (448) or e4m3ieee (240)?"),
        ("e4m3fm", "'e4m3fn'?"),
    ],
)
def test_other_spellings_of_a_format_are_understood_as_hints(name: str, hint: str) -> None:
    with pytest.raises(fp8fx.FormatError) as caught:
        fp8fx.formats.get(name)
    assert str(caught.value).endswith(f"Did you mean {hint}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: hybrid\nexempt: ['a\nrules: []\n", "mine.yaml:4: is not YAML: .*(while scanning a quoted scalar, from line 2 on)"),
        ("extends: hybrid\nrules: [{match: a}\n", "mine.yaml:3: is not YAML: .*(while parsing a flow sequence, from line 2 on)"),
        (
            "extends: hybrid\nexempt\n",
            "mine.yaml:3: is not YAML: could not find expected ':' (while scanning a simple key, from line 2 on)",
        ),
    ],
)
def test_half_written_yaml_says_where_the_open_part_began(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(fp8fx.RecipeError, match=message.replace("(", r"\(").replace(")", r"\)")):
        fp8fx.compile(net(), tmp_path / "mine.yaml")


def test_the_name_of_a_file_without_its_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("extends: hybrid\n")
    with pytest.raises(fp8fx.RecipeError, match=r"no shipped recipe is called 'mine'.* Did you mean 'mine\.yaml'\?"):
        fp8fx.Recipe.load("mine")
    with pytest.raises(fp8fx.RecipeError, match=r"Did you mean 'hybrid'\?"):
        fp8fx.Recipe.load("HYBRID")
    with pytest.raises(fp8fx.RecipeError, match="no shipped recipe is called 'xxx"):
        fp8fx.Recipe.load("x" * 300)


def test_a_pattern_unlike_any_name_is_answered_with_the_names() -> None:
    with pytest.raises(fp8fx.RecipeError, match=r"no module matches 'fc'. The modules are '0', '1', '2'$"):
        fp8fx.compile(net(), "hybrid", exempt=["fc"])
    many = nn.Sequential(*[nn.Linear(2, 2) for _ in range(12)])
    with pytest.raises(fp8fx.RecipeError, match=r"'6', '7' and more$"):
        fp8fx.compile(many, "hybrid", exempt=["classifier"])


# -- checkpoints ----------------------------------------------------------------------------------------------------------


def test_another_program_s_safetensors_file_is_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(net().state_dict(), path)
    with pytest.raises(fp8fx.CheckpointError) as caught:
        fp8fx.load(path, fp8fx.compile(net(), "hybrid"))
    assert "that fp8fx.save did not write" in str(caught.value)
    assert "damaged" not in str(caught.value)


def test_a_loaded_model_with_gradients_can_be_cast(tmp_path: Path) -> None:
    saved, loaded = fp8fx.compile(net(), "hybrid"), fp8fx.compile(net(), "hybrid")
    saved(torch.randn(2, 8)).sum().backward()
    fp8fx.save(saved, tmp_path / "run.safetensors")
    fp8fx.load(tmp_path / "run.safetensors", loaded)
    assert all(p.grad is not None and not p.grad._is_view() for p in loaded.parameters())
    assert loaded.half()(torch.randn(2, 8).half()).dtype == torch.float16


# -- the laboratory and the command line ----------------------------------------------------------------------------------


def test_qat_suggests_the_shipped_recipe() -> None:
    with pytest.raises(fp8fx.ModelError, match="or rowwise; did you mean 'hybrid'"):
        fp8fx.qat(net(), "hybird", data=[torch.randn(2, 8)])


def test_qat_names_the_misspelt_role() -> None:
    with pytest.raises(fp8fx.ModelError, match=r"unknown role 'wieght' .*Did you mean 'weight'\?"):
        fp8fx.qat(net(), {"input": "e4m3fn", "wieght": "int8"}, data=[torch.randn(2, 8)])


def test_the_text_of_an_arithmetic_is_shown_where_no_key_is_near() -> None:
    with pytest.raises(fp8fx.ModelError, match="Write key=value, as in 'multiplier=mitchell/accumulate=float16'"):
        matmul(torch.ones(2, 2), torch.ones(2, 2), "mitchell")


def test_search_says_which_layers_were_left_out_by_request() -> None:
    result = fp8fx.search(net(), [torch.randn(4, 8)], formats=("e4m3fn",), layers=["0"], base={"extends": "hybrid"})
    assert result.left == ["2: left out by layers=..."]


def test_a_misspelt_dtype_of_an_input_is_answered_with_one_that_models_read() -> None:
    with pytest.raises(fp8fx.ModelError, match=r"Did you mean 'int64'\?"):
        sample_inputs(["2x8:int65"], net())


def test_the_package_runs_as_a_module(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-P", "-m", "fp8fx", "recipe", "show", "hybird"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Did you mean 'hybrid'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_sources_that_are_not_installed_say_so(tmp_path: Path) -> None:
    """As in a checkout after `pip install .`: its own folder hides the copy that was installed."""
    shutil.copytree(Path(fp8fx.__file__).parent, tmp_path / "fp8fx", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-S", "-c", "import fp8fx"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "ImportError: fp8fx is imported from its sources" in done.stderr
    assert "`pip install -e .`" in done.stderr


def test_the_sensitivity_command_repeats_with_its_seed(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "def model(): return torch.nn.Sequential(torch.nn.Linear(8, 4))\n"
        "def data(): return [(torch.randn(4, 8), torch.randint(0, 4, (4,)))]\n"
    )

    def losses(seed: str) -> str:
        arguments = ["sensitivity", f"{tmp_path}/own.py:model", "--data", f"{tmp_path}/own.py:data", "--seed", seed, "--no-switch-off"]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        return done.output

    assert losses("0") == losses("0") != losses("1")


def test_a_copy_folded_in_training_computes_what_evaluation_does() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    model(torch.randn(4, 2, 3, 3) * 2 + 1)
    x = torch.randn(2, 2, 3, 3)
    folded = fp8fx.fold_batchnorm(model.train())
    torch.testing.assert_close(folded(x), model.eval()(x))
