"""Attention with sketched projections against PyTorch's, its law, and what it holds."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from cheapgrad import Rule, approximate
from cheapgrad.convert.kinds import LayerUse, kind_of
from cheapgrad.cost import measure_held_bytes
from cheapgrad.errors import NoEffectWarning
from cheapgrad.sketch import ExampleSample, Moment, RowProjection, RowSample, StochasticRounding, Uniform
from cheapgrad.sketch._row_sampling import AbstractRowSampling
from cheapgrad.sketch.selection import Selection
from tests.ops.chains.networks import choose_all_rows

WIDTH, HEADS, BATCH, LENGTH, SOURCE = 16, 4, 3, 5, 7
RULES = {
    "rows": Rule(cotangent=RowSample(0.5)),
    "codes": Rule(stored=StochasticRounding(4)),
    "both": Rule(stored=StochasticRounding(4), cotangent=RowSample(0.5), recompute=True),
    "examples": Rule(cotangent=ExampleSample(0.5)),
    "stored rows": Rule(stored=RowSample(0.5)),
    "projection": Rule(cotangent=RowProjection(0.5)),
}
FORMS = {
    "self": {},
    "self, batch first": {"batch_first": True},
    "keys are values": {"uses": "kv"},
    "keys are values, batch first": {"uses": "kv", "batch_first": True},
    "all apart": {"uses": "all", "batch_first": True},
    "other widths": {"uses": "all", "kdim": 12, "vdim": 10},
    "other widths, batch first": {"uses": "all", "kdim": 12, "vdim": 10, "batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
}


def build(uses="self", dtype=torch.float32, **options):
    """Return a module, and query, key and value for it."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) / 4)

    def draw(length, width):
        shape = (BATCH, length) if module.batch_first else (length, BATCH)
        return torch.randn(*shape, width, dtype=dtype)

    query = draw(LENGTH, WIDTH)
    if uses == "self":
        return module, (query, query, query)
    key = draw(SOURCE, module.kdim)
    return module, (query, key, key if uses == "kv" else draw(SOURCE, module.vdim))


def converted(module, rule):
    ours = copy.deepcopy(module)
    approximate(ours, rule, skip_small=False)
    assert type(ours).__name__ == "SketchedMultiheadAttention"
    return ours


def leaves_of(inputs):
    """Return the inputs as leaves; those that were one tensor stay one."""
    known = {id(x): x.detach().clone().requires_grad_() for x in inputs}
    return tuple(known[id(x)] for x in inputs)


def gradients(module, inputs, **arguments):
    """Return the gradients of the inputs and the parameters for a fixed cotangent."""
    leaves = leaves_of(inputs)
    output = module(*leaves, **arguments)[0]
    cotangent = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    wanted = [*{id(leaf): leaf for leaf in leaves}.values(), *module.parameters()]
    return torch.autograd.grad(output, wanted, cotangent)


def masks(source):
    generator = torch.Generator().manual_seed(2)
    barred = torch.rand(LENGTH, source, generator=generator) > 0.7
    barred[:, 0] = False
    padded = torch.rand(BATCH, source, generator=generator) > 0.6
    padded[:, 0] = False
    added = torch.randn(BATCH * HEADS, LENGTH, source, generator=generator)
    return {
        "none": {},
        "barred": {"attn_mask": barred},
        "added": {"attn_mask": added},
        "padded": {"key_padding_mask": padded},
        "barred and padded": {"attn_mask": barred, "key_padding_mask": padded},
    }


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask", masks(SOURCE))
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_forward_is_bit_identical(rule, form, mask, need_weights):
    module, inputs = build(**form)
    arguments = masks(inputs[1].shape[1 if module.batch_first else 0])[mask]
    ours = converted(module, rule)
    outputs = [one(*leaves_of(inputs), need_weights=need_weights, **arguments) for one in (module, ours)]
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert outputs[0][0].stride() == outputs[1][0].stride()
    assert (outputs[0][1] is None) == (outputs[1][1] is None)
    assert outputs[0][1] is None or torch.equal(outputs[0][1], outputs[1][1])


