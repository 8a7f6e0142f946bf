"""The directional gradient is the limit of gradients along the direction, at every kink and tie that has a rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import FlopCounterMode

from cheapgrad.errors import DirectionError, ForwardResultError, UndecidedKinkError
from cheapgrad.kinks import directional_gradient
from tests.kinks.programs import random_network, random_program, run
from tests.oracles.limiting_gradients import limiting_gradient_along, limiting_gradients

FAMILIES = {
    "half of the ReLUs at their kink": (lambda generator: random_program(generator, kink_chance=0.5), 67),
    "all ReLUs at their kink": (lambda generator: random_program(generator, kink_chance=1.0), 67),
    "bias-free networks at zero": (random_network, 66),
}
# Of as many programs: how often what autodiff returns is the limit along d, and the limit along any direction.
# Together 79 and 184 of 200.
PLAIN = {
    "half of the ReLUs at their kink": (31, 66),
    "all ReLUs at their kink": (13, 54),
    "bias-free networks at zero": (35, 64),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_limiting_gradient_in_200_of_200_random_programs(family, record_property):
    make, count = FAMILIES[family]
    generator = np.random.default_rng(20260101)
    along = somewhere = plain_along = plain_somewhere = 0
    for _ in range(count):
        program, place = make(generator)
        direction = generator.standard_normal(len(place))
        expected = limiting_gradient_along(program, place, direction)
        limits = limiting_gradients(program, place)
        assert expected in limits
        point = torch.tensor(place, dtype=torch.float64, requires_grad=True)
        found = directional_gradient(lambda x, p=program: run(p, x), point, torch.from_numpy(direction))
        assert found.derivative == pytest.approx(float(np.dot(expected, direction)), abs=1e-9)
        plain = tuple(torch.autograd.grad(run(program, point), point)[0].tolist())
        along += tuple(found.gradient.tolist()) == expected
        somewhere += tuple(found.gradient.tolist()) in limits
        plain_along += plain == expected
        plain_somewhere += plain in limits
    record_property("plain autodiff", f"{plain_along} along d, {plain_somewhere} along any, of {count}")
    assert (along, somewhere) == (count, count)
    assert (plain_along, plain_somewhere) == PLAIN[family]


def test_direction_along_an_axis_needs_a_second_one_and_still_gives_a_limit():
    generator = np.random.default_rng(7)
    second_passes = 0
    for _ in range(20):
        program, place = random_program(generator, kink_chance=1.0)
        axis = torch.zeros(len(place), dtype=torch.float64)
        axis[0] = 1.0
        point = torch.tensor(place, dtype=torch.float64)
        found = directional_gradient(lambda x, p=program: run(p, x), point, axis)
        assert tuple(found.gradient.tolist()) in limiting_gradients(program, place)
        assert found.gradient[0].item() == found.derivative
        second_passes += found.forward_passes == 2
    assert second_passes > 5


def _square_if_positive(x):
    return (3 * x).sum() if x[0] > 0 else x.sum()


X = torch.ones(2)
A = torch.linspace(1.0, 2.0, 24, dtype=torch.float64)
TIED = torch.tensor([[1.0, 1.0, 0.0], [1.0, -1.0, -1.0]], dtype=torch.float64)
PICTURE = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0] * 3, dtype=torch.float64)


def weighted(values):
    return (values.flatten() * A[: values.numel()]).sum()


# Each is a function of a tensor, and a point at which it has kinks or ties.
CASES = {
    "relu": (torch.relu, [0.0, 0.0, 1.0, -1.0]),
    "relu method in place": (lambda x: (x * 2).relu_(), [0.0, 0.0, 1.0]),
    "relu in place": (lambda x: functional.relu(x * 2, inplace=True), [0.0, 0.0, 1.0]),
    "relu6": (functional.relu6, [0.0, 0.0, 6.0, 6.0, 3.0]),
    "leaky_relu": (lambda x: functional.leaky_relu(x, 0.1), [0.0, 0.0, 1.0]),
    "prelu": (lambda x: functional.prelu(x.view(2, 3), A[:3]), [0.0, 0.0, 0.0, 0.0, 1.0, -1.0]),
    "prelu alone": (lambda x: functional.prelu(x, A[:1] / 3), [0.0, 0.0]),
    "elu": (lambda x: functional.elu(x, 0.5), [0.0, 0.0, -0.5]),
    "selu": (functional.selu, [0.0, 0.0, 0.5]),
    "hardtanh": (lambda x: functional.hardtanh(x, -0.5, 2.0), [-0.5, -0.5, 2.0, 2.0]),
    "hardswish": (functional.hardswish, [-3.0, -3.0, 3.0, 3.0, 1.0]),
    "hardsigmoid": (functional.hardsigmoid, [-3.0, -3.0, 3.0, 3.0, 1.0]),
    "softshrink": (lambda x: functional.softshrink(x, 0.25), [-0.25, -0.25, 0.25, 0.25]),
    "threshold": (lambda x: functional.threshold(x, 1.0, 1.0), [1.0, 1.0, 2.0]),
    "abs": (abs, [0.0, 0.0, 1.0]),
    "clamp": (lambda x: x.clamp(-1, 1), [-1.0, -1.0, 1.0, 1.0]),
    "clamp from below": (lambda x: torch.clamp_min(x, 0.5), [0.5, 0.5, 1.0]),
    "clamp in place": (lambda x: (x * 2).clamp_(max=1.0), [0.5, 0.5, 1.0]),
    "clamp to a constant": (lambda x: x.clamp(1, 1) + x + x.clamp(1, 0), [1.0, 0.0, 2.0]),
    "softshrink that is the identity": (lambda x: functional.softshrink(x, 0.0), [0.0, 0.0]),
    "clamp by tensors": (lambda x: torch.clamp(x[:2], x[2:4], x[4:]), [0.0, 1.0, 0.0, 0.0, 1.0, 1.0]),
    "maximum": (lambda x: torch.maximum(x[:2], x[2:]), [1.0, 1.0, 1.0, 1.0]),
    "minimum": (lambda x: torch.minimum(x[:2], x[2:]), [1.0, 1.0, 1.0, 1.0]),
    "fmax": (lambda x: torch.fmax(x[:2], x[2:]), [1.0, 1.0, 1.0, 1.0]),
    "fmin with a number": (lambda x: torch.fmin(x, torch.zeros(())), [0.0, 0.0]),
    "max of two": (lambda x: torch.max(x[:2], x[2:]), [1.0, 1.0, 1.0, 1.0]),
    "max of all": (torch.max, TIED),
    "min of all": (lambda x: x.min(), TIED),
    "max of a number": (lambda x: x.sum().max(), [1.0, 1.0]),
    "max over an axis": (lambda x: x.max(dim=1).values, TIED),
    "max over an axis, as in NumPy": (lambda x: torch.max(x, axis=1, keepdims=True).values, TIED),
    "min over an axis, kept": (lambda x: torch.min(x, 0, keepdim=True)[0], TIED),
    "max by its index": (lambda x: x.gather(1, x.max(1, keepdim=True).indices), TIED),
    "argmax": (lambda x: x.flatten()[x.argmax()], TIED),
    "argmax by its value": (lambda x: x.flatten()[torch.argmax(x).item()], TIED),
    "argmax over an axis": (lambda x: x.gather(1, x.argmax(1, keepdim=True)), TIED),
    "argmin, kept": (lambda x: x.gather(0, torch.argmin(x, dim=0, keepdim=True)), TIED),
    "amax": (lambda x: torch.amax(x.view(2, 3, 1), dim=(0, 2)), TIED),
    "amin, kept": (lambda x: x.amin(-1, keepdim=True), TIED),
    "max_pool1d": (lambda x: functional.max_pool1d(x.view(1, 24), 4, 3, 1), PICTURE),
    "max_pool2d": (nn.MaxPool2d(2, 1), PICTURE.view(1, 4, 6)),
    "max_pool2d, ceil, dilated": (nn.MaxPool2d(2, 2, 1, 2, ceil_mode=True), PICTURE.view(1, 1, 4, 6)),
    "max_pool2d by its index": (
        lambda x: x.flatten().gather(0, functional.max_pool2d(x, 2, return_indices=True)[1].flatten()),
        PICTURE.view(1, 4, 6),
    ),
    "max_pool3d": (nn.MaxPool3d(2), PICTURE.view(1, 2, 2, 6)),
    "adaptive_max_pool1d": (lambda x: functional.adaptive_max_pool1d(x.view(1, 24), 5), PICTURE),
    "adaptive_max_pool2d": (nn.AdaptiveMaxPool2d((3, 4)), PICTURE.view(1, 4, 6)),
    "l1_loss": (lambda x: functional.l1_loss(x, torch.ones(3, dtype=x.dtype)), [1.0, 1.0, 2.0]),
    "l1_loss summed": (lambda x: functional.l1_loss(x[:2], x[2:], reduction="sum"), [1.0, 0.0, 1.0, 0.0]),
    "where": (lambda x: torch.where(x > 0, x, 0.1 * x), [0.0, 0.0, 1.0]),
    "where, other side": (lambda x: torch.where(x[:2] <= x[2:], x[:2], x[2:]), [1.0, 0.0, 1.0, 0.0]),
    "mask": (lambda x: x * (x >= 0) + 0.5 * x * (x < 0), [0.0, 0.0, 1.0]),
    "equality": (lambda x: torch.where(x == 0, 5 * x, x) + torch.where(x != 0, x, 7 * x), [0.0, 0.0]),
    "if": (_square_if_positive, [0.0, 0.0]),
    "powers beyond the first": (lambda x: torch.relu(x.prod()) + torch.relu(x[0] ** 3), [0.0, 0.0]),
    "curved": (lambda x: torch.exp(torch.relu(x.sin())) * torch.relu(x.flip(0)), [0.0, 0.0, 1.0]),
    "nested": (lambda x: torch.relu(torch.relu(x) - torch.relu(-x)) + torch.abs(torch.relu(x) - x), [0.0, 0.0]),
    "linear, behind kinks": (lambda x: torch.relu(-x) + x - torch.relu(x) + x, [0.0, 0.0]),
}


@pytest.mark.parametrize("name", CASES)
def test_rule_gives_the_limit_of_torchs_gradients_along_the_direction(name):
    function, place = CASES[name]
    point = torch.as_tensor(place, dtype=torch.float64)
    for _ in range(4):
        direction = torch.randn(point.shape, dtype=torch.float64)
        found = directional_gradient(lambda x: weighted(function(x)), point, direction)
        # Off the kinks torch is right; a step this short leaves an error of its size.
        nearby = (point + 1e-7 * direction).requires_grad_()
        limit = torch.autograd.grad(weighted(function(nearby)), nearby)[0]
        torch.testing.assert_close(found.gradient, limit, rtol=1e-5, atol=1e-5)
        assert found.derivative == pytest.approx((found.gradient * direction).sum().item(), abs=1e-9)
        assert found.value == pytest.approx(weighted(function(point)).item())


def test_second_direction_decides_what_the_first_leaves_at_rest():
    point, axis = torch.zeros(2), torch.tensor([1.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    sides = set()
    for _ in range(16):
        found = directional_gradient(lambda x: x.abs().sum(), point, axis, generator=generator)
        assert (found.forward_passes, found.decided, found.undecided) == (2, 2, 0)
        assert found.gradient[0].item() == found.derivative == 1.0
        sides.add(found.gradient[1].item())
    assert sides == {-1.0, 1.0}


def test_kink_that_no_direction_leaves_has_no_say():
    def program(x):
        nothing = torch.relu(-x) + x - torch.relu(x)
        return (torch.relu(nothing) + 2 * torch.abs(nothing) + x).sum()

    found = directional_gradient(program, torch.zeros(3), torch.ones(3))
    assert found.gradient.tolist() == [1.0, 1.0, 1.0]
    assert (found.decided, found.undecided, found.forward_passes) == (6, 6, 2)


def test_draws_inside_the_program_are_the_same_in_both_runs():
    def program(x):
        return functional.dropout(torch.relu(x), 0.5).sum() + x[:1].abs().sum()

    torch.manual_seed(3)
    found = directional_gradient(program, torch.zeros(64), torch.eye(64)[1])
    assert found.forward_passes == 2
    torch.manual_seed(3)
    kept = functional.dropout(torch.ones(64), 0.5) > 0
    assert set(found.gradient[1:][kept[1:]].tolist()) <= {0.0, 2.0}
    assert found.gradient[1:][~kept[1:]].eq(0).all()


def test_parameters_of_a_model():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 1)).double()
    rows = torch.cat([torch.zeros(2, 3), torch.randn(2, 3)]).double()
    names = [name for name, _ in model.named_parameters()]
    point = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        point[0][1] = 0.0
    direction = [torch.randn_like(tensor) for tensor in point]

    def loss(*tensors):
        return torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), (rows,)).square().sum()

    found = directional_gradient(loss, point, direction)
    nearby = [(at + 1e-8 * along).requires_grad_() for at, along in zip(point, direction, strict=True)]
    for one, other in zip(found.gradient, torch.autograd.grad(loss(*nearby), nearby), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert found.decided == 2


def test_constants_at_kinks_do_not_matter():
    constant = torch.zeros(4)

    def program(x):
        return (x * (torch.relu(constant) + constant.sort().values + constant.norm() + 1)).sum()

    found = directional_gradient(program, torch.ones(4), torch.ones(4))
    assert found.gradient.tolist() == [1.0] * 4
    assert (found.decided, found.undecided) == (0, 0)


def test_unused_tensor_has_gradient_zero():
    found = directional_gradient(
        lambda x, y: x.abs().sum(), (torch.zeros(2), torch.ones(3)), (torch.ones(2), torch.ones(3))
    )
    assert [part.tolist() for part in found.gradient] == [[1.0, 1.0], [0.0, 0.0, 0.0]]


REFUSED = {
    "sort": lambda x: (x.sort().values * torch.arange(3.0)).sum(),
    "topk": lambda x: x.topk(1).values.sum(),
    "median": torch.median,
    "linalg_vector_norm": lambda x: (x - x.detach()).norm() + x.sum(),
    "round": lambda x: torch.round(x + 0.5).sum() + x.sum(),
    "sign": lambda x: torch.sign(x - 1).sum() + x.sum(),
    "threshold": lambda x: functional.threshold(x, 1.0, 5.0).sum(),
    "hardshrink": lambda x: functional.hardshrink(x, 1.0).sum(),
    "clamp_min": lambda x: functional.hinge_embedding_loss(x, -torch.ones(3)),
    "abs": lambda x: functional.l1_loss(x, torch.ones(3), size_average=True),
}


@pytest.mark.parametrize("operation", REFUSED)
def test_kink_without_a_rule_is_refused_by_name(operation):
    with pytest.raises(UndecidedKinkError, match=f"^{operation} is exactly at a kink or tie in"):
        directional_gradient(REFUSED[operation], torch.ones(3), torch.randn(3))
    _check_nothing_stays_behind()


@pytest.mark.parametrize("operation", ["sort", "topk", "median", "round"])
def test_the_same_operations_pass_off_their_kinks(operation):
    point = torch.tensor([0.3, 2.4, 1.1])
    found = directional_gradient(REFUSED[operation], point, torch.ones(3))
    x = point.clone().requires_grad_()
    assert torch.equal(found.gradient, torch.autograd.grad(REFUSED[operation](x), x)[0])


def test_operation_that_cannot_be_checked_is_named():
    found = directional_gradient(lambda x: x.cummax(0).values.sum(), torch.tensor([1.0, 2.0]), torch.ones(2))
    assert found.not_checked == ("cummax",)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: x.sum() if x.sum().item() > 0 else -x.sum(), ("item",)),
        (lambda x: x.sum() if float(x.sum().detach()) > 0 else -x.sum(), ("detach",)),
        (lambda x: x[x.detach().argmax()], ("detach",)),
        (lambda x: x.sum() * (1 if x.sum() else 2), ("bool",)),
        (lambda x: x[x.sum().long()] * x.sum().tolist(), ("long", "tolist")),
        # What looks at no entry, or whose entries are decided, is no reservation.
        (lambda x: x.sum() * x.size(0) * torch.zeros_like(x, dtype=torch.int64).sum() + x[(x > 0).sum()], ()),
    ],
)
def test_choice_that_no_rule_sees_is_named(function, names):
    assert directional_gradient(function, torch.zeros(3), torch.tensor([-2.0, -1.0, 0.0])).not_checked == names


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_point_that_is_not_finite_is_refused(bad):
    with pytest.raises(DirectionError, match="tensor 0 of the point has 1 entries that are not finite"):
        directional_gradient(lambda x: x.sum(), torch.tensor([1.0, bad]), torch.ones(2))
    with pytest.raises(ForwardResultError, match="the function returned inf at the point"):
        directional_gradient(lambda x: x.exp().sum(), torch.tensor([1.0, 100.0]), torch.ones(2))


def test_gradient_that_is_not_finite_is_refused():
    with pytest.raises(UndecidedKinkError, match="tensor 1 of the point is not finite"):
        directional_gradient(lambda x, y: x.sum() + y.sqrt().sum(), (X, torch.zeros(2)), (X, X))


def test_program_that_changes_between_runs_is_refused():
    calls = []

    def program(x):
        calls.append(None)
        return x.abs().sum() if len(calls) == 1 else x[0].abs() + x.sum()

    with pytest.raises(UndecidedKinkError, match=r"at kink call 1 the first run had \(2,\) and the second \(\)"):
        directional_gradient(program, torch.zeros(2), torch.tensor([1.0, 0.0]))


BAD_PAIRS = {
    r"1 tensors and the direction 2": ((X,), (X, X)),
    r"0 tensors": ((), ()),
    r"tensor 0 of the point is torch.int64": (torch.ones(2, dtype=torch.int64), X),
    r"\(3,\) float32 on cpu, but that of the point \(2,\) float32": (X, torch.ones(3)),
    r"\(2,\) float64 on cpu": (X, X.double()),
    r"tensor 1 of the direction has entries that are not finite": ((X, X), (X, X / 0)),
    r"zero in all of its 1 tensor": (X, X * 0),
    r"the point is a Linear; give a tensor or a list": (nn.Linear(2, 2), X),
    r"entry 1 of the direction is a float": ((X, X), (X, 1.0)),
}


@pytest.mark.parametrize("match", BAD_PAIRS)
def test_point_and_direction_that_do_not_fit_are_refused(match):
    with pytest.raises(DirectionError, match=match):
        directional_gradient(lambda *x: x[0].sum(), *BAD_PAIRS[match])


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda x: x, r"shape \(2,\)"),
        (lambda x: 3.0, "returned float"),
        (lambda x: x.detach().sum(), "returned 2, which does not depend"),
    ],
)
def test_result_that_is_no_scalar_of_the_point_is_refused(function, match):
    with pytest.raises(ForwardResultError, match=match):
        directional_gradient(function, torch.ones(2), torch.ones(2))
    _check_nothing_stays_behind()


def test_nothing_stays_behind_after_an_exception_inside():
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        directional_gradient(lambda x: (x.relu()[None] @ torch.ones(5, 5)).sum(), torch.ones(2), torch.ones(2))
    _check_nothing_stays_behind()


def _check_nothing_stays_behind():
    assert _get_current_function_mode_stack() == []
    assert _get_current_dispatch_mode() is None
    x = torch.zeros(1, requires_grad=True)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones(1))
        torch.relu(dual).sum().backward()
    assert x.grad.item() == 0.0


@pytest.mark.parametrize(("axis_only", "passes", "factor"), [(False, 1, 5), (True, 2, 8)])
def test_cost_is_that_of_forward_mode_and_one_reverse_pass(axis_only, passes, factor):
    # Products of 8 x 8 matrices, all of which vary: function 1, tangents 2, reverse 2 in units of the function.
    matrices = [torch.randn(8, 8) for _ in range(4)]
    matrices[1][0] = 0.0
    direction = [torch.randn(8, 8) for _ in matrices]
    if axis_only:
        direction[1][0] = 0.0

    def chain(*matrices):
        product = matrices[0]
        for matrix in matrices[1:]:
            product = torch.relu(matrix @ product)
        return product.sum()

    with FlopCounterMode(display=False) as counter:
        found = directional_gradient(chain, matrices, direction)
    assert found.forward_passes == passes
    assert counter.get_total_flops() == factor * 3 * 2 * 8**3
