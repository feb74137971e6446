"""timm's models, one or two of each family: a small variant, a small image, fewer blocks where a family is deep."""

from __future__ import annotations

from typing import Any

import torch
from models.case import Case, Entry, wake_blocks, wake_head, without_randomness


def _timm(name: str, size: int, **options: Any) -> Case:
    import timm

    model: Any = wake_blocks(without_randomness(timm.create_model(name, pretrained=False, num_classes=10, **options).train()))
    heads = model.default_cfg["classifier"]
    for head in (heads,) if isinstance(heads, str) else heads:
        wake_head(model.get_submodule(head))
    return Case(name, model, {"x": torch.randn(2, 3, size, size)}, torch.randint(0, 10, (2,)))


def _entry(name: str, size: int, loss_scale: float = 4096.0, **options: Any) -> Entry:
    return Entry("timm", lambda: _timm(name, size, **options), loss_scale)


# name -> image size and options of the model
_MODELS: dict[str, dict[str, Any]] = {
    # convolutions
    "resnet18": {"size": 96},
    "resnext26ts": {"size": 64},
    "regnety_002": {"size": 64, "loss_scale": 16.0},
    "densenet121": {"size": 64, "block_config": (2, 2, 2, 2)},
    "nf_resnet26": {"size": 64},
    "mobilenetv2_100": {"size": 96, "loss_scale": 16.0},
    "mobilenetv3_small_050": {"size": 96},
    "efficientnet_b0": {"size": 64},
    "convnext_atto": {"size": 64},
    "inception_next_atto": {"size": 64},
    # attention
    "vit_tiny_patch16_224": {"size": 64, "img_size": 64},
    "deit_tiny_distilled_patch16_224": {"size": 64, "img_size": 64, "depth": 4},
    "eva02_tiny_patch14_224": {"size": 56, "img_size": 56, "depth": 4},
    "beit_base_patch16_224": {"size": 64, "img_size": 64, "depth": 3, "embed_dim": 96, "num_heads": 4},
    "cait_xxs24_224": {"size": 64, "img_size": 64, "depth": 4},
    "swin_tiny_patch4_window7_224": {
        "size": 56, "img_size": 56, "depths": (2, 2, 2), "embed_dim": 48, "num_heads": (3, 6, 12)
    },
    "pvt_v2_b0": {"size": 64},
    # both
    "mobilevit_xxs": {"size": 64},
    "edgenext_xx_small": {"size": 64},
    "coat_tiny": {"size": 64, "img_size": 64, "serial_depths": (1, 1, 1, 1), "parallel_depth": 1},
    # neither
    "mixer_s32_224": {"size": 64, "img_size": 64},
    "resmlp_12_224": {"size": 64, "img_size": 64},
    "poolformer_s12": {"size": 64},
}  # fmt: skip

MODELS: dict[str, Entry] = {name: _entry(name, **options) for name, options in _MODELS.items()}
