"""Blocks of transformers as the libraries write them, without the libraries."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class GELUActivation(nn.Module):
    """An activation as a module around a function."""

    def __init__(self) -> None:
        super().__init__()
        self.act = functional.gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


def composite_gelu(x: Tensor) -> Tensor:
    """Return GPT-2's approximation of GELU, written out."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class NewGELUActivation(nn.Module):
    """GPT-2's activation: PyTorch's tanh formula as composite operations."""

    def forward(self, input: Tensor) -> Tensor:
        return composite_gelu(input)


class Conv1D(nn.Module):
    """GPT-2's projection ``y = x W + b``."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


class RMSNorm(nn.Module):
    """Llama's norm, written out."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


# Conversion knows these by the name and the package of their class.
for _cls in (Conv1D, GELUActivation, NewGELUActivation):
    _cls.__module__ = "transformers.written.by.hand"


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return ``[B, T, H * D]`` as ``[B, H, T, D]``."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, kind: str, *, causal: bool = False) -> Tensor:
    """Return the attention's output ``[B, T, H * D]``, fused (``"sdpa"``) or step by step (``"eager"``)."""
    if kind == "sdpa":
        output = functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
    else:
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
        if causal:
            length = query.shape[-2]
            scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        output = torch.matmul(torch.softmax(scores, dim=-1), value)
    return output.transpose(1, 2).reshape(query.shape[0], query.shape[2], -1)


class BertBlock(nn.Module):
    """Attention and feed-forward with norms after the sums, dropout off (BERT, MiniLM)."""

    def __init__(self, width: int, heads: int, attention: str = "sdpa") -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)
        self.up, self.activation, self.down = nn.Linear(width, 4 * width), GELUActivation(), nn.Linear(4 * width, width)
        self.out_norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        parts = (split_heads(layer(x), self.heads) for layer in (self.query, self.key, self.value))
        x = self.norm(self.dense(attend(*parts, kind=self.attention)) + x)
        return self.out_norm(self.down(self.activation(self.up(x))) + x)


class GptBlock(nn.Module):
    """Norms before, fused projections as ``Conv1D``, the written-out activation (GPT-2)."""

    def __init__(self, width: int, heads: int, attention: str = "sdpa", activation: type = NewGELUActivation) -> None:
        super().__init__()
        self.heads, self.attention, self.width = heads, attention, width
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = Conv1D(3 * width, width), Conv1D(width, width)
        self.c_fc, self.act, self.c_out = Conv1D(4 * width, width), activation(), Conv1D(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        parts = (split_heads(part, self.heads) for part in self.c_attn(self.ln_1(x)).split(self.width, dim=2))
        x = x + self.c_proj(attend(*parts, kind=self.attention, causal=True))
        return x + self.c_out(self.act(self.c_fc(self.ln_2(x))))


class LlamaBlock(nn.Module):
    """RMS norms before, projections without biases, rotary positions left out, a gated feed-forward."""

    def __init__(self, width: int, heads: int, norm: type = nn.RMSNorm, activation: type = nn.SiLU) -> None:
        super().__init__()
        self.heads, inner = heads, 8 * width // 3
        self.input_layernorm, self.post_attention_layernorm = norm(width), norm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(inner, width, bias=False), activation()

    def forward(self, x: Tensor) -> Tensor:
        h = self.input_layernorm(x)
        parts = (split_heads(layer(h), self.heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.o_proj(attend(*parts, kind="sdpa", causal=True))
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(self.act_fn(self.gate_proj(h)) * self.up_proj(h))