def test_forward_is_bit_identical_with_what_is_seldom_asked_for():
    module, inputs = build(dropout=0.3, batch_first=True)
    ours = converted(module, RULES["rows"])
    square = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    for arguments in (
        {"average_attn_weights": False},
        {"attn_mask": square, "is_causal": True, "need_weights": False},
        {"attn_mask": square, "is_causal": True},
        {"need_weights": False},
    ):
        outputs = []
        for one in (module, ours):
            torch.manual_seed(3)
            outputs.append(one(*leaves_of(inputs), **arguments))
        assert torch.equal(outputs[0][0], outputs[1][0])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradients_are_exact_where_all_rows_are_kept(form, recompute, need_weights, monkeypatch):
    choose_all_rows(monkeypatch)
    module, inputs = build(dtype=torch.float64, **form)
    ours = converted(module, Rule(cotangent=RowSample(0.5), recompute=recompute))
    arguments = {"need_weights": need_weights}
    torch.testing.assert_close(gradients(ours, inputs, **arguments), gradients(module, inputs, **arguments))


def gradients_of_every_outcome(monkeypatch, scale=2.0):
    """Return the mean over all pairs of draws, at the output's projection and at the packed ones, and the truth."""
    module, inputs = build(dtype=torch.float64, batch_first=True)
    inputs = (inputs[0][:2, :2],) * 3
    ours = converted(module, Rule(cotangent=RowSample(0.5, scores=Uniform())))
    outcomes = list(itertools.combinations(range(4), 2))
    total = None
    for pair in itertools.product(outcomes, outcomes):
        draws = list(pair)

        def select(strategy, operands, rows, draws=draws):
            return Selection(torch.tensor(draws.pop(0)), torch.full((2,), scale, dtype=torch.float64), rows)

        monkeypatch.setattr(AbstractRowSampling, "select", select)
        drawn = [part / 36 for part in gradients(ours, inputs, need_weights=False)]
        assert not draws
        total = drawn if total is None else [one + other for one, other in zip(total, drawn, strict=True)]
    return total, gradients(module, inputs, need_weights=False)


def test_the_mean_of_all_outcomes_is_the_gradient(monkeypatch):
    mean, exact = gradients_of_every_outcome(monkeypatch)
    torch.testing.assert_close(tuple(mean), exact, rtol=1e-10, atol=1e-12)


def test_a_biased_twin_is_caught(monkeypatch):
    mean, exact = gradients_of_every_outcome(monkeypatch, scale=1.98)
    assert not any(torch.allclose(one, other, rtol=1e-3) for one, other in zip(mean, exact, strict=True))


def test_codes_are_unbiased():
    module, inputs = build(dtype=torch.float64, batch_first=True)
    ours, draws = converted(module, Rule(stored=StochasticRounding(4))), 400
    many = [gradients(ours, inputs, need_weights=False) for _ in range(draws)]
    for position, exact in enumerate(gradients(module, inputs, need_weights=False)):
        drawn = torch.stack([one[position] for one in many])
        error = (drawn.var(0).sum() / draws).sqrt()
        assert error < 0.01 * exact.norm(), "too few draws to tell"
        # The squared distance of the mean is about its expectation, error**2; five times that is beyond chance.
        assert (drawn.mean(0) - exact).norm() <= 1e-9 * exact.norm() + 2.3 * error
    assert float((torch.stack([one[1] for one in many]).std(0)).max()) > 0, "nothing is vacuous"


def block(norm_first=True):
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(
        WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
    )


def held(module, *inputs, **arguments):
    module(*inputs, **arguments)
    return measure_held_bytes(lambda: module(*inputs, **arguments)[0], exclude=[module]).total_bytes


