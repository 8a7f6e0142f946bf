"""What a scan refuses or runs into: a named error that says where, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

import cheapgrad
from cheapgrad.cost import measure_forward_mode, measure_held_bytes, peak_memory
from cheapgrad.cost._autograd_state import saving_hooks
from cheapgrad.errors import (
    ArgumentError,
    BackwardError,
    FakeModelError,
    ForwardError,
    ForwardResultError,
    InputsError,
    MetaTensorError,
    ModelTypeError,
)


def is_clean(model):
    """Tell whether no hook and no mode was left behind."""
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    hooked_globally = module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks
    return not (hooked or hooked_globally or saving_hooks() or _get_current_dispatch_mode_stack())


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = nn.ModuleList([nn.Identity(), inner])

    def forward(self, x):
        for layer in self.inner:
            x = layer(x)
        return x


class Fails(nn.Module):
    def forward(self, x):
        raise KeyError("no such thing")


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, cotangent):
        raise ArithmeticError("no derivative today")


class Survives(nn.Module):
    """Catches what one of its layers raises, and goes on."""

    def __init__(self):
        super().__init__()
        self.first = Fails()
        self.second = nn.Linear(9, 4)
        self.third = nn.Linear(8, 4)

    def forward(self, x):
        try:
            self.first(x)
        except KeyError:
            product = x @ x.mT
        return self.third(x), product


def test_model_that_is_no_module():
    with pytest.raises(ModelTypeError, match=r"needs a torch.nn.Module as its first argument, but got a function"):
        cheapgrad.scan(lambda x: x, torch.ones(2))
    with pytest.raises(ModelTypeError, match=r"but got a Tensor of shape \(2, 3\); to scan"):
        cheapgrad.scan(torch.ones(2, 3), nn.Linear(3, 2))


def test_inputs_that_do_not_fit_the_signature():
    with pytest.raises(
        InputsError, match=r"do not fit Linear.forward\(input.*got 2 positional inputs and no keywords$"
    ):
        cheapgrad.scan(nn.Linear(8, 4), torch.ones(2, 8), torch.ones(2, 8))
    with pytest.raises(InputsError, match="got no positional inputs and 1 keyword: attention_mask"):
        cheapgrad.scan(nn.Linear(8, 4), attention_mask=torch.ones(2, 8))
    with pytest.raises(InputsError, match="got 1 positional input and no keywords"):
        cheapgrad.scan(nn.Bilinear(8, 4, 2), torch.ones(2, 8))


def test_inputs_of_a_wrong_shape_name_the_module_and_the_inputs():
    model = Outer(nn.Linear(8, 4))
    match = r"in 'inner.1' \(Linear\) RuntimeError: mat1 and mat2 .*; the inputs were float32\[2, 9\] on cpu"
    with pytest.raises(ForwardError, match=match) as caught:
        cheapgrad.scan(model, torch.ones(2, 9))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert is_clean(model)


@pytest.mark.parametrize("fake", [False, True])
def test_forward_that_raises_keeps_its_error(fake):
    model = Outer(Fails())
    with pytest.raises(ForwardError, match=r"in 'inner.1' \(Fails\) KeyError: 'no such thing'") as caught:
        cheapgrad.scan(model, torch.ones(2, 8), fake=fake)
    assert isinstance(caught.value.__cause__, KeyError)
    assert is_clean(model)


def test_error_that_the_model_catches_is_not_the_scans():
    model = Survives()
    report = cheapgrad.scan(model, torch.ones(2, 8))
    assert report.row("third").forward_flops == 2 * 2 * 8 * 4
    assert report.row("").forward_flops == 2 * 2 * 8 * 2
    with pytest.raises(ForwardError, match=r"in 'third' \(Linear\)"):
        cheapgrad.scan(model, torch.ones(2, 9))


def test_batch_given_as_a_dictionary_gets_a_hint():
    with pytest.raises(ForwardError, match=r"goes in as scan\(model, \*\*batch\)"):
        cheapgrad.scan(nn.Linear(8, 4), {"input": torch.ones(2, 8)})


def test_batch_given_as_a_tuple_gets_a_hint():
    with pytest.raises(ForwardError, match=r"a tuple or list of inputs goes in as scan\(model, \*batch\)"):
        cheapgrad.scan(nn.Linear(8, 4), (torch.ones(2, 8),))


def test_forward_that_asks_for_a_value_gets_a_hint():
    class Asks(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1 if x.sum().item() > 0 else 2)

    match = (
        r"in '\(model\)' \(Asks\) DataDependentOutputException: .*; this depends on values.*: scan without fake=True"
    )
    with pytest.raises(ForwardError, match=match):
        cheapgrad.scan(Asks(8, 4), torch.ones(2, 8), fake=True)
    with pytest.raises(ForwardError, match=r"the loss raised .*: scan without fake=True"):
        cheapgrad.scan(
            nn.Linear(8, 4), torch.ones(2, 8), fake=True, loss=lambda output: output.sum() * output.sum().item()
        )


def test_option_that_a_model_swallows_is_remarked_on():
    class Open(nn.Linear):
        def forward(self, x, **kwargs):
            return super().forward(x)

    report = cheapgrad.scan(Open(8, 4), torch.ones(2, 8), loss_=torch.sum, mask=None)
    [remark] = report.remarks
    assert remark.startswith("'loss_' went to the model's forward")
    assert remark.endswith("option is called 'loss'")


def test_memory_error_passes_as_it_is():
    def loss(output):
        raise MemoryError("full")

    class Full(nn.Linear):
        def forward(self, x):
            raise MemoryError("full")

    for model, options in ((nn.Linear(8, 4), {"loss": loss}), (Full(8, 4), {})):
        with pytest.raises(MemoryError, match="full"):
            cheapgrad.scan(model, torch.ones(2, 8), **options)


def test_loss_that_is_no_function():
    with pytest.raises(
        ArgumentError, match=r"loss must be a function of the model's output, but got a Tensor of shape \(\)"
    ):
        cheapgrad.scan(nn.Linear(8, 4), torch.ones(2, 8), loss=torch.ones(()))


def test_value_in_place_of_a_step_is_refused():
    with pytest.raises(
        ArgumentError, match=r"step must be a function without arguments, but got a Tensor of shape \(2,\)"
    ):
        peak_memory(torch.ones(2))
    with pytest.raises(
        ArgumentError, match=r"function must be a function .* got a Tensor of shape \(2,\); write e.g. lambda"
    ):
        measure_held_bytes(torch.ones(2))


def test_forward_mode_names_the_inputs_that_do_not_fit():
    with pytest.raises(ForwardError, match=r"RuntimeError: mat1 and mat2 .*; the inputs were float32\[2, 9\] on cpu"):
        measure_forward_mode(nn.Linear(8, 4), torch.ones(2, 9), directions=2)


def test_loss_that_raises():
    def loss(output):
        raise ValueError("no labels")

    model = nn.Linear(8, 4)
    with pytest.raises(ForwardError, match="the loss raised ValueError: no labels"):
        cheapgrad.scan(model, torch.ones(2, 8), loss=loss)
    assert is_clean(model)


def test_loss_that_is_no_tensor():
    with pytest.raises(ForwardResultError, match=r"the loss returned a float 3\.0"):
        cheapgrad.scan(nn.Linear(8, 4), torch.ones(2, 8), loss=lambda output: 3.0)


def test_output_without_tensors():
    class Silent(nn.Module):
        def forward(self, x):
            return "done"

    with pytest.raises(ForwardResultError, match="the model returned str, in which no tensor was found"):
        cheapgrad.scan(Silent(), torch.ones(2))


@pytest.mark.parametrize("fake", [False, True])
def test_backward_that_raises(fake):
    class Layer(nn.Linear):
        def forward(self, x):
            return FailsInBackward.apply(super().forward(x))

    model = Layer(8, 4)
    model.weight.grad = torch.ones(4, 8)
    with pytest.raises(BackwardError, match="ArithmeticError: no derivative today") as caught:
        cheapgrad.scan(model, torch.ones(2, 8), fake=fake)
    assert isinstance(caught.value.__cause__, ArithmeticError)
    assert is_clean(model)
    assert torch.equal(model.weight.grad, torch.ones(4, 8))
    assert model.bias.grad is None


def test_recomputation_that_raises_names_its_module():
    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.runs = 0

        def forward(self, x):
            self.runs += 1
            if self.runs == 2:
                raise RuntimeError("only once")
            return torch.tanh(self.layer(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.once = Once()

        def forward(self, x):
            return checkpoint(self.once, x, use_reentrant=False)

    with pytest.raises(BackwardError, match=r"in a recomputation of 'once' \(Once\) RuntimeError: only once"):
        cheapgrad.scan(Model(), torch.ones(2, 8, requires_grad=True))


def test_model_without_data_needs_fake():
    with torch.device("meta"):
        model = nn.Linear(8, 4)
    with pytest.raises(MetaTensorError, match="weight is on the meta device and has no data; pass fake=True"):
        cheapgrad.scan(model, torch.ones(2, 8))
    with pytest.raises(MetaTensorError, match="an input is on the meta device"):
        cheapgrad.scan(nn.Linear(8, 4), torch.ones(2, 8, device="meta"))


def test_model_that_cannot_be_copied_cannot_be_faked():
    model = nn.Linear(8, 4)
    model.stream = (value for value in [1])
    with pytest.raises(FakeModelError, match=r"copying Linear raised TypeError: cannot pickle 'generator' object"):
        cheapgrad.scan(model, torch.ones(2, 8), fake=True)


def test_keyboard_interrupt_passes_and_leaves_nothing():
    class Interrupted(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    model = Outer(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        cheapgrad.scan(model, torch.ones(2))
    assert is_clean(model)
