"""FLOPs of single layers, against closed forms and counts one by one; and against torch's counter where it is right."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cheapgrad
from cheapgrad.sketch import RowSample
from tests.cost.models import make_network
from tests.devices import DEVICES
from tests.oracles.products import (
    attention_flops,
    convolution_flops,
    recurrent_flops,
    transposed_convolution_flops,
)

BATCH = 3


def count(model, *inputs, **kwargs):
    total = cheapgrad.scan(model, *inputs, **kwargs).total
    assert total.recompute_flops == 0
    return total.forward_flops, total.backward_flops


@pytest.mark.parametrize("leading", [(), (5,), (5, 7)])
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_linear(leading, needs_grad, frozen):
    layer = nn.Linear(6, 4)
    layer.weight.requires_grad_(not frozen)
    x = torch.randn(*leading, 6, requires_grad=needs_grad)
    product = 2 * x[..., 0].numel() * 6 * 4
    assert count(layer, x) == (product, (needs_grad + (not frozen)) * product)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("stride", "dilation", "padding"), [(1, 1, 0), (2, 1, 1), (1, 2, 2)])
def test_convolution(needs_grad, axes, groups, stride, dilation, padding):
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    layer = make(4, 8, 3, stride, padding, dilation, groups)
    x = torch.randn(2, 4, *[6] * axes, requires_grad=needs_grad)
    sizes = layer(x).shape[2:]
    product = convolution_flops(2, 4, 8, groups, [3] * axes, sizes)
    assert count(layer, x) == (product, (1 + needs_grad) * product)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_transposed_convolution(needs_grad, groups, stride, dilation):
    layer = nn.ConvTranspose2d(4, 8, 3, stride, groups=groups, dilation=dilation)
    x = torch.randn(2, 4, 5, 6, requires_grad=needs_grad)
    product = transposed_convolution_flops(2, 4, 8, groups, (3, 3), (5, 6))
    assert count(layer, x) == (product, (1 + needs_grad) * product)


@pytest.mark.gpu
def test_layers_on_the_gpu():
    x = torch.randn(2, 4, 6, 6, requires_grad=True, device="cuda")
    product = convolution_flops(2, 4, 8, 2, (3, 3), (4, 4))
    assert count(nn.Conv2d(4, 8, 3, groups=2).cuda(), x) == (product, 2 * product)
    product = transposed_convolution_flops(2, 4, 8, 2, (3, 3), (6, 6))
    assert count(nn.ConvTranspose2d(4, 8, 3, groups=2).cuda(), x) == (product, 2 * product)
    product = 2 * 2 * 4 * 6 * 6 * 5
    assert count(nn.Linear(6, 5).cuda(), x) == (product, 2 * product)


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, query, key, value):
        return functional.scaled_dot_product_attention(query, key, value, **self.options)


def make_heads(device, *, heads=4, key_heads=4, queries=6, keys=6):
    query = torch.randn(2, heads, queries, 8, requires_grad=True, device=device)
    rest = [torch.randn(2, key_heads, keys, 8, requires_grad=True, device=device) for _ in range(2)]
    return query, *rest


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention(device, causal):
    backend = SDPBackend.FLASH_ATTENTION if device == "cpu" else SDPBackend.EFFICIENT_ATTENTION
    with sdpa_kernel(backend):
        counted = count(Attention(is_causal=causal), *make_heads(device))
    assert counted == attention_flops(2, 4, 6, 6, 8, 8)


def test_fused_attention_between_sequences_of_other_lengths():
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        counted = count(Attention(), *make_heads("cpu", queries=6, keys=10))
    assert counted == attention_flops(2, 4, 6, 10, 8, 8)


def test_fused_attention_of_grouped_queries():
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        counted = count(Attention(enable_gqa=True), *make_heads("cpu", heads=4, key_heads=2))
    assert counted == attention_flops(2, 4, 6, 6, 8, 8)


@pytest.mark.parametrize("device", DEVICES)
def test_unfused_attention_does_not_compute_its_scores_again(device):
    forward, fused_backward = attention_flops(2, 4, 6, 6, 8, 8)
    with sdpa_kernel(SDPBackend.MATH):
        counted = count(Attention(), *make_heads(device))
    assert counted == (forward, fused_backward - forward // 2)


@pytest.mark.parametrize("needs_weights", [False, True])
def test_multihead_attention(needs_weights):
    layer = nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 6, 16, requires_grad=True)
    projections = 4 * 2 * (2 * 6) * 16 * 16
    forward, backward = attention_flops(2, 4, 6, 6, 4, 4)
    if needs_weights:
        backward -= forward // 2
    report = cheapgrad.scan(layer, x, x, x, need_weights=needs_weights)
    assert report.row("").forward_flops == projections + forward
    assert report.row("").backward_flops == 2 * projections + backward


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2}], ids=str)
def test_lstm(device, options):
    layer = nn.LSTM(5, 7, batch_first=True, **options).to(device)
    forward = recurrent_flops(
        4, BATCH, 6, 5, 7, layers=options.get("num_layers", 1), directions=1 + options.get("bidirectional", False)
    )
    x = torch.randn(BATCH, 6, 5, requires_grad=True, device=device)
    assert count(layer, x) == (forward, 2 * forward)


def test_lstm_step_by_step():
    # Packed sequences run as products of matrices; the initial state needs no gradient.
    layer = nn.LSTM(5, 7)
    lengths = [4, 3, 1]
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(4, 3, 5), lengths)

    class OfPacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, data):
            return self.layer(packed._replace(data=data))[0].data

    forward = 2 * sum(lengths) * 4 * 7 * (5 + 7)
    data = packed.data.clone().requires_grad_()
    assert count(OfPacked(), data) == (forward, 2 * forward - 2 * len(lengths) * 4 * 7 * 7)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_gru(needs_grad):
    layer = nn.GRU(5, 7)
    x = torch.randn(6, BATCH, 5, requires_grad=needs_grad)
    forward = recurrent_flops(3, BATCH, 6, 5, 7)
    of_input, of_state = 2 * BATCH * 6 * 3 * 7 * 5, 2 * BATCH * 3 * 7 * 7
    # The first state needs no gradient.
    assert count(layer, x) == (forward, 2 * forward - of_state - (0 if needs_grad else of_input))


@pytest.mark.gpu
def test_gru_on_the_gpu():
    layer = nn.GRU(5, 7).cuda()
    forward = recurrent_flops(3, BATCH, 6, 5, 7)
    x = torch.randn(6, BATCH, 5, requires_grad=True, device="cuda")
    assert count(layer, x) == (forward, 2 * forward)


def test_lookups_multiply_nothing():
    rows = torch.randint(0, 10, (12,))
    for layer, inputs in ((nn.Embedding(10, 8), (rows,)), (nn.EmbeddingBag(10, 8), (rows, torch.tensor([0, 4])))):
        report = cheapgrad.scan(layer, *inputs)
        assert (report.total.flops, report.uncounted) == (0, ())


def test_weighted_embedding_bag():
    layer = nn.EmbeddingBag(10, 8, mode="sum")
    rows, starts = torch.randint(0, 10, (12,)), torch.tensor([0, 4])
    weights = torch.randn(12)
    assert count(layer, rows, starts, per_sample_weights=weights) == (2 * 12 * 8, 2 * 12 * 8)
    assert count(layer, rows, starts, per_sample_weights=weights.requires_grad_()) == (2 * 12 * 8, 4 * 12 * 8)


class Products(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


SQUARE, VECTOR = torch.randn(5, 7), torch.randn(7)


@pytest.mark.parametrize(
    ("function", "inputs", "forward", "backward"),
    [
        (torch.mv, (SQUARE, VECTOR), 70, 70),
        (torch.dot, (VECTOR, VECTOR), 14, 0),
        (lambda a, x: torch.addmv(a[:, 0], a, x), (SQUARE, VECTOR), 70, 70),
        (lambda a, x: torch.einsum("ij,kj->ik", a, a), (SQUARE, VECTOR), 350, 700),
        (lambda a, x: torch.addbmm(a @ a.T, a[None], a.T[None]), (SQUARE, VECTOR), 700, 1400),
        (lambda a, x: torch.eye(5).to_sparse() @ a, (SQUARE, VECTOR), 2 * 5 * 7, 2 * 5 * 7),
    ],
    ids=["mv", "dot", "addmv", "einsum", "addbmm", "sparse"],
)
def test_products_torch_does_not_count(function, inputs, forward, backward):
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    counted = count(Products(function), *inputs)
    assert counted == (forward, backward)


def test_bilinear_form_takes_three_steps_for_each_term():
    terms = 3 * 4 * 5 * 6
    layer = nn.Bilinear(4, 5, 6)
    counted = count(layer, torch.randn(3, 4, requires_grad=True), torch.randn(3, 5, requires_grad=True))
    assert counted == (3 * terms, 9 * terms)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_sampled_linear(needs_grad):
    rows, kept, inputs, outputs = 64, 16, 8, 12
    layer = nn.Linear(inputs, outputs)
    cheapgrad.approximate(layer, cheapgrad.Rule(stored=RowSample(keep=kept / rows)), skip_small=False)
    report = cheapgrad.scan(layer, torch.randn(rows, inputs, requires_grad=needs_grad))
    exact, sampled = 2 * rows * inputs * outputs, 2 * kept * inputs * outputs
    assert report.total.forward_flops == exact
    assert report.total.backward_flops == needs_grad * exact + sampled
    assert report.total.saved_bytes == 4 * kept * inputs + 8 * kept


def test_total_is_that_of_torch_where_torch_is_right():
    encoder = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.GRU(16, 8))
    with sdpa_kernel(SDPBackend.MATH):
        for model, x in ((encoder, torch.randn(2, 5, 16)), (nn.Sequential(*make_network()[0][:4]), make_network()[1])):
            with FlopCounterMode(display=False) as counter:
                output = model(x)
                (output[0] if isinstance(output, tuple) else output).sum().backward()
            assert cheapgrad.scan(model, x).total.flops == counter.get_total_flops()