def test_queries_keys_and_values_are_rebuilt_from_the_input():
    module, inputs = build(batch_first=True)
    tokens, floats = BATCH * LENGTH, 4
    scores = BATCH * HEADS * LENGTH * floats
    query = leaves_of(inputs)
    exact = held(module, *query, need_weights=False)
    # A copy of the input in turned order, queries, keys and values, and the attention's output.
    assert exact == 5 * tokens * WIDTH * floats + scores
    ours = converted(module, Rule(cotangent=RowSample(0.5), recompute=True))
    # The input and the attention's output.
    assert held(ours, *query, need_weights=False) == 2 * tokens * WIDTH * floats + scores


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_what_is_not_covered_is_named(option):
    module = nn.MultiheadAttention(WIDTH, HEADS, **{option: True})
    with pytest.warns(NoEffectWarning, match=f"{option}=True"):
        handle = approximate(module, RULES["rows"], skip_small=False)
    assert f"{option}=True" in handle.rows[0].remark


def test_the_projection_that_is_not_called_is_named():
    handle = approximate(nn.MultiheadAttention(WIDTH, HEADS), RULES["rows"], skip_small=False)
    remarks = {row.name: row.remark for row in handle.rows}
    assert "convert the attention" in remarks["out_proj"]


def test_small_ones_are_left_alone():
    with pytest.warns(NoEffectWarning, match="256 weights"):
        approximate(nn.MultiheadAttention(WIDTH, HEADS), RULES["rows"])


def test_unusual_calls_run_stock_code():
    module, _ = build()
    ours, x = converted(module, RULES["rows"]), torch.randn(LENGTH, WIDTH)
    assert torch.equal(ours(x, x, x)[0], module(x, x, x)[0])
    with pytest.raises(AssertionError, match="embedding dimension"):
        ours(*[torch.randn(LENGTH, BATCH, 8)] * 3)


def test_by_keyword():
    module, (query, key, value) = build(batch_first=True)
    ours = converted(module, RULES["rows"])
    assert torch.equal(ours(query=query, key=key, value=value)[0], module(query, key, value)[0])


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_evaluation_and_the_fast_path_are_untouched(rule):
    encoder = nn.TransformerEncoder(block(norm_first=False), 2, enable_nested_tensor=True).eval()
    ours = copy.deepcopy(encoder)
    handle = approximate(ours, rule, skip_small=False)
    x, padding = torch.randn(BATCH, LENGTH, WIDTH), torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 5])
    with torch.no_grad():
        assert torch.equal(ours(x, src_key_padding_mask=padding), encoder(x, src_key_padding_mask=padding))
    ours.train(), encoder.train()
    assert torch.equal(ours(x), encoder(x))
    handle.revert()
    assert type(ours.layers[0].self_attn) is nn.MultiheadAttention


def build_decoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True, **options)
    return nn.TransformerDecoder(layer, 2)


def test_a_decoder():
    decoder = build_decoder()
    ours = copy.deepcopy(decoder)
    handle = approximate(ours, RULES["both"], skip_small=False)
    assert sum(row.kind == "MultiheadAttention" and row.status == "converted" for row in handle.rows) == 4
    target, memory = torch.randn(BATCH, LENGTH, WIDTH), torch.randn(BATCH, SOURCE, WIDTH)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    arguments = {"tgt_mask": mask, "tgt_is_causal": True}
    assert torch.equal(ours(target, memory, **arguments), decoder(target, memory, **arguments))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_a_decoder_are_exact_where_all_rows_are_kept(recompute, norm_first, monkeypatch):
    choose_all_rows(monkeypatch)
    decoder = build_decoder(norm_first=norm_first, dtype=torch.float64)
    ours = copy.deepcopy(decoder)
    approximate(ours, Rule(cotangent=RowSample(0.5), recompute=recompute), skip_small=False)
    draw = torch.Generator().manual_seed(1)
    target, memory, cotangent = (
        torch.randn(BATCH, length, WIDTH, dtype=torch.float64, generator=draw) for length in (LENGTH, SOURCE, LENGTH)
    )
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
    found = []
    # The second step of a converted model may hold other things than its first.
    for one in (decoder, ours, ours):
        leaves = leaves_of((target, memory))
        output = one(*leaves, tgt_mask=mask, tgt_is_causal=True)
        found.append(torch.autograd.grad(output, [*leaves, *one.parameters()], cotangent))
    for drawn in found[1:]:
        torch.testing.assert_close(drawn, found[0])


