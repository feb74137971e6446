"""Eight families of transformers, two layers each: decoders, an encoder, encoder and decoder, images, speech, a mixture of experts."""

from __future__ import annotations

from typing import Any

import torch
from models.case import Case, Entry, wake_head
from torch import nn

VOCABULARY = 256
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}


def _tokens(name: str, model: nn.Module, **options: Any) -> Case:
    tokens = torch.randint(3, VOCABULARY, (2, 25))
    return Case(name, model.train(), {"input_ids": tokens[:, :-1], **options}, tokens[:, 1:])


def _decoder(**options: Any) -> dict[str, Any]:
    """What the configurations of Llama and its relatives share."""
    return {
        "vocab_size": VOCABULARY, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "use_cache": False, "pad_token_id": None, **SPECIAL, **options,
    }  # fmt: skip


def _llama(**options: Any) -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _tokens("llama", LlamaForCausalLM(LlamaConfig(**_decoder(**options))))


def _qwen3(**options: Any) -> Case:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _tokens("qwen3", Qwen3ForCausalLM(Qwen3Config(**_decoder(head_dim=16, **options))))


def _mixtral(**options: Any) -> Case:
    """The default implementation of the experts: grouped_mm over tokens sorted by expert, two of four experts for each."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**_decoder(intermediate_size=128, num_local_experts=4, num_experts_per_tok=2, **options))
    return _tokens("mixtral", MixtralForCausalLM(config))


def _gpt2(**options: Any) -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=96, n_layer=2, n_head=4, n_positions=64, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **SPECIAL, **options,
    )  # fmt: skip
    return _tokens("gpt2", GPT2LMHeadModel(config))


def _bert(**options: Any) -> Case:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, num_labels=10,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options,
    )  # fmt: skip
    model = BertForSequenceClassification(config).train()
    wake_head(model.classifier)
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, 18:] = 0
    inputs = {"input_ids": torch.randint(3, VOCABULARY, (2, 24)), "attention_mask": mask}
    return Case("bert", model, inputs, torch.randint(0, 10, (2,)))


def _t5(**options: Any) -> Case:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY, d_model=96, d_kv=24, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0, use_cache=False,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, **options,
    )  # fmt: skip
    source = torch.randint(3, VOCABULARY, (2, 20))
    case = _tokens("t5", T5ForConditionalGeneration(config))
    return Case(case.name, case.model, {"input_ids": source, "decoder_input_ids": case.inputs["input_ids"]}, case.targets)


def _vit(**options: Any) -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, image_size=32, patch_size=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=10, **options,
    )  # fmt: skip
    model = ViTForImageClassification(config).train()
    wake_head(model.classifier)
    return Case("vit", model, {"pixel_values": torch.randn(2, 3, 32, 32)}, torch.randint(0, 10, (2,)))


def _whisper(**options: Any) -> Case:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCABULARY, d_model=96, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=256, decoder_ffn_dim=256, num_mel_bins=16, max_source_positions=20, max_target_positions=32,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, encoder_layerdrop=0.0, decoder_layerdrop=0.0, use_cache=False,
        pad_token_id=0, decoder_start_token_id=1, **SPECIAL, **options,
    )  # fmt: skip
    case = _tokens("whisper", WhisperForConditionalGeneration(config))
    inputs = {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": case.inputs["input_ids"]}
    return Case(case.name, case.model, inputs, case.targets)


_FAMILIES = {
    "llama": _llama, "qwen3": _qwen3, "mixtral": _mixtral, "gpt2": _gpt2, "bert": _bert, "t5": _t5, "vit": _vit, "whisper": _whisper,
}  # fmt: skip
# Attention as separate products, which are sites, or as torch's fused operator, which stays in high precision.
_ATTENTION = {
    "llama": ("eager", "sdpa"), "qwen3": ("sdpa",), "mixtral": ("sdpa",), "gpt2": ("eager", "sdpa"), "bert": ("eager", "sdpa"),
    "t5": ("eager",), "vit": ("sdpa",), "whisper": ("eager",),
}  # fmt: skip


def _entry(family: str, attention: str) -> Entry:
    return Entry("transformers", lambda: _FAMILIES[family](attn_implementation=attention))


MODELS: dict[str, Entry] = {
    f"{family}-{attention}": _entry(family, attention) for family, kinds in _ATTENTION.items() for attention in kinds
}
