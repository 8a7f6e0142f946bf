"""Bytes held for backward, against literal lists of what PyTorch saves."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cheapgrad.cost import measure_held_bytes
from cheapgrad.errors import ForwardResultError

FLOAT_BYTES = 4


def held(function, *exclude):
    return [storage.storage_bytes for storage in measure_held_bytes(function, exclude=exclude).storages]


def test_linear_holds_its_input_only():
    layer = nn.Linear(8, 16)
    rows_NI = torch.randn(32, 8)
    assert held(lambda: layer(rows_NI), layer) == [32 * 8 * FLOAT_BYTES]


def test_linear_holds_its_weight_where_the_input_needs_a_gradient():
    layer = nn.Linear(8, 16)
    rows_NI = torch.randn(32, 8, requires_grad=True)
    counted = measure_held_bytes(lambda: layer(rows_NI), exclude=[layer])
    assert counted.total_bytes == 32 * 8 * FLOAT_BYTES
    assert counted.excluded_bytes == 16 * 8 * FLOAT_BYTES
    assert held(lambda: layer(rows_NI)) == [32 * 8 * FLOAT_BYTES, 16 * 8 * FLOAT_BYTES]


def test_frozen_linear_holds_no_input():
    layer = nn.Linear(8, 16).requires_grad_(False)
    rows_NI = torch.randn(32, 8, requires_grad=True)
    counted = measure_held_bytes(lambda: layer(rows_NI), exclude=[layer])
    assert counted.total_bytes == 0
    assert counted.excluded_bytes == 16 * 8 * FLOAT_BYTES


def test_relu_shares_its_output_with_the_next_layer():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    rows_NI = torch.randn(32, 8)
    counted = measure_held_bytes(lambda: model(rows_NI), exclude=[model])
    assert [storage.storage_bytes for storage in counted.storages] == [32 * 16 * FLOAT_BYTES, 32 * 8 * FLOAT_BYTES]
    assert [storage.references for storage in counted.storages] == [2, 1]


def test_gelu_holds_its_input_beside_the_next_layers_input():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    rows_NI = torch.randn(32, 8)
    assert held(lambda: model(rows_NI), model) == [32 * 16 * FLOAT_BYTES, 32 * 16 * FLOAT_BYTES, 32 * 8 * FLOAT_BYTES]


def test_layer_norm_holds_input_mean_and_inverse_deviation():
    norm = nn.LayerNorm(16)
    rows_NI = torch.randn(32, 16)
    assert held(lambda: norm(rows_NI), norm) == [32 * 16 * FLOAT_BYTES, 32 * FLOAT_BYTES, 32 * FLOAT_BYTES]


def test_max_pool_holds_input_and_eight_byte_indices():
    image = torch.randn(2, 3, 8, 8, requires_grad=True)
    outputs = 2 * 3 * 4 * 4
    assert held(lambda: functional.max_pool2d(image, 2)) == [2 * 3 * 8 * 8 * FLOAT_BYTES, outputs * 8]


def test_dropout_holds_a_mask_of_floats_on_the_cpu():
    rows_ND = torch.randn(32, 16, requires_grad=True)
    assert held(lambda: functional.dropout(rows_ND, 0.5)) == [32 * 16 * FLOAT_BYTES]


def test_cross_entropy_holds_log_probabilities_and_targets():
    logits_BC = torch.randn(32, 10, requires_grad=True)
    targets_B = torch.zeros(32, dtype=torch.int64)
    counted = measure_held_bytes(lambda: functional.cross_entropy(logits_BC, targets_B))
    assert counted.total_bytes == 32 * 10 * FLOAT_BYTES + 32 * 8 + FLOAT_BYTES
    assert counted.storages[0].shape == (32, 10)
    assert counted.storages[0].dtype == "float32"


def test_attention_holds_query_key_value_output_and_log_sum():
    query, key, value = (torch.randn(2, 4, 16, 8, requires_grad=True) for _ in range(3))
    one_tensor = 2 * 4 * 16 * 8 * FLOAT_BYTES
    assert held(lambda: functional.scaled_dot_product_attention(query, key, value)) == [
        *[one_tensor] * 4,
        2 * 4 * 16 * FLOAT_BYTES,
    ]


def test_view_counts_as_the_storage_it_keeps_alive():
    rows_ND = torch.randn(64, 32)
    weight = torch.randn(4, 8, requires_grad=True)
    assert held(lambda: functional.linear(rows_ND[:, :8], weight)) == [64 * 32 * FLOAT_BYTES]
    assert held(lambda: functional.linear(rows_ND[:, :8].clone(), weight)) == [64 * 8 * FLOAT_BYTES]


def test_two_views_of_one_storage_count_once():
    rows_ND = torch.randn(64, 32)
    weight = torch.randn(4, 16, requires_grad=True)
    counted = measure_held_bytes(
        lambda: functional.linear(rows_ND[:, :16], weight) + functional.linear(rows_ND[:, 16:], weight)
    )
    assert counted.total_bytes == 64 * 32 * FLOAT_BYTES
    assert counted.storages[0].references == 2


def test_dropped_branch_is_not_held():
    layer = nn.Linear(8, 16)
    rows_NI = torch.randn(32, 8)

    def forward_with_a_discarded_branch():
        layer(rows_NI).exp()
        return layer(rows_NI)

    assert held(forward_with_a_discarded_branch, layer) == [32 * 8 * FLOAT_BYTES]


def test_freed_addresses_do_not_hide_later_tensors():
    # Every pass frees its tensors, so the next one's are likely to get the same addresses.
    weight = torch.randn(64, 64, requires_grad=True)

    def forward():
        output = torch.randn(64, 64)
        for _ in range(6):
            output = (output @ weight).exp()
        return output

    # Each `exp` holds its output, the first product holds the random input, and the weight is held as well.
    expected = [64 * 64 * FLOAT_BYTES] * 8
    assert all(held(forward) == expected for _ in range(5))


def test_checkpoint_holds_only_its_input():
    block = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    rows_NI = torch.randn(32, 16, requires_grad=True)
    for use_reentrant in (False, True):
        counted = measure_held_bytes(
            lambda reentrant=use_reentrant: checkpoint(block, rows_NI, use_reentrant=reentrant), exclude=[block]
        )
        floats = [storage for storage in counted.storages if storage.dtype == "float32"]
        assert [storage.storage_bytes for storage in floats] == [32 * 16 * FLOAT_BYTES]
        # What may remain beside the input is the state of the random generator, kept for the second forward pass.
        assert all(storage.hidden for storage in counted.storages if storage.dtype != "float32")


def test_autocast_linear_holds_half_the_bytes():
    layer = nn.Linear(16, 8)
    rows_NI = torch.randn(32, 16)

    def forward():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(rows_NI)

    assert held(forward, layer) == [32 * 16 * 2]


class _KeepsAnAttribute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        ctx.save_for_backward(tensor)
        ctx.scratch = {"mask": torch.ones(100, dtype=torch.uint8)}
        return tensor * 2

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent * 2


def test_attributes_of_a_custom_function_are_found():
    leaf = torch.randn(10, requires_grad=True)
    counted = measure_held_bytes(lambda: _KeepsAnAttribute.apply(leaf).sum())
    assert [(storage.storage_bytes, storage.hidden) for storage in counted.storages] == [(100, True), (40, False)]


def test_sparse_matrix_counts_values_and_indices():
    dense_weight = torch.randn(8, 4, requires_grad=True)
    sparse = torch.eye(8).to_sparse_coo().coalesce()
    counted = measure_held_bytes(lambda: torch.sparse.mm(sparse, dense_weight), exclude=[dense_weight])
    assert counted.total_bytes == 8 * FLOAT_BYTES + 2 * 8 * 8


def test_buffers_and_tensors_can_be_excluded():
    norm = nn.BatchNorm1d(4)
    rows_ND = torch.randn(8, 4)
    counted = measure_held_bytes(lambda: norm(rows_ND), exclude=[norm, rows_ND])
    assert [storage.storage_bytes for storage in counted.storages] == [4 * FLOAT_BYTES] * 2
    assert counted.excluded_bytes >= 8 * 4 * FLOAT_BYTES


def test_nothing_is_held_without_gradients():
    layer = nn.Linear(8, 16)
    with torch.no_grad():
        assert measure_held_bytes(lambda: layer(torch.ones(2, 8))).total_bytes == 0


def test_tuple_results_keep_their_graphs():
    layer = nn.Linear(8, 16)
    rows_NI = torch.randn(32, 8)
    assert held(lambda: {"outputs": [layer(rows_NI)]}, layer) == [32 * 8 * FLOAT_BYTES]


def test_backward_still_works_after_the_count():
    layer = nn.Linear(8, 4)
    rows_NI = torch.randn(3, 8)
    losses = []
    measure_held_bytes(lambda: losses.append(layer(rows_NI).sum()) or losses[0])
    losses[0].backward()
    torch.testing.assert_close(layer.weight.grad, rows_NI.sum(0).expand(4, 8))


def test_function_that_returns_nothing_is_refused():
    layer = nn.Linear(8, 4)

    def forward():
        layer(torch.ones(2, 8))

    with pytest.raises(ForwardResultError, match="returned None"):
        measure_held_bytes(forward)


def test_hooks_are_removed_when_the_function_fails():
    layer = nn.Linear(8, 4)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        measure_held_bytes(lambda: layer(torch.ones(2, 9)))
    rows_NI = torch.ones(2, 8)
    saved = layer(rows_NI).grad_fn._saved_mat1
    assert saved.data_ptr() == rows_NI.data_ptr()


def test_record_is_json():
    layer = nn.Linear(8, 4)
    counted = measure_held_bytes(lambda: layer(torch.ones(2, 8)), exclude=[layer])
    assert json.loads(json.dumps(counted.to_dict()))["storages"][0] == {
        "storage_bytes": 64,
        "shape": [2, 8],
        "dtype": "float32",
        "references": 1,
        "hidden": False,
    }
