"""What is known of operations that have no formula."""

from __future__ import annotations

from typing import Any

import torch

# Operations without arithmetic: they make, fill, copy, move, compare, draw or look up.
_MOVING = """
all allclose __and__ any arange argmax argmin argsort _assert_async _assert_tensor_metadata bernoulli bernoulli_
binomial bitwise_and_ bitwise_and bitwise_left_shift bitwise_left_shift_ bitwise_not bitwise_or_ bitwise_or
bitwise_right_shift_ bitwise_right_shift bitwise_xor_ bitwise_xor block_diag bucketize cat cauchy_ channel_shuffle
_chunk_cat clone coalesce _coalesce complex constant_pad_nd copy copy_ cummax cummin detach_ diag_embed
diagonal_backward _efficientzerotensor embedding_renorm_ empty empty_like empty_strided eq equal exponential_ eye
fill_ fill flip _foreach_copy_ _foreach_zero_ full full_like gather ge geometric_ gt histc __iand__ __ilshift__ im2col
index index_copy_ index_copy index_fill index_fill_ index_put index_put_ index_select _indices __ior__ __irshift__
_is_all_true is_nonzero is_same_size isfinite isinf isnan item __ixor__ kthvalue le lift lift_fresh_copy
_linalg_check_errors linspace _local_scalar_dense log_normal_ logical_and logical_not logical_or logical_xor
__lshift__ lt masked_fill_ masked_fill masked_scatter masked_scatter_ masked_select max_unpool2d max_unpool3d
multinomial narrow_copy ne new_empty new_empty_strided new_full new_ones new_zeros nonzero normal normal_ ones
ones_like __or__ _pack_padded_sequence pad_sequence _pin_memory pixel_shuffle pixel_unshuffle poisson promote_types
rand rand_like randint randint_like randn randn_like random_ randperm record_stream reflection_pad1d reflection_pad2d
reflection_pad3d repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d resize_ result_type
roll __rshift__ scalar_tensor scatter scatter_ searchsorted select_backward select_scatter set_ sign slice_backward
slice_scatter sort split_with_sizes_copy squeeze_ stack _standard_gamma sym_numel sym_size sym_stride t_ take _to_copy
_to_dense _to_sparse _to_sparse_csr topk transpose_ tril tril_indices triu triu_indices unbind_copy unfold_copy
uniform uniform_ _unique _unique2 unique_consecutive unique_dim unsafe_split unsafe_split_with_sizes _unsafe_view
unsqueeze_ upsample_nearest1d upsample_nearest2d upsample_nearest3d _values values_copy view_as_complex_copy
view_as_real_copy where __xor__ zero_ zeros zeros_like
"""

# Namespaces whose operations move data between processes or ask about tensors.
_MOVING_NAMESPACES = {
    "prim",
    "c10d",
    "_c10d_functional",
    "_c10d_functional_autograd",
    "c10d_functional",
    "fsdp",
    "_dtensor",
    "profiler",
}

# Operations whose arithmetic is a few steps for each element, though PyTorch does not tag them so.
_PER_ELEMENT = """
_adaptive_avg_pool2d _adaptive_avg_pool2d_backward _adaptive_avg_pool3d _adaptive_avg_pool3d_backward
adaptive_max_pool2d adaptive_max_pool2d_backward adaptive_max_pool3d adaptive_max_pool3d_backward add_ addr
affine_grid_generator _amp_foreach_non_finite_check_and_unscale_ avg_pool2d avg_pool2d_backward avg_pool3d
avg_pool3d_backward batch_norm_backward _batch_norm_with_update binary_cross_entropy binary_cross_entropy_backward
binary_cross_entropy_with_logits col2im cudnn_batch_norm cudnn_batch_norm_backward cumprod cumsum elu_backward
fake_quantize_per_channel_affine_cachemask fake_quantize_per_tensor_affine_cachemask _foreach_add_ _foreach_add
_foreach_mul_ _foreach_mul _foreach_norm fractional_max_pool2d fractional_max_pool2d_backward fractional_max_pool3d
fractional_max_pool3d_backward _fused_dropout _fused_moving_avg_obs_fq_helper _fused_rms_norm_backward gelu_backward
glu glu_backward grid_sampler_2d grid_sampler_2d_backward grid_sampler_3d grid_sampler_3d_backward hardshrink_backward
hardsigmoid_backward hardswish hardswish_backward hardtanh_backward huber_loss huber_loss_backward index_add
index_add_ leaky_relu_backward linalg_cross log_sigmoid_backward log_sigmoid_forward _log_softmax
_log_softmax_backward_data logcumsumexp _masked_softmax _masked_softmax_backward max_pool2d_with_indices
max_pool2d_with_indices_backward max_pool3d_with_indices max_pool3d_with_indices_backward median miopen_batch_norm
miopen_batch_norm_backward mish_backward mse_loss mse_loss_backward mul_ multi_margin_loss multi_margin_loss_backward
multilabel_margin_loss_backward multilabel_margin_loss_forward nansum native_batch_norm native_batch_norm_backward
_native_batch_norm_legit native_dropout native_dropout_backward native_group_norm native_group_norm_backward
native_layer_norm native_layer_norm_backward nll_loss2d_backward nll_loss2d_forward nll_loss_backward nll_loss_forward
norm polar _prelu_kernel _prelu_kernel_backward prod put_ reflection_pad1d_backward reflection_pad2d_backward
reflection_pad3d_backward renorm replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward
rrelu_with_noise rrelu_with_noise_backward _safe_softmax scatter_add scatter_add_ scatter_reduce segment_reduce
_segment_reduce_backward silu_backward smooth_l1_loss smooth_l1_loss_backward soft_margin_loss
soft_margin_loss_backward _softmax _softmax_backward_data softplus_backward softshrink_backward _standard_gamma_grad
std_mean sum _thnn_fused_gru_cell _thnn_fused_gru_cell_backward _thnn_fused_lstm_cell
_thnn_fused_lstm_cell_backward_impl threshold_backward upsample_bicubic2d _upsample_bicubic2d_aa
_upsample_bicubic2d_aa_backward upsample_bicubic2d_backward upsample_bilinear2d _upsample_bilinear2d_aa
_upsample_bilinear2d_aa_backward upsample_bilinear2d_backward upsample_linear1d upsample_linear1d_backward
upsample_nearest1d_backward upsample_nearest2d_backward upsample_nearest3d_backward upsample_trilinear3d
upsample_trilinear3d_backward var_mean _weight_norm_interface _weight_norm_interface_backward
"""

_moving = frozenset(_MOVING.split())
_per_element = frozenset(_PER_ELEMENT.split())


def has_arithmetic(operation: Any) -> bool:
    """Tell whether an overload computes anything, rather than view, make, copy or move."""
    namespace, _, name = operation._schema.name.partition("::")
    if namespace in _MOVING_NAMESPACES or operation.is_view:
        return False
    return not (namespace == "aten" and name in _moving)


def is_per_element(operation: Any) -> bool:
    """Tell whether an overload's arithmetic is known to be a few steps for each element of its tensors."""
    namespace, _, name = operation._schema.name.partition("::")
    tags = {tag for tag in (torch.Tag.pointwise, getattr(torch.Tag, "reduction", None)) if tag is not None}
    return not tags.isdisjoint(operation.tags) or (namespace == "aten" and name in _per_element)
