"""What is built on curvature: Gauss-Newton steps, inverse Fisher products, diagonals for optimisers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import cheapgrad
from cheapgrad.curvature import step_diagonals
from cheapgrad.curvature.gauss_newton_step import gauss_newton_step, solve_gauss_newton
from cheapgrad.curvature.inverse_fisher import InverseFisher, SlidingInverseFisher
from cheapgrad.curvature.step_diagonals import estimate_gauss_newton_diagonal, estimate_hessian_diagonal
from cheapgrad.errors import (
    BudgetError,
    LossError,
    NonFiniteCurvatureError,
    SecondDerivativeError,
    ShapeError,
    SingularCurvatureError,
    StochasticModelError,
    UnsupportedModelError,
)
from cheapgrad.exactness import forced_exact
from cheapgrad.sketch import RowSample

F64 = torch.float64


def converted_classifier(is_converted=True):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double().train()
    if is_converted:
        cheapgrad.approximate(model, cheapgrad.Rule("*", cotangent=RowSample(keep=0.5)), skip_small=False)
    return model, (torch.randn(7, 6, dtype=F64), torch.arange(7) % 3)


class TestGaussNewtonStep:
    @pytest.mark.parametrize("shape", [(5, 3, 40), (1, 1, 7), (6, 4, 10)])
    def test_equals_the_dense_solve(self, shape):
        B, C, P = shape
        jacobian = torch.randn(B, C, P, dtype=F64)
        root = torch.randn(B, C, C, dtype=F64)
        hessian, gradient = root @ root.mT, torch.randn(B, C, dtype=F64)
        dense = torch.einsum("bcp,bcd,bdq->pq", jacobian, hessian, jacobian) / B + 0.3 * torch.eye(P, dtype=F64)
        expected = -torch.linalg.solve(dense, torch.einsum("bcp,bc->p", jacobian, gradient) / B)
        step = solve_gauss_newton(jacobian, hessian, gradient, damping=0.3)
        torch.testing.assert_close(step, expected, rtol=1e-10, atol=1e-10)

    def test_of_a_classifier(self):
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        model[0].bias.requires_grad_(False)
        inputs, targets = torch.randn(5, 4, dtype=F64), torch.randint(0, 3, (5,))
        step = gauss_newton_step(model, nn.functional.cross_entropy, inputs, targets, damping=0.1)
        assert list(step) == ["0.weight", "2.weight", "2.bias"]
        parameters = [each for each in model.parameters() if each.requires_grad]
        logits = model(inputs)
        rows = [
            torch.cat([part.flatten() for part in torch.autograd.grad(logit, parameters, retain_graph=True)])
            for logit in logits.flatten()
        ]
        jacobian = torch.stack(rows).view(5, 3, -1)
        probabilities = logits.softmax(1).detach()
        hessian = torch.diag_embed(probabilities) - probabilities.unsqueeze(2) * probabilities.unsqueeze(1)
        gradient = probabilities - nn.functional.one_hot(targets, 3)
        P = jacobian.shape[2]
        dense = torch.einsum("bcp,bcd,bdq->pq", jacobian, hessian, jacobian) / 5 + 0.1 * torch.eye(P, dtype=F64)
        expected = -torch.linalg.solve(dense, torch.einsum("bcp,bc->p", jacobian, gradient) / 5)
        torch.testing.assert_close(
            torch.cat([each.flatten() for each in step.values()]), expected, rtol=1e-9, atol=1e-9
        )

    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_of_a_converted_model_is_exact(self, mode):
        model, data = converted_classifier()
        step = gauss_newton_step(getattr(model, mode)(), nn.functional.cross_entropy, *data, damping=0.1)
        plain, _ = converted_classifier(is_converted=False)
        expected = gauss_newton_step(plain, nn.functional.cross_entropy, *data, damping=0.1)
        for name, part in expected.items():
            torch.testing.assert_close(step[name], part, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize(("layer", "name"), [(nn.Dropout(0.5), "Dropout"), (nn.BatchNorm1d(4), "BatchNorm1d")])
    def test_layers_that_draw_or_mix_examples(self, layer, name):
        model = nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 2))
        with pytest.raises(StochasticModelError, match=f"'1' is a {name}"):
            gauss_newton_step(model, nn.functional.cross_entropy, torch.ones(2, 3), torch.zeros(2).long(), damping=1.0)

    def test_bad_input(self):
        good = torch.ones(2, 3, 4), torch.eye(3).expand(2, 3, 3), torch.ones(2, 3)
        with pytest.raises(SingularCurvatureError, match=r"damping=0\.0 leaves the system of 6 equations"):
            solve_gauss_newton(*good, damping=0.0)
        with pytest.raises(BudgetError, match=r"at least 0, but got -1\.0"):
            solve_gauss_newton(*good, damping=-1.0)
        with pytest.raises(ShapeError, match=r"\[B, C, P\], but got \(2, 3\)"):
            solve_gauss_newton(good[2], good[1], good[2], damping=1.0)
        with pytest.raises(ShapeError, match=r"gradient must have the shape \(2, 3\) .* but got \(3, 2\)"):
            solve_gauss_newton(good[0], good[1], torch.ones(3, 2), damping=1.0)
        with pytest.raises(NonFiniteCurvatureError, match="1 entries of the gradient"):
            solve_gauss_newton(good[0], good[1], torch.tensor([[math.nan, 1, 1], [1, 1, 1]]), damping=1.0)
        with pytest.raises(SingularCurvatureError, match=r"1 equations is singular with damping=1\.0"):
            solve_gauss_newton(torch.ones(1, 1, 1), -torch.ones(1, 1, 1), torch.ones(1, 1), damping=1.0)
        with pytest.raises(ShapeError, match=r"scalar loss of one example, but got the shape \(2,\)"):
            gauss_newton_step(nn.Linear(3, 2), lambda y, t: y - t, torch.ones(4, 3), torch.ones(4, 2), damping=1.0)


def dense_inverse(gradients, damping):
    size = gradients.shape[1]
    return torch.linalg.inv(damping * torch.eye(size, dtype=F64) + gradients.T @ gradients / len(gradients))


class TestInverseFisher:
    @pytest.mark.parametrize("count", [1, 5, 30])
    def test_products_entries_and_diagonal(self, count):
        gradients = torch.randn(count, 12, dtype=F64)
        inverse, dense = InverseFisher(gradients, damping=0.01), dense_inverse(gradients, 0.01)
        torch.testing.assert_close(inverse.to_dense(), dense, rtol=1e-9, atol=1e-9)
        vector = torch.randn(12, dtype=F64)
        torch.testing.assert_close(inverse @ vector, dense @ vector, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(inverse.diagonal(), dense.diagonal(), rtol=1e-9, atol=1e-9)
        for row, column in ((0, 0), (3, 7), (-1, 11)):
            torch.testing.assert_close(inverse.entry(row, column), dense[row, column], rtol=1e-9, atol=1e-9)

    def test_window_slides(self):
        gradients = torch.randn(11, 6, dtype=F64)
        inverse = SlidingInverseFisher(4, 6, damping=0.1, dtype=F64)
        for index, gradient in enumerate(gradients):
            inverse.push(gradient)
            recent = gradients[max(0, index - 3) : index + 1]
            torch.testing.assert_close(inverse.to_dense(), dense_inverse(recent, 0.1), rtol=1e-10, atol=1e-10)
            assert inverse.count == len(recent)

    def test_a_rejected_gradient_leaves_the_window_alone(self):
        inverse = SlidingInverseFisher(2, 3, damping=0.1)
        inverse.push(torch.ones(3))
        before = inverse.to_dense()
        with pytest.raises(NonFiniteCurvatureError, match="2 entries of the gradients"):
            inverse.push(torch.tensor([1.0, math.inf, math.nan]))
        torch.testing.assert_close(inverse.to_dense(), before)

    def test_bad_input(self):
        with pytest.raises(SingularCurvatureError, match=r"but got 0; use e\.g\."):
            InverseFisher(torch.ones(2, 3), damping=0)
        with pytest.raises(ShapeError, match=r"at least one, but got \(0, 3\)"):
            InverseFisher(torch.ones(0, 3), damping=1.0)
        with pytest.raises(ShapeError, match="from 0 to 2, but got 3"):
            InverseFisher(torch.ones(2, 3), damping=1.0).entry(3, 0)
        with pytest.raises(BudgetError, match="window must be a whole number of at least 1, but got 0"):
            SlidingInverseFisher(0, 3, damping=1.0)
        empty = SlidingInverseFisher(2, 3, damping=1.0)
        with pytest.raises(BudgetError, match="the window is empty"):
            empty @ torch.ones(3)
        with pytest.raises(ShapeError, match=r"one gradient \[3\], but got the shape \(3, 2\)"):
            empty.push(torch.ones(3, 2))


class TestDiagonals:
    def test_hutchinson_by_listing_all_signs(self, monkeypatch):
        weight = torch.randn(2, 2, dtype=F64, requires_grad=True)
        bias = torch.randn(2, dtype=F64, requires_grad=True)

        def loss_of(weight, bias):
            return ((weight.T @ weight).sum() * bias.exp().sum() + (weight[0] * bias).sum() ** 3).sin()

        loss = loss_of(weight, bias)
        outcomes = []
        for signs in itertools.product([-1.0, 1.0], repeat=6):
            pieces = iter([torch.tensor(signs[:4], dtype=F64).view(2, 2), torch.tensor(signs[4:], dtype=F64)])
            monkeypatch.setattr(step_diagonals, "_draw_signs", lambda like, generator, pieces=pieces: next(pieces))
            outcomes.append(torch.cat([each.flatten() for each in estimate_hessian_diagonal(loss, [weight, bias])]))
        flat = torch.cat([weight.flatten(), bias]).detach()
        hessian = torch.func.hessian(lambda flat: loss_of(flat[:4].view(2, 2), flat[4:]))(flat)
        estimates = torch.stack(outcomes)
        torch.testing.assert_close(estimates.mean(0), hessian.diagonal(), rtol=1e-12, atol=1e-12)
        off_diagonal = hessian - torch.diag(hessian.diagonal())
        variance = (estimates - hessian.diagonal()).square().mean(0)
        torch.testing.assert_close(variance, off_diagonal.square().sum(1), rtol=1e-12, atol=1e-12)

    def test_gauss_newton_bartlett_by_listing_all_labels(self, monkeypatch):
        weight = torch.randn(4, 3, dtype=F64, requires_grad=True)
        inputs = torch.randn(2, 4, dtype=F64)
        logits = inputs @ weight
        probabilities = logits.softmax(1).detach()
        mean = torch.zeros(4, 3, dtype=F64)
        for labels in itertools.product(range(3), repeat=2):
            drawn = torch.tensor(labels).unsqueeze(1)
            monkeypatch.setattr(torch, "multinomial", lambda *_, drawn=drawn, **__: drawn)
            probability = probabilities.gather(1, drawn).prod()
            mean += probability * estimate_gauss_newton_diagonal(logits, [weight])[0]
        curvature = (probabilities * (1 - probabilities)).unsqueeze(1) * inputs.square().unsqueeze(2)
        torch.testing.assert_close(mean, curvature.mean(0), rtol=1e-12, atol=1e-12)

    def test_sketched_gradients_are_not_squared(self):
        model, (inputs, _) = converted_classifier()
        parameters = list(model.parameters())
        with pytest.raises(StochasticModelError, match=r"layers on the way to the logits have sketched gradients"):
            estimate_gauss_newton_diagonal(model(inputs), parameters)
        with forced_exact():
            logits = model(inputs)
        plain, _ = converted_classifier(is_converted=False)
        found, expected = (
            estimate_gauss_newton_diagonal(outputs, tensors, generator=torch.Generator().manual_seed(0))
            for outputs, tensors in ((logits, parameters), (plain(inputs), list(plain.parameters())))
        )
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        loss = nn.functional.cross_entropy(model(inputs), torch.zeros(7).long())
        with pytest.raises(SecondDerivativeError, match="a second derivative was taken through a sketched"):
            estimate_hessian_diagonal(loss, parameters)

    @pytest.mark.parametrize("add", [0.0, 1.0])
    def test_a_second_derivative_that_is_missing_is_named(self, add):
        """Of x², marked: 2 is missing in both cases, and in the second one another term would hide it."""

        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x**2

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx, grad):
                return 2 * ctx.saved_tensors[0] * grad

        weight = torch.ones(2, requires_grad=True)
        with pytest.raises(UnsupportedModelError, match="marked once_differentiable"):
            estimate_hessian_diagonal(Square.apply(weight).sum() + add * weight.square().sum(), [weight])

    def test_draws_are_averaged_and_reproducible(self):
        weight = torch.randn(3, 3, dtype=F64, requires_grad=True)
        loss = (weight @ weight).sum().exp()
        seeded = [
            estimate_hessian_diagonal(loss, [weight], draws=2, generator=torch.Generator().manual_seed(1))[0]
            for _ in range(2)
        ]
        torch.testing.assert_close(*seeded, rtol=0, atol=0)
        generator = torch.Generator().manual_seed(1)
        single = [estimate_hessian_diagonal(loss, [weight], generator=generator)[0] for _ in range(2)]
        torch.testing.assert_close(seeded[0], (single[0] + single[1]) / 2)
        loss.backward()  # the graph is still there
        assert weight.grad is not None

    def test_kernels_are_averaged(self):
        convolution = nn.Conv2d(1, 2, 3).double()
        loss = convolution(torch.randn(1, 1, 5, 5, dtype=F64)).pow(4).mean()
        parameters = list(convolution.parameters())
        plain, averaged = (
            estimate_hessian_diagonal(
                loss, parameters, average_kernels=average, generator=torch.Generator().manual_seed(0)
            )
            for average in (False, True)
        )
        torch.testing.assert_close(averaged[0], plain[0].mean((2, 3), keepdim=True).expand(2, 1, 3, 3))
        torch.testing.assert_close(averaged[1], plain[1])

    def test_parameters_without_a_second_derivative_get_zeros(self):
        used, linear, unused = (torch.ones(2, requires_grad=True) for _ in range(3))
        loss = used.square().sum() + linear.sum()
        diagonal = estimate_hessian_diagonal(loss, [used, linear, unused])
        assert [each.tolist() for each in diagonal] == [[2.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
        only_linear = torch.ones(2, requires_grad=True)
        assert estimate_hessian_diagonal(only_linear.sum(), [only_linear])[0].tolist() == [0.0, 0.0]
        logits = used.unsqueeze(0) * torch.ones(3, 2)
        assert estimate_gauss_newton_diagonal(logits, [unused])[0].tolist() == [0.0, 0.0]

    def test_tokens_count_as_predictions(self):
        weight = torch.randn(4, 3, dtype=F64, requires_grad=True)
        inputs = torch.randn(2, 5, 4, dtype=F64)
        drawn = [
            estimate_gauss_newton_diagonal(each, [weight], generator=torch.Generator().manual_seed(3))[0]
            for each in (inputs @ weight, inputs.view(10, 4) @ weight)
        ]
        torch.testing.assert_close(*drawn)

    def test_bad_input(self):
        weight = torch.ones(2, requires_grad=True)
        with pytest.raises(LossError, match=r"scalar with a graph, but got \(2,\)"):
            estimate_hessian_diagonal(weight * 2, [weight])
        with pytest.raises(LossError, match=r"but got \(\), requires_grad=False"):
            estimate_hessian_diagonal(weight.detach().sum(), [weight])
        with pytest.raises(BudgetError, match="draws must be a whole number of at least 1, but got 0"):
            estimate_hessian_diagonal(weight.sum(), [weight], draws=0)
        with pytest.raises(NonFiniteCurvatureError, match="2 entries of the diagonal of parameter 0"):
            estimate_hessian_diagonal((weight - 1).abs().pow(1.5).sum(), [weight])
        with pytest.raises(LossError, match=r"logits must be \[..., C\] with a graph, but got the shape \(2,\)"):
            estimate_gauss_newton_diagonal(weight, [weight])
        with pytest.raises(NonFiniteCurvatureError, match="the logits are not finite"):
            estimate_gauss_newton_diagonal(weight.view(1, 2) * math.inf, [weight])
