"""Quantize a trained ResNet for handwritten digits after training (PTQ), then train it further under quantization (QAT), in five formats.

python examples/ptq_qat_digits.py [--tiny]        needs scikit-learn: pip install 'fp8fx[demo]'

Weights and inputs of every layer are in the row's format; E4M3 and its kin have no code for NaN here, as in "FP8 Quantization: The Power
of the Exponent" (Kuzmin et al., 2022). `channel` has one scale per output channel of the weights. Batch norms are folded for PTQ; QAT
keeps them, learns the largest value of every tensor with the weights, and estimates the norms' statistics again at the end. Both run
through fp8fx.compile, from recipes. Printed: held-out accuracy and loss, and how far PTQ moves the logits, 20 log10(|y| / |y - Q(y)|).
--tiny runs two formats for a few steps.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp8fx
from fp8fx.demo.data import Pictures, digits, picture_batches
from fp8fx.demo.models import DigitsResNet

FORMATS = {"E5M2": "e5m2none", "E4M3": "e4m3none", "E3M4": "e3m4none", "E2M5": "e2m5none", "INT8": "int8"}


def recipe(format: str, granularity: str) -> dict[str, Any]:
    """Weights and inputs in `format`, gradients in high precision."""
    weight = {"format": format, "granularity": "row" if granularity == "channel" else "tensor"}
    return {"extends": "hybrid", "defaults": {"input": {"format": format}, "weight": weight, "grad_output": "none"}}


def train(model: nn.Module, pictures: Pictures, steps: int, lr: float, quantizers: list[nn.Parameter] | None = None) -> None:
    learned = {id(parameter) for parameter in quantizers or []}
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if id(p) not in learned], "lr": lr}]
    if quantizers:  # logarithms to base 2 of the largest values: a rate of their own, and no decay towards 1
        groups.append({"params": quantizers, "lr": 1e-2, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for inputs, labels in picture_batches(pictures, 64, steps, seed=0):
        loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def logits(model: nn.Module, pictures: Pictures) -> Tensor:
    return model.eval()(pictures.held_out)


def scores(y: Tensor, pictures: Pictures) -> str:
    right = (y.argmax(1) == pictures.held_out_labels).float().mean().item()
    return f"{right:>8.2%} {F.cross_entropy(y, pictures.held_out_labels).item():>7.4f}"


def main(tiny: bool = False) -> None:
    torch.set_num_threads(1)  # these layers are too small to gain from a second thread
    torch.manual_seed(0)
    start, pictures = time.perf_counter(), digits()
    steps, fine = (20, 3) if tiny else (200, 30)
    model = DigitsResNet(width=8 if tiny else 32)
    train(model, pictures, steps, lr=3e-3)
    reference = logits(model, pictures)
    print(f"float32 {' ' * 11}{scores(reference, pictures)}     ({steps} steps of training)\n")
    print(f"{'format':<7} {'scales':<8} {'PTQ':>10} {'loss':>7} {'logits':>9} {'QAT':>10} {'loss':>7}")

    calibration = list(pictures.train[:256].split(64))
    folded = fp8fx.fold_batchnorm(model.eval(), calibration[0])
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for name, format in list(FORMATS.items())[:: 4 if tiny else 1]:
        for granularity in ("tensor", "channel"):
            base = recipe(format, granularity)
            if granularity == "tensor":
                found = fp8fx.search(folded, calibration, formats=format, base=base, progress=False)
            else:  # inputs stay as found
                found = fp8fx.search(
                    folded, calibration, formats=format, granularities="row", roles="weight", base=found.recipe, progress=False
                )
            ptq = logits(fp8fx.compile(folded, found.recipe), pictures)
            moved = 20 * torch.log10(reference.norm() / (reference - ptq).norm())

            model.load_state_dict(state)
            trained = fp8fx.qat(model, base, data=calibration)
            train(trained, pictures, fine, lr=3e-4, quantizers=fp8fx.quantizer_parameters(trained))
            fp8fx.recalibrate_batchnorm(trained, list(pictures.train[:1024].split(256)))
            qat = logits(fp8fx.compile(model, trained.recipe()), pictures)
            print(f"{name:<7} {granularity:<8} {scores(ptq, pictures):>18} {moved:>6.1f} dB {scores(qat, pictures):>18}", flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="two formats, for a few steps")
    main(**vars(parser.parse_args()))
