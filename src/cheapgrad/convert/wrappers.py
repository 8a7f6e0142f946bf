"""Models that are wrapped already: what works, and which order of calls is right."""

from __future__ import annotations

from torch import nn

from cheapgrad.errors import WrapperOrderError

_TRANSPARENT = ("DistributedDataParallel", "DataParallel")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside a wrapper that only looks at parameters; raise where conversion must come first.

    Raises:
        WrapperOrderError: if the model, or a part of it, is compiled or sharded.
    """
    while type(model).__name__ in _TRANSPARENT and isinstance(getattr(model, "module", None), nn.Module):
        model = model.get_submodule("module")
    for name, module in model.named_modules():
        _check_not_wrapped(name or "the model", module)
    return model


def _check_not_wrapped(name: str, module: nn.Module) -> None:
    class_names = {base.__name__ for base in type(module).__mro__}
    if "OptimizedModule" in class_names or module.__dict__.get("_compiled_call_impl") is not None:
        raise WrapperOrderError(
            f"{name} is compiled already ({type(module).__name__}); convert first: "
            "handle = cheapgrad.approximate(model, ...), then torch.compile(model); plans are made before both"
        )
    if "FullyShardedDataParallel" in class_names or "FSDPModule" in class_names:
        raise WrapperOrderError(
            f"{name} is sharded already ({type(module).__name__}); convert first: "
            "handle = cheapgrad.approximate(model, ...), then fully_shard(model); plans are made before both"
        )
