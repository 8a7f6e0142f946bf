"""Models that scans are tried on."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


class Branches(nn.Module):
    """Two layers that share an input, as queries and keys do."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(16, 32)
        self.head = nn.Linear(32, 8)

    def forward(self, x):
        return self.head(self.first(x) + self.second(x))


class Block(nn.Module):
    """A residual block that multiplies outside of its layers, too."""

    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.mixing = nn.Parameter(torch.randn(width, width))

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x @ self.mixing)))


class Shared(nn.Module):
    """One block in two parents, called three times in all."""

    def __init__(self):
        super().__init__()
        block = Block(8)
        self.left = nn.Sequential(block)
        self.right = nn.Sequential(block, block)

    def forward(self, x):
        return self.left(x) + self.right(x)


class Checkpointed(nn.Module):
    """Layers around a checkpoint; what is checkpointed is a module, a method with modules, or operations alone."""

    def __init__(self, kind, use_reentrant):
        super().__init__()
        self.before = nn.Linear(16, 16)
        self.block = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.mixing = nn.Parameter(torch.randn(16, 16))
        self.after = nn.Linear(16, 4)
        self.part = {"module": self.block, "method": self.mix_and_run, "operations": self.mix}[kind]
        self.use_reentrant = use_reentrant

    def mix_and_run(self, x):
        return self.block(torch.tanh(x @ self.mixing)) @ self.mixing

    def mix(self, x):
        return torch.tanh(x @ self.mixing) @ self.mixing

    def forward(self, x):
        return self.after(checkpoint(self.part, self.before(x), use_reentrant=self.use_reentrant))


class ModelOutput(OrderedDict):
    """Entries that are attributes as well, as in the outputs of language-model libraries."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class SelfAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, hidden, attention_mask=None):
        query, key, value = (
            layer(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return (self.output(mixed.transpose(1, 2).flatten(2)),)


class EncoderLayer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.attention_norm = nn.LayerNorm(width)
        self.intermediate = nn.Linear(width, 4 * width)
        self.output = nn.Linear(4 * width, width)
        self.output_norm = nn.LayerNorm(width)

    def forward(self, hidden, attention_mask=None):
        hidden = self.attention_norm(hidden + self.attention(hidden, attention_mask=attention_mask)[0])
        grown = functional.gelu(self.intermediate(hidden))
        return self.output_norm(hidden + self.output(grown))


class TinyBert(nn.Module):
    """An encoder with the calling convention of Hugging Face: keywords in, an output object with a loss out."""

    def __init__(self, vocabulary=32, width=16, heads=2, layers=2, classes=3):
        super().__init__()
        self.embeddings = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(EncoderLayer(width, heads) for _ in range(layers))
        self.classifier = nn.Linear(width, classes)

    def forward(self, input_ids=None, attention_mask=None, labels=None, return_dict=True):
        hidden = self.embeddings(input_ids)
        states = [hidden]
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=attention_mask)
            states.append(hidden)
        logits = self.classifier(hidden[:, 0])
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        if not return_dict:
            return (loss, logits)
        entries = {"loss": loss, "logits": logits, "hidden_states": tuple(states)}
        return ModelOutput({name: value for name, value in entries.items() if value is not None})


def make_batch(batch=4, tokens=6, vocabulary=32, classes=3):
    """Return a batch for `TinyBert`."""
    return {
        "input_ids": torch.randint(0, vocabulary, (batch, tokens)),
        "attention_mask": torch.ones(batch, tokens, dtype=torch.int64),
        "labels": torch.randint(0, classes, (batch,)),
    }


@dataclasses.dataclass
class Pair:
    """An output object that is neither a tuple nor a dictionary."""

    logits: torch.Tensor
    note: str = "not a tensor"


class ReturnsPair(nn.Linear):
    def forward(self, x):
        return Pair(super().forward(x))


def make_network():
    """Return a small picture classifier with a batch."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, groups=4, stride=2),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(8 * 3 * 3, 10),
    )
    return model, torch.randn(4, 3, 16, 16)
