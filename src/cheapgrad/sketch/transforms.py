"""The one place that asks where a tensor lives: inside a torch.func transform, or plainly in main memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined] - private, and the only way to ask
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def is_transformed(tensor: Tensor) -> bool:
    """Tell whether `tensor` is wrapped by ``torch.func`` (vmap, grad, ...): sizes and state may not depend on it.

    Inside compiled graphs the answer is no: the question itself cannot be traced.
    """
    return not torch.compiler.is_dynamo_compiling() and _functorch.is_functorch_wrapped_tensor(tensor)


def is_inside_transform() -> bool:
    """Tell whether any ``torch.func`` transform is running, whatever tensors it wraps."""
    return not torch.compiler.is_dynamo_compiling() and _functorch.peek_interpreter_stack() is not None


def is_plain(tensor: Tensor) -> bool:
    """Tell whether NumPy may read `tensor`: in main memory, and no tracer or transform wants to see what is done to it.

    NumPy's calls on a few thousand numbers take a tenth of torch's, and never wait for a second processor.
    """
    return (
        not torch.compiler.is_compiling()
        and type(tensor) is Tensor
        and tensor.is_cpu
        and not tensor.requires_grad
        and not _functorch.is_functorch_wrapped_tensor(tensor)
        and not is_in_torch_dispatch_mode()
    )
