"""Layers of the table, each with the problem that shows in one draw whether forward and backward agree.

The input is the identity (row n holds a one in feature n) and the cotangent is diagonal, so that dW is diagonal. A draw
that only selects leaves it diagonal exactly if backward uses the very sample that forward drew; otherwise rows of one
sample meet rows of another and dW is zero almost everywhere, or not diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import cheapgrad
from tests.convert.models import Conv1D

# Rows, input features and output features alike.
SIZE = 32


@dataclass(frozen=True)
class LayerCase:
    """A layer with 32 input and output features, and the shape in which its 32 rows come.

    Attributes:
        name: what the table calls it.
        build: makes the stock layer, without bias where it can.
        rows: shape of the rows: ``(32,)`` for a matrix, ``(B, T)`` for a sequence, ``(B, height, ...)`` for images.
        is_convolution: whether features are the second axis instead of the last.
        is_transposed: whether the weight is ``[I, O, ...]``.
        after: makes an operation that stands behind the layer and is converted in its place. The weight gradient of a
            layer whose input is the identity is the cotangent of that operation's input.
        reference: a function with the operation's mean gradient, or None where that is the stock operation itself.
        family: operations that share their code, all but one of which run in few contexts only.
        parameter: the parameter whose gradient is compared; that of a layer by default.
        stock: for an operation that is called as a function, a module with PyTorch's own in its place; there is nothing
            to convert then.
        lacks: contexts that PyTorch itself cannot run the operation in, and why.
    """

    name: str
    build: Callable[[], nn.Module]
    rows: tuple[int, ...]
    is_convolution: bool = False
    is_transposed: bool = False
    after: Callable[[], nn.Module] | None = None
    reference: Callable[[Tensor], Tensor] | None = None
    family: str = ""
    parameter: str = "0.weight"
    stock: Callable[[], nn.Module] | None = None
    lacks: tuple[tuple[str, str], ...] = ()

    @property
    def is_one_layer(self) -> bool:
        """Whether there is nothing but a layer whose input is the identity and whose cotangent is diagonal."""
        return self.after is None and self.parameter == "0.weight"

    def model(self) -> nn.Sequential:
        """Return the stock layer, with the operation behind it, in a model of its own."""
        layer = self.build()
        if self.after is None:
            return nn.Sequential(layer)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(5)))
        return nn.Sequential(layer, self.after())

    @property
    def pattern(self) -> str:
        """The name of what is converted."""
        if self.after is not None:
            return "1*"
        return "0" if self.is_one_layer else "0*"

    def expected(self) -> Tensor:
        """Return the exact weight gradient as a matrix, in double precision."""
        if self.is_one_layer:
            return torch.diag(1 + torch.arange(SIZE, dtype=torch.float64) / SIZE)
        model = self.model().double() if self.stock is None else nn.Sequential(self.stock()).double()
        layer, *behind = model
        output = (self.reference or nn.Sequential(*behind))(layer(self.identity_input().double()))
        weight = model.get_parameter(self.parameter)
        (gradient,) = torch.autograd.grad(output, weight, self.diagonal_cotangent().double())
        return self.matrix(gradient)

    def _arrange(self, matrix: Tensor) -> Tensor:
        tensor = matrix.view(*self.rows, SIZE)
        return tensor.movedim(-1, 1).contiguous() if self.is_convolution else tensor

    def identity_input(self) -> Tensor:
        """Return the identity as this layer's input."""
        return self._arrange(torch.eye(SIZE))

    def diagonal_cotangent(self) -> Tensor:
        """Return ``diag(1, ..., 2)``, exact in bfloat16, as a cotangent of this layer's output."""
        return self._arrange(torch.diag(1 + torch.arange(SIZE) / SIZE))

    def matrix(self, weight_gradient: Tensor) -> Tensor:
        """Return gradients ``[..., weight shape]`` as matrices ``[..., O, I]``; of a kernel, its centre."""
        if self.is_convolution:
            for _ in range(len(self.rows) - 1):
                weight_gradient = weight_gradient[..., weight_gradient.shape[-1] // 2]
        return weight_gradient.mT if self.is_transposed else weight_gradient


def _convolution(stock: type[nn.Module], rows: tuple[int, ...]) -> LayerCase:
    return LayerCase(
        stock.__name__,
        lambda: stock(SIZE, SIZE, 3, padding=1, bias=False),
        rows,
        is_convolution=True,
        is_transposed=stock.__name__.startswith("ConvTranspose"),
    )


LINEAR = LayerCase("Linear", lambda: nn.Linear(SIZE, SIZE, bias=False), (SIZE,))
SEQUENCE = LayerCase("Linear on sequences", lambda: nn.Linear(SIZE, SIZE, bias=False), (8, 4))
TRANSPOSED_LINEAR = LayerCase("Conv1D of transformers", lambda: Conv1D(SIZE, SIZE), (8, 4), is_transposed=True)
CONVOLUTION_2D = _convolution(nn.Conv2d, (8, 2, 2))
# Three axes with a depth of 4: at depth 2 PyTorch 2.13's own dW of a kernel of 3 is wrong in bfloat16 on CPU.
OTHER_CONVOLUTIONS = (
    _convolution(nn.Conv1d, (8, 4)),
    _convolution(nn.Conv3d, (8, 4, 1, 1)),
    _convolution(nn.ConvTranspose1d, (8, 4)),
    _convolution(nn.ConvTranspose2d, (8, 2, 2)),
    _convolution(nn.ConvTranspose3d, (8, 4, 1, 1)),
)


class Squared(nn.Module):
    """Makes the cotangent depend on the output, so that another mask in backward shows in the mean."""

    def forward(self, x):
        """Return the squares."""
        return x.square()


class LlamaRMSNorm(nn.Module):
    """The norm of the Llama family, as transformers has it."""

    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, features))
        self.variance_epsilon = 1e-6

    def forward(self, hidden_states):
        """Normalise in single precision."""
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(dtype)


