"""The models that fp8fx must handle as they are: built small, with random weights, an input and a loss each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from oracle import cast
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Case:
    """A model in train mode without dropout, keyword arguments for one call, and integer targets for a cross-entropy."""

    name: str
    model: nn.Module
    inputs: dict[str, Any]
    targets: Tensor

    def logits(self, model: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
        output = model(**cast(self.inputs, dtype))
        return output if isinstance(output, Tensor) else output.logits

    def loss(self, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, -2), self.targets.flatten())


@dataclass(frozen=True)
class Entry:
    """How to make one case. `family`: timm or transformers.

    `loss_scale`: for recipes whose gradients have no scale, as a GradScaler would settle it: the largest of a few powers of 16 that
    overflows nowhere.
    """

    family: str
    build: Callable[[], Case]
    loss_scale: float = 4096.0


def _timm(name: str, size: int, **options: Any) -> Case:
    import timm

    model: Any = timm.create_model(name, pretrained=False, num_classes=10, **options).train()
    _wake_head(model.get_submodule(model.default_cfg["classifier"]))
    return Case(name, model, {"x": torch.randn(2, 3, size, size)}, torch.randint(0, 10, (2,)))


def _wake_head(head: nn.Module) -> None:
    """A head that starts at zero hides the model behind it: every gradient but its own would be zero."""
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.normal_(module.bias, std=0.1)


def _llama(**options: Any) -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        max_position_embeddings=64, use_cache=False, pad_token_id=None, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    return _tokens("llama", LlamaForCausalLM(config), 256)


def _gpt2(**options: Any) -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256, n_embd=96, n_layer=2, n_head=4, n_positions=64, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    return _tokens("gpt2", GPT2LMHeadModel(config), 256)


def _tokens(name: str, model: nn.Module, vocabulary: int) -> Case:
    tokens = torch.randint(3, vocabulary, (2, 25))
    return Case(name, model.train(), {"input_ids": tokens[:, :-1]}, tokens[:, 1:])


def _bert(**options: Any) -> Case:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=256, hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, max_position_embeddings=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options,
    )  # fmt: skip
    model = BertForSequenceClassification(config).train()
    _wake_head(model.classifier)
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, 18:] = 0
    inputs = {"input_ids": torch.randint(3, 256, (2, 24)), "attention_mask": mask}
    return Case("bert", model, inputs, torch.randint(0, 10, (2,)))


# timm's resnets start the last batch norm of a block at zero, which switches the block off: left out, as for a zero head.
ZOO: dict[str, Entry] = {
    "resnet18": Entry("timm", lambda: _timm("resnet18", 96, zero_init_last=False)),
    "mobilenetv2_100": Entry("timm", lambda: _timm("mobilenetv2_100", 96), loss_scale=16.0),
    "vit_tiny_patch16_224": Entry("timm", lambda: _timm("vit_tiny_patch16_224", 64, img_size=64)),
    "convnext_atto": Entry("timm", lambda: _timm("convnext_atto", 64)),
    "llama-eager": Entry("transformers", lambda: _llama(attn_implementation="eager")),
    "llama-sdpa": Entry("transformers", lambda: _llama(attn_implementation="sdpa")),
    "gpt2-eager": Entry("transformers", lambda: _gpt2(attn_implementation="eager")),
    "gpt2-sdpa": Entry("transformers", lambda: _gpt2(attn_implementation="sdpa")),
    "bert-eager": Entry("transformers", lambda: _bert(num_labels=10, attn_implementation="eager")),
    "bert-sdpa": Entry("transformers", lambda: _bert(num_labels=10, attn_implementation="sdpa")),
}


def build(name: str, seed: int = 0) -> Case:
    """The case `name` with weights and inputs from `seed`; the global random state is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return dataclasses.replace(ZOO[name].build(), name=name)