def test_the_output_may_be_overwritten():
    module, inputs = build(batch_first=True, dtype=torch.float64)
    results = []
    for one in (module, converted(module, Rule(stored=StochasticRounding(4)))):
        leaves = leaves_of(inputs)
        output = one(*leaves, need_weights=False)[0]
        output += 1
        output.sum().backward()
        results.append(one.out_proj.bias.grad)
    torch.testing.assert_close(*results)


def test_per_example_gradients(monkeypatch):
    choose_all_rows(monkeypatch)
    module, inputs = build(dtype=torch.float64, batch_first=True)
    ours = converted(module, RULES["rows"])

    def loss(parameters, one, x):
        x = x.unsqueeze(0)
        return functional_call(one, parameters, (x, x, x), {"need_weights": False})[0].square().sum()

    results = []
    for one in (module, ours):
        parameters = {name: parameter.detach() for name, parameter in one.named_parameters()}
        results.append(vmap(grad(lambda p, x, one=one: loss(p, one, x)), (None, 0))(parameters, inputs[0]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(use_reentrant):
    module, inputs = build(batch_first=True)
    ours, results = converted(module, RULES["both"]), []
    # The first pass shows that the input is kept for queries, keys and values, and needs no codes.
    ours(*inputs, need_weights=False)[0].sum().backward()
    for wrapped in (False, True):
        torch.manual_seed(4)
        ours.zero_grad()
        (x, *_) = leaves_of(inputs)

        def run(x):
            return ours(x, x, x, need_weights=False)[0]

        (checkpoint(run, x, use_reentrant=use_reentrant) if wrapped else run(x)).square().sum().backward()
        results.append([x.grad, *(parameter.grad for parameter in ours.parameters())])
    if not use_reentrant:
        torch.testing.assert_close(results[0], results[1])
    assert all(part.isfinite().all() for part in results[1])


@pytest.mark.parametrize("rule", ["codes", "both"])
def test_compiled(rule):
    module, inputs = build(batch_first=True)
    exact = gradients(module, inputs, need_weights=False)
    fine = Rule(stored=StochasticRounding(8), cotangent=RULES[rule].cotangent and RowSample(0.999), recompute=True)
    ours = converted(module, fine)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    drawn = gradients(compiled, inputs, need_weights=False)
    for one, other in zip(drawn, exact, strict=True):
        assert (one - other).norm() < 0.1 * other.norm()


def test_autocast():
    module, inputs = build(batch_first=True)
    ours = converted(module, RULES["both"])
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [one(*leaves_of(inputs), need_weights=False)[0] for one in (module, ours)]
    assert outputs[0].dtype == outputs[1].dtype
    assert torch.equal(*outputs)
    outputs[1].sum().backward()
    assert ours.in_proj_weight.grad.dtype == torch.float32


def test_no_variance_can_be_read_where_no_law_gives_it():
    module, (x, *_) = build()
    for kind, name in ((kind_of(type(module)), "MultiheadAttention"), (kind_of(nn.ReLU), "ReLU")):
        with pytest.raises(RuntimeError, match=rf"variance of RowSample\(keep=0.5\) as cotangent in {name}"):
            kind.predict_variance(module, RowSample(0.5), Moment.COTANGENT, LayerUse(x, x, True), None)


def test_pickled_and_predicted():
    module, inputs = build(batch_first=True)
    ours = copy.deepcopy(module)
    handle = approximate(ours, RULES["rows"], skip_small=False)
    ours = pickle.loads(pickle.dumps(ours))
    assert type(ours).__name__ == "SketchedMultiheadAttention"
    (row, _) = handle.predict(lambda: handle.model(*inputs)[0].sum())
    assert row.weight_variance is None
    handle.model(*inputs)
    assert handle.rows[0].exact_backward_flops == 4 * 4 * BATCH * LENGTH * WIDTH * WIDTH
    assert handle.rows[0].backward_flops < handle.rows[0].exact_backward_flops