def _filled(module: nn.Module) -> nn.Module:
    """Return the module with parameters that are the same whenever it is made."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return module


class SelfAttention(nn.Module):
    """PyTorch's attention module on one input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(SIZE, 4, batch_first=True)

    def forward(self, x):
        """Return the mixed values."""
        return self.attention(x, x, x, need_weights=False)[0]


class Tokens(nn.Module):
    """A table of tokens, read as rows of the identity; their sums, which are 1, lead a gradient to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(SIZE, SIZE)

    def forward(self, x):
        """Return the rows of the table."""
        return self.table(x.argmax(-1)) * x.sum(-1, keepdim=True)


class OutputLayer(nn.Module):
    """A layer whose logits go into a cross-entropy; the targets are the places of the identity's ones."""

    def __init__(self, reduction, **options):
        super().__init__()
        self.head = nn.Parameter(torch.empty(SIZE, SIZE))
        self.options = {"reduction": reduction, **options}

    def forward(self, x):
        """Return the loss, or the losses, times the input."""
        loss = cheapgrad.linear_cross_entropy(x, self.head, x.argmax(-1), **self.options)
        return x * (loss.unsqueeze(-1) if loss.dim() else loss)


class OutputLayerApart(OutputLayer):
    """The same by PyTorch's operations."""

    def forward(self, x):
        """Return the loss, or the losses, times the input."""
        loss = nn.functional.cross_entropy(x @ self.head.mT, x.argmax(-1), reduction=self.options["reduction"])
        return x * (loss.unsqueeze(-1) if loss.dim() else loss)


