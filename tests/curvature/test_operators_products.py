"""Products of every curvature matrix against dense ones made with torch.func, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cheapgrad.curvature import (
    AbstractDataOperator,
    BatchReader,
    Categorical,
    Draws,
    EmpiricalFisher,
    GaussNewton,
    Hessian,
    MonteCarloFisher,
)
from tests.curvature.models import NAMES, Case, make_case, split
from tests.oracles import curvature as oracle

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def _dense(kind: type, case: Case, names: list[str] | None = None) -> torch.Tensor:
    names = names or [name for name, _ in case.model.named_parameters()]
    outputs_of, at_P = oracle.flat_outputs(case.model, names, lambda model: case.run(model, case.inputs))
    build = oracle.dense_hessian if kind is Hessian else oracle.dense_gauss_newton
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return build(outputs_of, lambda outputs: case.loss(outputs, case.targets), at_P)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_products_equal_the_dense_matrix(kind: type[AbstractDataOperator], name: str) -> None:
    case = make_case(name)
    operator = kind(case.model, case.loss, (case.inputs, case.targets))
    dense = _dense(kind, case)
    # The logarithm of the likelihood is linear in outputs that are log-probabilities.
    assert (dense.abs().max() > 1e-3) == ((kind, name) != (GaussNewton, "log_softmax inside"))
    columns = torch.randn(operator.shape[0], 3, dtype=torch.float64)
    expected = dense @ columns
    torch.testing.assert_close(operator @ columns, expected, **EXACT)
    torch.testing.assert_close(operator @ columns[:, 0], expected[:, 0], **EXACT)
    held = operator.linearized()
    torch.testing.assert_close(held @ columns[:, 1], expected[:, 1], **EXACT)
    # Unequal micro-batches, weighted by their sizes.
    sizes = [1, 2, 3]
    parts = list(zip(split(case.inputs, sizes), split(case.targets, sizes), strict=True))
    torch.testing.assert_close(kind(case.model, case.loss, parts) @ columns, expected, **EXACT)


@pytest.mark.parametrize("name", ["MLP", "CNN with groups", "attention", "LSTM", "tokens"])
def test_both_routes_of_a_sandwich_agree(name: str) -> None:
    case = make_case(name)
    operator = GaussNewton(case.model, case.loss, (case.inputs, case.targets))
    column = torch.randn(operator.shape[0], dtype=torch.float64)
    expected = _dense(GaussNewton, case) @ column
    for route in (
        lambda item: operator._linearize(item)(column),
        lambda item: operator._multiply_forward(item, column),
    ):
        torch.testing.assert_close(operator._mean(route, None), expected, **EXACT)


def test_the_hessian_of_attention_is_the_derivative_of_its_gradient() -> None:
    """Central differences, since forward mode through layer norms cannot be trusted everywhere."""
    case = make_case("attention")
    operator = Hessian(case.model, case.loss, (case.inputs, case.targets))
    direction = torch.randn(operator.shape[0], dtype=torch.float64)
    product, step = operator @ direction, 1e-5

    def gradient_at(scale: float) -> torch.Tensor:
        with torch.no_grad():
            for parameter, part in zip(case.model.parameters(), operator.split(direction).values(), strict=True):
                parameter += scale * part
        return operator.gradient()

    ahead = gradient_at(step)
    behind = gradient_at(-2 * step)
    torch.testing.assert_close((ahead - behind) / (2 * step), product, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_a_subset_of_parameters_is_a_principal_block(kind: type[AbstractDataOperator]) -> None:
    case = make_case("MLP")
    block = _dense(kind, case, ["0.bias", "2.weight"])
    named = dict(case.model.named_parameters())
    for parameters in (["2.weight", "0.bias"], [named["0.bias"], named["2.weight"]]):
        operator = kind(case.model, case.loss, (case.inputs, case.targets), parameters=parameters)
        assert operator.parameter_names == ("0.bias", "2.weight")
        torch.testing.assert_close(operator.to_dense(), block, **EXACT)
    module = kind(case.model, case.loss, (case.inputs, case.targets), parameters="2")
    assert module.parameter_names == ("2.weight", "2.bias")
    parts = operator.split(torch.arange(20, dtype=torch.float64))
    assert {name: tuple(part.shape) for name, part in parts.items()} == {"0.bias": (5,), "2.weight": (3, 5)}
    named["2.bias"].requires_grad_(False)
    case.model[0].requires_grad_(False)
    assert kind(case.model, case.loss, (case.inputs, case.targets)).parameter_names == ("2.weight",)


@pytest.mark.parametrize("name", ["MLP", "regression", "CNN with groups", "attention"])
def test_the_empirical_fisher_is_the_second_moment_of_gradients(name: str) -> None:
    case = make_case(name)
    singles = list(zip(case.inputs.split(1), case.targets.split(1), strict=True))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        dense = oracle.second_moment(oracle.per_example_gradients(case.model, case.loss, singles))
    operator = EmpiricalFisher(case.model, case.loss, (case.inputs, case.targets))
    columns = torch.randn(operator.shape[0], 2, dtype=torch.float64)
    torch.testing.assert_close(operator @ columns, dense @ columns, **EXACT)
    torch.testing.assert_close(operator @ columns[:, 0], dense @ columns[:, 0], **EXACT)
    pairs = list(zip(case.inputs.split([5, 1]), case.targets.split([5, 1]), strict=True))
    parts = EmpiricalFisher(case.model, case.loss, pairs)
    torch.testing.assert_close(parts @ columns, dense @ columns, **EXACT)


def test_sampled_roots_have_the_second_moment_of_the_loss() -> None:
    """By enumeration: every class in turn, with its probability, gives the second derivative of the cross-entropy."""
    logits = torch.randn(2, 3, dtype=torch.float64)
    p_BC = logits.softmax(-1)
    expected = oracle.dense_gauss_newton(
        lambda flat: flat.reshape(2, 3),
        lambda f: nn.functional.cross_entropy(f, torch.tensor([0, 2])),
        logits.flatten(),
    )
    total, seen = torch.zeros(6, 6, dtype=torch.float64), set()
    for seed in range(400):
        root = Categorical().draw_root(logits, torch.tensor([0, 2]), torch.Generator().manual_seed(seed))
        labels = tuple(root.argmin(-1).tolist())
        if labels in seen:
            continue
        seen.add(labels)
        probability = p_BC[0, labels[0]] * p_BC[1, labels[1]]
        for row in range(2):
            term = torch.zeros(2, 3, dtype=torch.float64)
            term[row] = root[row]
            total += probability * torch.outer(term.flatten(), term.flatten())
    assert len(seen) == 9
    torch.testing.assert_close(total, expected, **EXACT)


@pytest.mark.parametrize(
    ("name", "loss"), [("MLP", nn.CrossEntropyLoss()), ("regression", nn.MSELoss()), ("MLP", nn.BCEWithLogitsLoss())]
)
def test_the_monte_carlo_fisher_is_unbiased(name: str, loss: nn.Module) -> None:
    """Quadratic forms of 4,000 draws against the Gauss–Newton matrix, within four standard errors of two per cent."""
    case = make_case(name)
    case.targets = torch.rand(6, 3, dtype=torch.float64) if isinstance(loss, nn.BCEWithLogitsLoss) else case.targets
    data = (case.inputs, case.targets)
    columns = torch.randn(GaussNewton(case.model, loss, data).shape[0], 2, dtype=torch.float64)
    truth = (columns * (GaussNewton(case.model, loss, data) @ columns)).sum(0)
    forms = torch.stack(
        [
            (columns * (MonteCarloFisher(case.model, loss, data, draws=Draws(200, seed)) @ columns)).sum(0)
            for seed in range(20)
        ]
    )
    error = forms.std(0) / 20**0.5
    assert (error < 0.02 * truth).all()
    assert ((forms.mean(0) - truth).abs() < 4 * error).all()


def test_the_monte_carlo_fisher_counts_terms_and_leaves_out_what_is_ignored() -> None:
    case = make_case("tokens")
    case.targets[0, :3] = -100
    data = (case.inputs, case.targets)
    reader = BatchReader(size=lambda batch: int((batch[1] != -100).sum()))
    newton = GaussNewton(case.model, case.loss, data)
    column = torch.randn(newton.shape[0], dtype=torch.float64)
    truth = float(column @ (newton @ column))
    forms = torch.tensor(
        [
            float(column @ (MonteCarloFisher(case.model, case.loss, data, draws=Draws(200, seed)) @ column))
            for seed in range(12)
        ]
    )
    assert forms.std() / 12**0.5 < 0.02 * truth
    assert abs(forms.mean() - truth) < 4 * forms.std() / 12**0.5
    # Batches of unequal numbers of counted tokens, weighted by those.
    parts = list(zip(split(case.inputs, [1, 5]), split(case.targets, [1, 5]), strict=True))
    by_tokens = GaussNewton(case.model, case.loss, parts, reader=reader)
    torch.testing.assert_close(by_tokens @ column, newton @ column, **EXACT)
    assert [part.example_count for part in by_tokens.micro_batches] == [1, 20]


def test_the_monte_carlo_fisher_is_one_matrix() -> None:
    case = make_case("MLP")
    operator = MonteCarloFisher(case.model, case.loss, (case.inputs, case.targets), draws=Draws(2, seed=5))
    dense = operator.to_dense()
    torch.testing.assert_close(dense, dense.T, **EXACT)
    torch.testing.assert_close(operator.to_dense(), dense, rtol=0, atol=0)
    torch.testing.assert_close(operator.linearized().to_dense(), dense, **EXACT)
    assert torch.linalg.matrix_rank(dense) <= 12 < len(dense)
    other = MonteCarloFisher(case.model, case.loss, (case.inputs, case.targets), draws=Draws(2, seed=6))
    assert not torch.allclose(other.to_dense(), dense)


def test_loss_and_gradient_are_the_mean_over_batches() -> None:
    case = make_case("attention")
    pairs = list(zip(case.inputs.split([4, 2]), case.targets.split([4, 2]), strict=True))
    operator = Hessian(case.model, case.loss, pairs)
    loss = case.loss(case.model(case.inputs), case.targets)
    expected = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(case.model.parameters()))])
    assert operator.loss() == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(operator.gradient(), expected, **EXACT)
    assert all(parameter.grad is None for parameter in case.model.parameters())


def test_micro_batches_are_the_terms_of_the_mean() -> None:
    case = make_case("MLP")
    pairs = list(zip(case.inputs.split([4, 2]), case.targets.split([4, 2]), strict=True))
    for operator in (
        Hessian(case.model, case.loss, pairs),
        MonteCarloFisher(case.model, case.loss, pairs),
        Hessian(case.model, case.loss, pairs).linearized(),
    ):
        parts = operator.micro_batches
        assert [(part.weight, part.example_count) for part in parts] == [(4 / 6, 4), (2 / 6, 2)]
        column = torch.randn(operator.shape[0], dtype=torch.float64)
        mean = sum(part.weight * (part.operator @ column) for part in parts)
        torch.testing.assert_close(operator @ column, mean, **EXACT)
        assert operator.example_count == 6
        assert isinstance(parts[0].operator, type(operator))
        gradients = sum(part.weight * part.operator.gradient() for part in parts)  # type: ignore[attr-defined]
        torch.testing.assert_close(operator.gradient(), gradients, **EXACT)


def test_dict_batches_and_models_that_return_records() -> None:
    case = make_case("tokens")
    batch = case.inputs | {"labels": case.targets}

    class Record(dict):
        pass

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: torch.Tensor, scale: torch.Tensor, labels: torch.Tensor) -> Record:
            logits = self.inner(ids, scale)
            return Record(loss=nn.functional.cross_entropy(logits, labels), logits=logits)

    model = Wrapped(case.model)
    dense_hessian, dense_newton = _dense(Hessian, case), _dense(GaussNewton, case)
    hessian = Hessian(model, lambda record, _: record["loss"], batch)
    column = torch.randn(hessian.shape[0], dtype=torch.float64)
    torch.testing.assert_close(hessian @ column, dense_hessian @ column, **EXACT)
    reader = BatchReader(predict=lambda model, inputs: model(**inputs)["logits"])
    newton = GaussNewton(
        model, lambda logits, batch: nn.functional.cross_entropy(logits, batch["labels"]), [batch], reader=reader
    )
    torch.testing.assert_close(newton @ column, dense_newton @ column, **EXACT)


def test_iterables_that_start_anew_are_gone_through_in_each_product() -> None:
    case = make_case("MLP")
    data = torch.utils.data.TensorDataset(case.inputs, case.targets)
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    operator = Hessian(case.model, case.loss, loader)
    column = torch.randn(operator.shape[0], dtype=torch.float64)
    expected = _dense(Hessian, case) @ column
    for _ in range(2):
        torch.testing.assert_close(operator @ column, expected, **EXACT)
    assert sorted(part.example_count or 0 for part in operator.micro_batches) == [2, 4]


def test_a_held_graph_follows_nothing_and_says_so() -> None:
    from cheapgrad.errors import StaleGraphError

    case = make_case("MLP")
    operator = Hessian(case.model, case.loss, (case.inputs, case.targets))
    held = operator.linearized()
    column = torch.randn(operator.shape[0], dtype=torch.float64)
    torch.testing.assert_close(held @ column, operator @ column, **EXACT)
    with torch.no_grad():
        case.model[2].weight.mul_(1.1)
    with pytest.raises(StaleGraphError, match=r"call linearized\(\) again"):
        held @ column
    torch.testing.assert_close(operator @ column, _dense(Hessian, case) @ column, **EXACT)


def test_a_model_that_is_linear_in_its_parameters_has_no_curvature_of_its_own() -> None:
    model = nn.Linear(3, 1, bias=False).double()
    data = (torch.randn(4, 3, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64))
    operator = Hessian(model, lambda outputs, targets: (outputs - targets).mean(), data)
    assert (operator @ torch.ones(3, dtype=torch.float64)).abs().max() == 0
