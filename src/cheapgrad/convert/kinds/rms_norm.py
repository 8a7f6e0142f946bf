"""Root mean square norms: PyTorch's, and those of transformers by what they compute."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn

from cheapgrad.convert.kinds.row_wise import RowShape, norm_saved_bytes, row_wise_kind, variance_by
from cheapgrad.ops.chains.joining import stage_in_chain
from cheapgrad.ops.chains.rebuilding import current_scope
from cheapgrad.ops.chains.rms_norm_stage import RmsForm, RmsNormStage
from cheapgrad.ops.plan import Plan
from cheapgrad.ops.row_laws import norm_law
from cheapgrad.sketch import StochasticRounding
from cheapgrad.sketch.law import Law

_EPS = 1e-3
# What the smoothing term is called.
_EPS_NAMES = ("variance_epsilon", "eps")


def _run_rms_norm(stock: Any, module: Any, plan: Plan, x: Tensor, form: RmsForm, eps: float | None) -> Tensor:
    if module.weight is not None and module.weight.dim() != 1:
        return stock.forward(module, x)
    stage = RmsNormStage(eps, x.shape[-1], form, plan.stored, plan.root_use)
    if plan.root_use is not None and plan.root_use.is_kept and current_scope() is not None:
        stage = dataclasses.replace(stage, stored=None)
    return stage_in_chain(x, stage, (module.weight,), plan)


def _run_torch(module: Any, plan: Plan, x: Tensor) -> Tensor:
    if len(module.normalized_shape) != 1:
        return nn.RMSNorm.forward(module, x)
    return _run_rms_norm(nn.RMSNorm, module, plan, x, RmsForm.TORCH, module.eps)


def _run_recognised(module: Any, plan: Plan, x: Tensor) -> Tensor:
    stock = module._cheapgrad.original_class
    form, eps_name = _recognise(stock).split("/")
    return _run_rms_norm(stock, module, plan, x, RmsForm(form), getattr(module, eps_name))


def _shape(module: Any, x: Tensor, output: Tensor) -> RowShape:
    """Return the sizes; PyTorch composes the norm of smaller operations, each of which holds what it reads."""
    rows, features = x.numel() // x.shape[-1], x.shape[-1]
    wide_bytes = max(x.element_size(), 4)
    stock = module._cheapgrad.original_class
    form = RmsForm.TORCH if _is_torchs(stock) else RmsForm(_recognise(stock).split("/")[0])
    weighted_bytes = x.element_size() if form is RmsForm.WEIGHTED_LAST else wide_bytes
    if module.weight is None:
        weighted_bytes = 0
    offset_bytes = features * wide_bytes if form is RmsForm.OFFSET else 0
    stock_bytes = rows * (features * (wide_bytes + weighted_bytes) + wide_bytes) + offset_bytes
    if form is RmsForm.TORCH and x.device.type == "cuda":
        stock_bytes = rows * (features * x.element_size() + wide_bytes)
    return RowShape(rows, features, stock_bytes, wide_bytes, x.requires_grad)


def _law(module: Any, codec: StochasticRounding) -> Law:
    stock = module._cheapgrad.original_class
    form, eps_name = (RmsForm.TORCH.value, "eps") if _is_torchs(stock) else _recognise(stock).split("/")
    eps, weight = getattr(module, eps_name), module.weight
    if eps is None:
        eps = torch.finfo(torch.float32 if weight is None else weight.dtype).eps
    return norm_law(codec, eps, None if weight is None else RmsForm(form).scale(weight), centred=False)


def _is_recognised(cls: type[nn.Module]) -> bool:
    """Recognise a root mean square norm without importing the library that defines it: by its name and its values."""
    return cls.__name__.endswith("RMSNorm") and not issubclass(cls, nn.RMSNorm) and bool(_recognise(cls))


def _recognise(cls: Any) -> str:
    """Return form and name of the smoothing term as ``"form/name"``, or an empty string if the class has another."""
    return _recognise_once(cls)


# What `torch.compiler.assume_constant_result` does, which would import the compiler with this package.
_recognise._dynamo_marked_constant = True  # type: ignore[attr-defined] - a mark on a function


@functools.lru_cache(maxsize=64)
def _recognise_once(cls: Any) -> str:
    for name in _EPS_NAMES:
        for form in (RmsForm.WEIGHTED_LAST, RmsForm.ROUNDED_LAST, RmsForm.OFFSET):
            if _agrees(cls, name, form):
                return f"{form.value}/{name}"
    return ""


def _agrees(cls: Any, eps_name: str, form: RmsForm) -> bool:
    """Tell whether a module of this class, made of a weight and a smoothing term only, computes this, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    values, weight = torch.randn(4, 24, generator=generator), torch.rand(24, generator=generator) + 0.5
    for dtype, weight_dtype in ((torch.float32, torch.float32), (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)):
        module, x = cls.__new__(cls), values.to(dtype)
        nn.Module.__init__(module)
        module.weight = nn.Parameter(weight.to(weight_dtype))
        setattr(module, eps_name, _EPS)
        try:
            with torch.no_grad():
                output = cls.forward(module, x)
        except Exception:
            # Whatever it needs that is not there: it is another norm.
            return False
        expected = form.forward(x, module.weight.detach(), _EPS)
        if not isinstance(output, Tensor) or output.dtype != expected.dtype or not torch.equal(output, expected):
            return False
    return True


def _is_torchs(cls: type[nn.Module]) -> bool:
    return issubclass(cls, nn.RMSNorm) and cls.forward is nn.RMSNorm.forward


_variance = variance_by(_law, may_keep_input=True)

RMS_NORMS = (
    row_wise_kind(
        nn.RMSNorm, _run_torch, shape=_shape, saved_bytes=norm_saved_bytes, variance=_variance, input_name="x"
    ),
    dataclasses.replace(
        row_wise_kind(nn.RMSNorm, _run_recognised, shape=_shape, saved_bytes=norm_saved_bytes, variance=_variance),
        name="RMSNorm of transformers",
        accepts=_is_recognised,
        input_name="hidden_states",
    ),
)
