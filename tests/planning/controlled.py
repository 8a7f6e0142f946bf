"""A model under control, and its noise by Monte Carlo."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import cheapgrad
from cheapgrad.planning.controller import Controller
from cheapgrad.sketch import RowSample

B, T, D = 24, 6, 16


class Tokens(nn.Module):
    """Two residual blocks on tokens, so that noise reaches lower layers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D)) for _ in range(2)
        )
        self.head = nn.Linear(D, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def set_up(keep: float = 0.5, **options: object) -> tuple[nn.Module, cheapgrad.Handle, Controller]:
    torch.manual_seed(3)
    model = Tokens().double()
    handle = cheapgrad.approximate(model, cheapgrad.Rule(cotangent=RowSample(keep)), skip_small=False)
    return model, handle, Controller(handle, **options)  # type: ignore[arg-type]


def make_batch(generator: torch.Generator, examples: int = B) -> tuple[Tensor, Tensor]:
    x = torch.randn(examples, T, D, generator=generator, dtype=torch.float64)
    # Cotangents of random directions, and of very different weight for every token.
    scale = torch.rand(examples, T, 1, generator=generator, dtype=torch.float64) ** 3
    return x, scale * torch.randn(examples, T, 4, generator=generator, dtype=torch.float64)


def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (batch[1] * model(batch[0])).mean()


def run_step(model: nn.Module, controller: Controller, generator: torch.Generator, examples: int = B) -> None:
    mean_loss(model, make_batch(generator, examples)).backward()
    controller.step()


def list_weights(model: nn.Module) -> list[Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, nn.Linear)]


def weight_gradient(model: nn.Module, batch: tuple[Tensor, Tensor], weights: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(mean_loss(model, batch), weights))


def shares_of(parts: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """Return the shares of micro-batches in the mean over all examples."""
    examples = [len(x) for x, _ in parts]
    return [count / sum(examples) for count in examples]


def measure_noise(
    model: nn.Module,
    handle: cheapgrad.Handle,
    micro_batches: Sequence[int] = (B,),
    *,
    seed: int = 99,
    share: Callable[[Tensor], Tensor] = lambda gradient: gradient,
    batches: int = 60,
    draws: int = 6,
    weights: list[Tensor] | None = None,
) -> float:
    """Return added variance over mini-batch variance of an accumulated gradient, by Monte Carlo on batches of its own.

    Args:
        model: converted.
        handle: of the conversion.
        micro_batches: the examples of each.
        seed: of the batches.
        share: makes the gradient that training uses of that of this process.
        batches: how many.
        draws: of the gradient of each.
        weights: whose noise it is; those of all linear layers by default.
    """
    generator, exact, added = torch.Generator().manual_seed(seed), [], []
    weights = list_weights(model) if weights is None else weights

    def accumulate(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        total = sum(
            part * torch.cat([one.flatten() for one in weight_gradient(model, batch, weights)])
            for part, batch in zip(shares_of(parts), parts, strict=True)
        )
        assert isinstance(total, Tensor)
        return share(total)

    for _ in range(batches):
        parts = [make_batch(generator, examples) for examples in micro_batches]
        with handle.exact():
            exact.append(accumulate(parts))
        added += [(accumulate(parts) - exact[-1]).square().sum() for _ in range(draws)]
    return float(torch.stack(added).mean() / torch.stack(exact).var(0).sum())


def measure_between_trials(handle: cheapgrad.Handle, keeps: dict[str, float], measure: Callable[[], float]) -> float:
    """Return what is measured with plain draws of these budgets; what is in force is so again afterwards."""
    in_force = handle.strategies()
    handle.replace_strategies({name: RowSample(keep) for name, keep in keeps.items()})
    measured = measure()
    handle.replace_strategies(in_force)
    return measured
