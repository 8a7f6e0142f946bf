"""The demo's networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cheapgrad.demo import DigitsMLP, DigitsViT


@pytest.mark.parametrize("build", [DigitsMLP, DigitsViT])
def test_checkpointing_changes_no_gradient(build):
    model, pictures = build(), torch.randn(5, 8, 8)
    gradients = []
    for checkpointed in (False, True):
        model.checkpointed = checkpointed
        gradients.append(torch.autograd.grad(model(pictures).logsumexp(1).sum(), list(model.parameters())))
    assert all(torch.equal(exact, again) for exact, again in zip(*gradients, strict=True))


@pytest.mark.parametrize("build", [DigitsMLP, DigitsViT])
def test_pictures_become_class_scores_and_every_parameter_learns(build):
    model = build()
    scores = model(torch.randn(5, 8, 8))
    assert scores.shape == (5, 10)
    scores.logsumexp(1).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_every_matrix_is_the_weight_of_a_linear_module():
    model = DigitsViT(width=32, depth=3)
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    others = [
        name for name, parameter in model.named_parameters() if parameter.dim() == 2 and id(parameter) not in linear
    ]
    assert others == ["position"]
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) == 1 + 3 * 4 + 1


def test_patches_are_squares_of_two_by_two():
    model = DigitsViT()
    seen = []
    model.embedding.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    picture = torch.arange(64.0).reshape(1, 8, 8)
    model(picture)
    assert seen[0][0, 0].tolist() == [0, 1, 8, 9]
    assert seen[0][0, 5].tolist() == [18, 19, 26, 27]


def test_tokens_know_their_place():
    model = DigitsViT().eval()
    picture = torch.randn(1, 8, 8)
    assert not torch.allclose(model(picture), model(picture.roll(2, dims=2)), atol=1e-3)
