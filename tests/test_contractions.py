"""Is each product with a constant lifted to the linear operator that it is, and to nothing where it is none?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rgc
from rgc.algebra import Conv, Scale
from rgc.compiler import trace
from rgc.example import output_difference
from rgc.ir import Value
from rgc.operators import Opaque, Structural
from rgc.testing import randomize

Body = Callable[[Any, Tensor], Tensor]


class Product(nn.Module):
    """A layer, a product with parameters of all shapes, and a function that ends what is linear."""

    def __init__(self, first: nn.Module, body: Body) -> None:
        super().__init__()
        self.first, self.body = first, body
        self.wide, self.tall = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 4))
        self.six, self.four = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(4))
        self.heads = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.body(self, self.first(x)))


TOKENS, IMAGES, VECTORS, SEQUENCES = (2, 5, 6), (2, 6, 7, 8), (3, 6), (2, 6, 9)


def layer_for(shape: tuple[int, ...]) -> nn.Module:
    kinds: dict[Any, Callable[[], nn.Module]] = {
        IMAGES: lambda: nn.Conv2d(6, 6, 1), SEQUENCES: lambda: nn.Conv1d(6, 6, 1),
    }  # fmt: skip
    return kinds.get(shape, lambda: nn.Linear(6, 6))()


def compiled_equal(body: Body, shape: tuple[int, ...]) -> rgc.Report:
    torch.manual_seed(0)
    model = randomize(Product(layer_for(shape), body))
    compiled = rgc.compile(model, torch.randn(shape), objective="depth")
    for batch in (1, shape[0], 4):
        x = torch.randn(batch, *shape[1:])
        with torch.no_grad():
            assert output_difference(model(x), compiled(x)) < 1e-5
    return compiled.report


def last_operators(body: Body, shape: tuple[int, ...]) -> list[Any]:
    """The operators between the first layer and the sigmoid."""
    found = [value.op for value in trace(randomize(Product(layer_for(shape), body)), torch.randn(shape)).graph.nodes()]
    return found[2:-1]


@pytest.mark.parametrize(("body", "shape"), [
    (lambda m, x: x @ m.tall, TOKENS),
    (lambda m, x: torch.matmul(x, m.tall) + m.four, TOKENS),
    (lambda m, x: x.matmul(m.tall[None]), TOKENS),
    (lambda m, x: torch.mm(x, m.tall), VECTORS),
    (lambda m, x: x.mm(m.tall), VECTORS),
    (lambda m, x: torch.addmm(m.four, x, m.tall, beta=2, alpha=-3), VECTORS),
    (lambda m, x: torch.addmm(m.four[None], x, m.tall), VECTORS),
    (lambda m, x: torch.addmm(x, x, m.tall @ m.wide, beta=0.5, alpha=2), VECTORS),
    (lambda m, x: torch.addmm(m.four, x, m.tall, beta=0), VECTORS),
    (lambda m, x: torch.bmm(x, m.tall.expand(x.shape[0], -1, -1)), TOKENS),
    (lambda m, x: torch.bmm(x, m.tall.unsqueeze(0).expand(x.size(0), 6, 4)), TOKENS),
    (lambda m, x: torch.baddbmm(m.four, x, m.tall.expand(x.shape[0], -1, -1), alpha=2), TOKENS),
    (lambda m, x: torch.inner(x, m.wide), TOKENS),
    (lambda m, x: (m.wide @ x.t()).t(), VECTORS),
    (lambda m, x: torch.mm(m.wide, x.T).transpose(0, 1), VECTORS),
    (lambda m, x: torch.matmul(m.wide, x.permute(1, 0)).t(), VECTORS),
    (lambda m, x: torch.tensordot(x, m.tall, dims=1), TOKENS),
    (lambda m, x: torch.tensordot(x, m.wide, dims=([2], [1])), TOKENS),
    (lambda m, x: torch.einsum("bnc,dc->bnd", x, m.wide), TOKENS),
    (lambda m, x: torch.einsum("cd, b n c -> b n d", m.tall, x), TOKENS),
    (lambda m, x: torch.einsum("...c,cd->...d", x, m.tall), TOKENS),
    (lambda m, x: torch.einsum("bnc,cd", x, m.tall), (2, 5, 6)),
    (lambda m, x: torch.einsum("...c,dc", [x, m.wide]), TOKENS),
    (lambda m, x: torch.einsum("bnc,c->bnc", x, m.six), TOKENS),
])  # fmt: skip
def test_a_product_that_contracts_the_last_axis_is_a_linear_layer(body: Body, shape: tuple[int, ...]) -> None:
    report = compiled_equal(body, shape)
    assert set(report.ops_after) - {"permute"} == {"Linear", "Sigmoid"}
    assert report.ops_after["Linear"] == 1 and report.tier == "torch.fx"


@pytest.mark.parametrize(("body", "shape"), [
    (lambda m, x: torch.einsum("nchw,oc->nohw", x, m.wide), IMAGES),
    (lambda m, x: torch.einsum("bchw,c->bchw", x, m.six), IMAGES),
    (lambda m, x: torch.einsum("bc...,co->bo...", x, m.tall), IMAGES),
    (lambda m, x: torch.einsum("bcl,oc->bol", x, m.wide), SEQUENCES),
    (lambda m, x: m.wide @ x, SEQUENCES),
    (lambda m, x: torch.matmul(m.wide[None], x), SEQUENCES),
    (lambda m, x: torch.bmm(m.wide.expand(x.shape[0], -1, -1), x), SEQUENCES),
])  # fmt: skip
def test_a_product_that_contracts_the_channels_is_a_convolution(body: Body, shape: tuple[int, ...]) -> None:
    report = compiled_equal(body, shape)
    assert report.ops_after == {f"Conv{len(shape) - 2}d": 1, "Sigmoid": 1} and report.tier == "torch.fx"


@pytest.mark.parametrize(("body", "shape", "kinds"), [
    (lambda m, x: m.wide @ x.t(), VECTORS, [Conv, Structural]),
    (lambda m, x: x @ m.six, TOKENS, [Conv, Structural]),
    (lambda m, x: torch.einsum("bnc,cd->bdn", x, m.tall), TOKENS, [Conv, Structural]),
    (lambda m, x: torch.einsum("bnc,c->bn", x, m.six), TOKENS, [Conv, Structural]),
    (lambda m, x: torch.einsum("bchw,c->bhw", x, m.six), IMAGES, [Conv, Structural]),
    (lambda m, x: torch.einsum("bchw,c->bhwc", x, m.six), IMAGES, [Scale, Structural]),
    (lambda m, x: torch.tensordot(x, m.wide, dims=([1], [1])), IMAGES, [Conv, Structural]),
    (lambda m, x: torch.tensordot(m.wide, x, dims=([1], [1])), SEQUENCES, [Conv, Structural]),
])  # fmt: skip
def test_what_a_product_arranges_differently_is_permuted_behind_it(body: Body, shape: Any, kinds: list[type]) -> None:
    assert [type(op) for op in last_operators(body, shape)] == kinds
    compiled_equal(body, shape)


@pytest.mark.parametrize(("body", "shape"), [
    (lambda m, x: torch.einsum("bnc,bmc->bnm", x, x), TOKENS),  # two values
    (lambda m, x: torch.einsum("bnc,hcd->bhnd", x, m.heads), TOKENS),  # a constant with two new axes
    (lambda m, x: torch.einsum("bnc,c,c->bnc", x, m.six, m.six), TOKENS),
    (lambda m, x: torch.einsum("bnc,dc->bd", x, m.wide), TOKENS),  # sums over the tokens too
    (lambda m, x: torch.einsum("bnc,dc->bncd", x, m.wide), TOKENS),  # an outer product
    (lambda m, x: torch.einsum("bnc,ec->bnc", x, m.wide), TOKENS),
    (lambda m, x: torch.einsum("bncc,dc->bnd", x[..., None].expand(-1, -1, -1, 6), m.wide), TOKENS),  # a diagonal
    (lambda m, x: torch.einsum("bnhc,dh->bndc", x.reshape(-1, 7, 6, 8), m.wide), IMAGES),  # two axes before channels
    (lambda m, x: m.wide @ x, (*IMAGES[:1], 3, 6, 6)),  # two axes before the channels
    (lambda m, x: x[:, None] @ m.heads, TOKENS),  # another matrix for each head
    (lambda m, x: torch.inner(x, m.heads.transpose(1, 2)), TOKENS),
    (lambda m, x: torch.einsum("bc,db->dc", x, m.wide[:, :3]), VECTORS),
    (lambda m, x: torch.tensordot(x, m.heads, dims=2), (2, 3, 6)),
    (lambda m, x: torch.tensordot(x, m.heads.transpose(0, 1), dims=1), TOKENS),
])  # fmt: skip
def test_other_products_are_kept_as_they_are(body: Body, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear = nn.Identity() if shape == IMAGES else nn.Linear(6, 6)
    model = randomize(Product(linear, body))
    x = torch.randn(shape)
    lifted = [value.op for value in trace(model, x).graph.nodes()]
    products = {"einsum", "matmul", "inner", "tensordot"}
    expected = [op for op in lifted if isinstance(op, Opaque) and op.label.split(".")[0] in products]
    assert len(expected) == 1
    compiled = rgc.compile(model, x)
    assert output_difference(model(x).detach(), compiled(x)) < 1e-5


def test_a_constant_expanded_to_a_length_that_is_no_batch_is_kept() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.bmm(torch.relu(x), self.weight.expand(torch.relu(y).shape[1], -1, -1))

    graph = trace(Other().eval(), (torch.randn(2, 5, 6), torch.randn(3, 2))).graph
    assert isinstance(graph.outputs.op, Opaque)


def test_a_constant_batch_that_is_not_the_same_for_each_sample_is_kept() -> None:
    weight = torch.randn(2, 6, 4, dtype=torch.float64)
    body = lambda m, x: torch.bmm(x, weight)  # noqa: E731
    assert [type(op) for op in last_operators(body, TOKENS)] == [Opaque]
    weight[1] = weight[0]
    assert [type(op) for op in last_operators(body, TOKENS)] == [Conv]


@settings(deadline=None)
@given(data=st.data())
def test_every_lifted_einsum_equals_torchs_own(data: st.DataObject) -> None:
    rank = data.draw(st.integers(2, 5), "rank")
    axes = list("nabcd"[:rank])
    sizes = dict(zip("nabcdo", data.draw(st.permutations([2, 3, 4, 5, 6, 7])), strict=True))
    channel = data.draw(st.sampled_from(axes))
    labels = data.draw(st.permutations(data.draw(st.sampled_from([[channel], [channel, "o"]]))))
    kept = data.draw(st.booleans())
    result = [a for a in axes if a != channel or kept] + [label for label in labels if label == "o"]
    if data.draw(st.booleans(), "in place of the channel") and "o" in labels and not kept:
        result = ["o" if a == channel else a for a in axes]
    else:
        result = data.draw(st.permutations(result))
    constant = torch.randn([sizes[label] for label in labels], dtype=torch.float64)
    example = torch.randn([sizes[a] for a in axes], dtype=torch.float64)
    equation = f"{''.join(axes)},{''.join(labels)}->{''.join(result)}"

    class Einsum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum(equation, torch.relu(x), constant)

    graph = trace(Einsum().eval(), example).graph
    found, expected = graph.evaluate({"x": example}), torch.einsum(equation, example.relu(), constant)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    output: Value = graph.outputs
    in_place = [a if a != channel else "o" for a in axes]
    is_map = not kept and "o" in labels and result == in_place and (channel == axes[-1] or channel == axes[1])
    if is_map and channel != axes[0] and rank - 1 - axes.index(channel) <= 3:
        assert isinstance(output.op, Conv)


def test_a_constant_of_length_one_broadcasts_at_other_sizes_and_is_no_layer() -> None:
    class Einsum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.w = nn.AvgPool1d(3), nn.Parameter(torch.randn(1, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("nkl,lo->nko", self.pool(x), self.w)

    model = Einsum().eval()
    compiled = rgc.compile(model, torch.randn(2, 3, 5))
    for length in (5, 6, 9):
        x = torch.randn(2, 3, length)
        torch.testing.assert_close(compiled(x), model(x))