class GatedFeedForward(nn.Module):
    """The feed-forward of the Llama family."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(SIZE, SIZE, bias=False) for _ in range(3))
        self.activation = nn.SiLU()

    def forward(self, x):
        """Return the gated values, projected."""
        return self.down(self.activation(self.gate(x)) * self.up(x))


def _feed_forward() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(SIZE), nn.Linear(SIZE, SIZE), nn.GELU(), nn.Linear(SIZE, SIZE))


# Modules of several operations, or whose parameters have other names.
COMPOSED = (
    LayerCase("MultiheadAttention", lambda: _filled(SelfAttention()), (8, 4), parameter="0.attention.in_proj_weight"),
    LayerCase("Embedding", lambda: _filled(Tokens()), (8, 4), parameter="0.table.weight"),
    LayerCase("gated feed-forward", lambda: _filled(GatedFeedForward()), (8, 4), parameter="0.gate.weight"),
    LayerCase("norm, Linear, GELU, Linear", lambda: _filled(_feed_forward()), (8, 4), parameter="0.1.weight"),
)


def _loss(name: str, reduction: str, **options: object) -> LayerCase:
    return LayerCase(
        f"linear_cross_entropy, {name}",
        lambda: _filled(OutputLayer(reduction, **options)),
        (SIZE,),
        family="linear_cross_entropy",
        parameter="0.head",
        stock=lambda: _filled(OutputLayerApart(reduction)),
    )


FUNCTIONS = (
    _loss("mean", "mean"),
    _loss("each loss, drawn tokens", "none", keep=0.5),
    # These two run everywhere: gradients that are made in the forward pass, and logits that are computed again.
    _loss("mean, drawn tokens", "mean", keep=0.5),
    _loss("mean, logits computed again", "mean", recompute=True, keep=0.5),
)

DROPPED = 0.2
# Of alpha dropout: what is put in the place of dropped entries, less the sign, and what everything is multiplied by.
_ALPHA = 1.7580993408473766
_FACTOR = ((_ALPHA**2 * DROPPED + 1) * (1 - DROPPED)) ** -0.5


def _behind_linear(
    family: str, after: Callable[[], nn.Module], reference: Callable[[Tensor], Tensor] | None = None
) -> LayerCase:
    return LayerCase(_name_of(after), LINEAR.build, (SIZE,), after=after, reference=reference, family=family)


def _name_of(after: Callable[[], nn.Module]) -> str:
    module = after()
    return type(module[0] if isinstance(module, nn.Sequential) else module).__name__


def _behind_convolution(
    family: str, axes: int, after: Callable[[], nn.Module], lacks: tuple[tuple[str, str], ...] = ()
) -> LayerCase:
    stock, rows = ((nn.Conv1d, (8, 4)), (nn.Conv2d, (8, 2, 2)), (nn.Conv3d, (8, 4, 1, 1)))[axes - 1]
    return LayerCase(
        _name_of(after),
        lambda: stock(SIZE, SIZE, 1, bias=False),
        rows,
        is_convolution=True,
        after=after,
        family=family,
        lacks=lacks,
    )


def _padded_maximum(padding: type[nn.Module]) -> nn.Sequential:
    """Return a padding, and a maximum that makes it as small as before."""
    axes = int(padding.__name__[-2])
    kernel = {1: 3, 2: (3, 3), 3: (3, 1, 1)}[axes]
    amount = {1: 1, 2: 1, 3: (0, 0, 0, 0, 1, 1)}[axes]
    return nn.Sequential(padding(amount), (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[axes - 1](kernel, 1))


# The first of each family stands for all where a run takes time.
BEHIND = (
    _behind_linear("norms over features", lambda: nn.LayerNorm(SIZE)),
    _behind_linear("root mean square norms", lambda: nn.RMSNorm(SIZE)),
    _behind_linear("recognised norms", lambda: LlamaRMSNorm(SIZE)),
    _behind_convolution("norms over images", 2, lambda: nn.BatchNorm2d(SIZE, track_running_stats=False)),
    _behind_linear("norms over images", lambda: nn.BatchNorm1d(SIZE, track_running_stats=False)),
    _behind_convolution("norms over images", 3, lambda: nn.BatchNorm3d(SIZE, track_running_stats=False)),
    _behind_convolution("norms over images", 2, lambda: nn.GroupNorm(4, SIZE)),
    *(
        _behind_convolution("norms over images", axes, lambda stock=stock: stock(SIZE, affine=True))
        for axes, stock in enumerate((nn.InstanceNorm1d, nn.InstanceNorm2d), 1)
    ),
    _behind_convolution("norms over images", 3, lambda: nn.InstanceNorm3d(SIZE, affine=True)),
    *(
        _behind_linear("smooth activations", stock)
        for stock in (
            nn.GELU,
            nn.SiLU,
            nn.Mish,
            nn.Hardswish,
            nn.Tanh,
            nn.Sigmoid,
            nn.Softplus,
            nn.LogSigmoid,
            nn.ELU,
            nn.CELU,
            nn.SELU,
            nn.Softsign,
            nn.Tanhshrink,
        )
    ),
    *(
        _behind_linear("piecewise linear activations", stock)
        for stock in (
            nn.ReLU,
            nn.LeakyReLU,
            nn.ReLU6,
            nn.Hardtanh,
            nn.Hardsigmoid,
            nn.Hardshrink,
            nn.Softshrink,
            lambda: nn.Threshold(0.1, 2.0),
        )
    ),
    _behind_linear("activations with slopes", nn.PReLU),
    _behind_linear(
        "dropout",
        lambda: nn.Sequential(nn.Dropout(DROPPED), Squared()),
        lambda hidden: hidden.square() / (1 - DROPPED),
    ),
    _behind_linear(
        "dropout",
        lambda: nn.Sequential(nn.AlphaDropout(DROPPED), Squared()),
        lambda hidden: (hidden.square() + 2 * hidden * _ALPHA * DROPPED) * _FACTOR**2 * (1 - DROPPED),
    ),
    *(
        _behind_convolution("max-pooling", axes, lambda stock=stock: stock(3, 1, 1))
        for axes, stock in ((2, nn.MaxPool2d), (1, nn.MaxPool1d), (3, nn.MaxPool3d))
    ),
    _behind_convolution("averages and padding", 2, lambda: nn.AvgPool2d(3, 1, 1)),
    _behind_convolution("averages and padding", 1, lambda: nn.AvgPool1d(3, 1, 1)),
    _behind_convolution(
        "averages and padding",
        3,
        lambda: nn.AvgPool3d((3, 1, 1), 1, (1, 0, 0)),
        lacks=(("autocast", "PyTorch has no `avg_pool3d` in bfloat16 on a CPU"),),
    ),
    *(
        _behind_convolution("averages and padding", axes, lambda axes=axes, stock=stock: stock((4, 2, None)[axes - 1]))
        for axes, stock in ((1, nn.AdaptiveAvgPool1d), (2, nn.AdaptiveAvgPool2d))
    ),
    _behind_convolution("averages and padding", 3, lambda: nn.AdaptiveAvgPool3d((4, None, None))),
    *(
        _behind_convolution("averages and padding", axes, lambda stock=stock: _padded_maximum(stock))
        for axes, stock in (
            (1, nn.ReflectionPad1d),
            (2, nn.ReflectionPad2d),
            (3, nn.ReflectionPad3d),
            (1, nn.ReplicationPad1d),
            (2, nn.ReplicationPad2d),
            (3, nn.ReplicationPad3d),
        )
    ),
)
# Families whose gradient is exact: processes that draw nothing of their own have nothing to draw apart.
EXACT = ("piecewise linear activations", "activations with slopes", "dropout", "max-pooling", "averages and padding")
