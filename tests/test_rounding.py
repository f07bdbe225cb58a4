"""Is the error bound a bound, for every order of summation, and does it notice what rounding does not explain?"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rgc
from rgc.errors import NotEquivalentError
from rgc.example import Example
from rgc.rounding import Arithmetic, bound_errors
from rgc.testing import randomize

#: The orders in which a layer may sum its products.
ORDERS = ("sequential", "reversed", "shuffled", "pairwise", "largest first")


def _bound(model: nn.Module, *inputs: Tensor, **options: object) -> rgc.ErrorBound:
    found = rgc.error_bound(rgc.compile(randomize(model), inputs, **options))  # type: ignore[arg-type]
    assert found is not None
    return found


def _summed(terms: Tensor, order: str) -> Tensor:
    """Sums along the last axis, rounded after every addition, in one order."""
    count = terms.shape[-1]
    if order == "pairwise":
        while terms.shape[-1] > 1:
            half = terms.shape[-1] // 2
            rest = terms[..., 2 * half :]
            terms = torch.cat([terms[..., :half] + terms[..., half : 2 * half], rest], -1)
        return terms[..., 0]
    indices = {
        "sequential": torch.arange(count).expand_as(terms),
        "reversed": torch.arange(count).flip(0).expand_as(terms),
        "shuffled": torch.randperm(count, generator=torch.Generator().manual_seed(1)).expand_as(terms),
        "largest first": terms.abs().argsort(-1, descending=True),
    }[order]
    terms = terms.gather(-1, indices)
    total = torch.zeros_like(terms[..., 0])
    for index in range(count):
        total = total + terms[..., index]
    return total


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_summation_stays_below_the_bound_of_a_layer(order: str) -> None:
    arithmetic = Arithmetic.of(torch.float32)
    x, W = torch.randn(3, 200) * torch.logspace(-3, 3, 200), torch.randn(7, 200)
    terms = torch.cat([x.unsqueeze(1) * W, torch.randn(7).expand(3, 7).unsqueeze(-1)], -1)
    exact = (x.double().unsqueeze(1) * W.double()).sum(-1) + terms[..., -1].double()
    bound = arithmetic.gamma(201) * ((x.double().abs() @ W.double().abs().T) + terms[..., -1].double().abs())
    assert bool(((_summed(terms, order).double() - exact).abs() <= bound).all())


def _network(inputs: Tensor, weights: list[Tensor], order: str) -> Tensor:
    x = inputs
    for index, W in enumerate(weights):
        x = _summed(x.unsqueeze(1) * W, order)
        x = x if index == len(weights) - 1 else F.gelu(x)
    return x


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_summation_stays_below_the_bound_of_a_network(order: str) -> None:
    model = nn.Sequential(
        nn.Linear(40, 30, bias=False), nn.GELU(), nn.Linear(30, 20, bias=False), nn.GELU(), nn.Linear(20, 5, bias=False)
    )
    x = torch.randn(4, 40)
    compiled = rgc.compile(model.eval(), x)
    found = rgc.error_bound(compiled)
    assert found is not None and found.outputs[0].bound is not None
    exact = model.double()(x.double()).detach()
    weights = [layer.weight.detach().float() for layer in model if isinstance(layer, nn.Linear)]
    measured = (_network(x, weights, order).double() - exact).abs().max() / exact.abs().max()
    assert 0 < float(measured) <= found.outputs[0].bound


def test_integers_are_computed_without_error_and_still_have_a_bound() -> None:
    model = nn.Linear(16, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-8, 9, parameter.shape))
    compiled = rgc.compile(model.eval(), torch.randint(-8, 9, (2, 16)).float())
    found = rgc.error_bound(compiled)
    assert found is not None and found.outputs[0].bound is not None
    assert found.outputs[0].measured == 0 < found.outputs[0].bound < 1e-4


MODELS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)),
    "transposed": lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2)),
    "reflected": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), nn.Hardswish()),
    "norm first": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU6(), nn.MaxPool2d(2), nn.BatchNorm2d(3), nn.SiLU()),
    "averages": lambda: nn.Sequential(nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(2), nn.Tanh(), nn.Flatten()),
    "upsampled": lambda: nn.Sequential(nn.ReLU(), nn.Upsample(scale_factor=1.7, mode="bilinear"), nn.Mish()),
    "norms": lambda: nn.Sequential(nn.GroupNorm(1, 3), nn.ELU(), nn.InstanceNorm2d(3, affine=True), nn.LayerNorm(12)),
    "slopes": lambda: nn.Sequential(nn.PReLU(3), nn.ZeroPad2d(1), nn.LeakyReLU(-0.3), nn.PixelUnshuffle(2)),
    "sigmoids": lambda: nn.Sequential(nn.Sigmoid(), nn.Conv2d(3, 2, 1), nn.Softplus(1, 50), nn.Softsign()),
    "softmax": lambda: nn.Sequential(nn.Conv2d(3, 5, 1), nn.Softmax(1), nn.Conv2d(5, 2, 1)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_measured_lies_below_the_bound(name: str, dtype: torch.dtype) -> None:
    if dtype in (torch.float16, torch.bfloat16) and name == "reflected":
        pytest.skip("PyTorch's CPU kernels have no reflection padding in half precision on every machine")
    found = _bound(MODELS[name]().to(dtype), torch.randn(2, 3, 12, 12).to(dtype))
    (output,) = found.outputs
    assert output.bound is not None, output.reason
    assert 0 <= output.measured <= output.bound < 3e5 * torch.finfo(dtype).eps
    assert found.layers and 0 <= found.share <= 1


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        weights = torch.softmax(q @ k.transpose(-2, -1) / 8**0.5, dim=-1)
        return x + self.out((y + weights @ v).transpose(1, 2).flatten(2))


def test_attention_has_a_bound() -> None:
    (output,) = _bound(_Attention(), torch.randn(2, 7, 16)).outputs
    assert output.bound is not None and output.measured <= output.bound < 1e-2


class _Sort(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x)
        return torch.cumsum(y, -1) * 2, y


def test_what_has_no_rule_ends_the_bound_by_name_and_of_that_output_only() -> None:
    without, with_bound = _bound(_Sort(), torch.randn(2, 8)).outputs
    assert without.bound is None and without.reason == "no bound beyond cumsum at cumsum: it has no rule"
    assert with_bound.bound is not None and with_bound.measured <= with_bound.bound


class _Chosen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.gather(1, x.argmax(1, keepdim=True))


def test_a_choice_by_rounded_numbers_has_no_bound() -> None:
    (output,) = _bound(nn.Sequential(nn.Linear(4, 4), _Chosen()), torch.randn(3, 4)).outputs
    assert output.bound is None and "compares or counts what is rounded" in output.reason


class _Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(-torch.rand(1, 1, 6))
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1))


def test_constants_beside_values_keep_their_bounds_positive() -> None:
    (output,) = _bound(_Concatenated(), torch.randn(2, 3, 6)).outputs
    assert output.bound is not None and 0 < output.measured <= output.bound


@pytest.mark.parametrize("factor", [1.01, 1.0003])
def test_weights_that_changed_after_the_proof_are_found(factor: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    compiled = rgc.compile(randomize(model), torch.randn(1, 3, 8, 8))
    with torch.no_grad():
        next(compiled.parameters()).mul_(factor)
    with pytest.raises(NotEquivalentError, match="output 0 is off by .* more than rounding explains"):
        rgc.error_bound(compiled)


def test_a_kernel_that_does_not_sum_the_products_is_found_by_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = rgc.compile(randomize(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3))), torch.randn(1, 3, 8, 8))
    convolve = F.conv2d

    def cut(x: Tensor, *args: object, **options: object) -> Tensor:
        return convolve(x.bfloat16().to(x.dtype) if x.dtype == torch.float32 else x, *args, **options)  # type: ignore[arg-type]

    from rgc import algebra

    monkeypatch.setitem(algebra._CONVOLUTIONS, 2, (cut, F.conv_transpose2d))
    with pytest.raises(NotEquivalentError, match=r"1 is off by .* \(Winograd"):
        rgc.error_bound(compiled)


def test_a_bound_is_computed_with_full_verification_and_part_of_the_report() -> None:
    model = randomize(nn.Sequential(nn.Linear(8, 4), nn.ReLU()))
    assert rgc.compile(model, torch.randn(1, 8)).report.bound is None
    report = rgc.compile(model, torch.randn(1, 8), verify="full").report
    assert report.bound is not None and '"bound": {\n    "outputs"' in report.to_json()


def test_a_model_that_does_not_run_in_float64_has_no_bound() -> None:
    class InFloat32(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                raise RuntimeError("float32 only")
            return x * 2

    assert rgc.error_bound(rgc.compile(InFloat32().eval(), torch.randn(2, 3))) is None


def test_values_beyond_the_range_of_the_dtype_have_no_bound() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Sigmoid()).half()
    with torch.no_grad():
        next(model.parameters()).fill_(60000.0)
    (output,) = bound_errors_of(model, torch.full((1, 4), 0.2728))
    assert output.bound is None and "cannot be shown to stay in the range of float16" in output.reason


def bound_errors_of(model: nn.Module, x: Tensor) -> tuple[rgc.OutputBound, ...]:
    """Of a model as it is."""
    module = torch.fx.symbolic_trace(model.eval())
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        expected = model.double()(x.to(dtype).double())
    module.to(dtype)
    return bound_errors(module, Example((x.to(dtype),)), expected, 0.0).outputs


def test_gamma_grows_with_the_terms_and_ends() -> None:
    single, half = Arithmetic.of(torch.float32), Arithmetic.of(torch.float16)
    gammas = [single.gamma(n) for n in (1, 10, 1000)]
    assert gammas == sorted(gammas) and gammas[0] >= 2.0**-24
    assert single.gamma(2.0**24) == math.inf
    assert 2.0**-11 < half.gamma(100) < 2.0**-11 + 2.0**-16  # sums in float32, stored once
    assert all(single.gamma(n, stored=1) > single.gamma(n) for n in (0, 5))
