"""Does a decision hold for other weights of the same form, and does every other checkpoint say what was not decided?"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rgc
from rgc import Activation, Clamp, Conv, engine, planner
from rgc.decisions import Decisions, Question, describe, form_of
from rgc.graphs import draw_recipe
from rgc.ir import Input, TensorType, Value
from rgc.recipe_steps import Chooser
from rgc.testing import randomize

X = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(0))


def source(channels: int = 4) -> Value:
    return Value(Input("x"), (), TensorType((2, channels, 8, 8), torch.float32), name="x")


def conv(seed: int = 0, **options: Any) -> Conv:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 4, 3, 3, generator=generator, dtype=torch.float64)
    return Conv(weight, torch.randn(4, generator=generator, dtype=torch.float64), **options)


def test_a_form_holds_no_numbers_of_weights_and_all_that_costs_depend_on() -> None:
    x = source()
    same = form_of([conv(0)(x)])
    assert same == form_of([conv(1)(source())])
    others = [
        form_of([conv(0, stride=2)(x)]),
        form_of([conv(0, padding=1)(x)]),
        form_of([conv(0, padding=1, pad_value=torch.ones(4))(x)]),
        form_of([conv(0, padding=1, pad_value=torch.arange(4.0))(x)]),  # another constant in each channel
        form_of([conv(0)(x)], [conv(0)(x)]),
        form_of([conv(0)(x)], more=["banned"]),
        form_of([Conv(conv().weight)(x)]),
    ]
    assert len({same, *others}) == len(others) + 1
    assert describe(Activation("leaky_relu", (("negative_slope", 0.1),))) == describe(
        Activation("leaky_relu", (("negative_slope", 0.2),))
    )
    no, one = torch.full((4,), -torch.inf), torch.ones(4)
    assert describe(Clamp(no, one, 2)) != describe(Clamp(-one, one, 2)), "a side without bounds costs nothing"


def test_a_form_tells_how_values_are_connected() -> None:
    x = source()
    relu, tanh = Activation("relu"), Activation("tanh")
    first, second = relu(x), tanh(x)
    assert form_of([first, second]) != form_of([first, tanh(first)])


def test_closed_decisions_weigh_nothing_and_note_what_they_do_not_know() -> None:
    known, unknown = Question("fold", "conv", "a"), Question("fold", "conv", "b")
    made = Decisions()
    assert made.answer(known, lambda: "costs more") == "costs more"
    closed = made.closed()
    assert closed.answer(known, lambda: pytest.fail("weighed")) == "costs more" and closed.undecided == []
    assert closed.answer(unknown, lambda: pytest.fail("weighed")) is None and closed.undecided == [unknown]
    assert made.undecided == [] and unknown not in made.answers


# --- plans ---------------------------------------------------------------------------------------------------------


@contextmanager
def no_search(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, a cost that is asked for is a failure."""

    def searched(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a plan weighs nothing")

    with monkeypatch.context() as patch:
        for name in ("cost", "require_gain", "parts_that_pay"):
            patch.setattr(engine, name, searched)
        patch.setattr(planner.Planner, "_cut", searched)
        yield


def redrawn(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Other weights with zeros where there were zeros; constants of the model (frozen) stay."""
    generator = torch.Generator().manual_seed(seed)
    slopes = {id(module.weight) for module in model.modules() if isinstance(module, nn.PReLU)}  # 1 means something
    named = model.named_parameters(remove_duplicate=False)
    trained = {name for name, each in named if each.requires_grad and id(each) not in slopes}
    drawn: dict[int, Tensor] = {}  # tied weights stay tied

    def draw(name: str, tensor: Tensor) -> Tensor:
        if name not in trained and not name.endswith(("running_mean", "running_var")):
            return tensor
        factor = 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        return drawn.setdefault(tensor.data_ptr(), (tensor * factor).to(tensor.dtype))

    return {name: draw(name, tensor) for name, tensor in model.state_dict().items()}


def assert_same(applied: rgc.CompiledModule, afresh: rgc.CompiledModule) -> None:
    """The same code on the same bits."""
    assert applied.code == afresh.code
    ours, theirs = applied.state_dict(), afresh.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("seed", range(12))
def test_a_plan_applied_is_compiling_afresh_bit_for_bit_without_any_search(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    recipe = draw_recipe(Chooser(draw.randint), most_steps=8)
    dtype = draw.choice([torch.float32, torch.float64])
    model, example = recipe.model(dtype).eval(), recipe.call(dtype)
    options: dict[str, Any] = {
        "passes": draw.choice(["default", "all", "default,single_path"]),
        "objective": draw.choice(["latency", "depth", "macs", "params"]),
    }
    plan = rgc.compile(model, example, **options).plan
    other = redrawn(model, seed)
    with no_search(monkeypatch):
        applied = plan.apply(other)
    model.load_state_dict(other)
    assert_same(applied, rgc.compile(model, example, **options))
    with no_search(monkeypatch):
        assert_same(applied.plan.apply(other), applied)


class Regions(nn.Module):
    """A chain with a plan, branches, and a linear tail."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = nn.Sequential(*(nn.Conv2d(4, 4, size, bias=size == 1) for size in (1, 3, 1, 1, 3)))
        self.norm, self.left, self.right = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.tail = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.chain(x)))
        z = torch.relu(self.left(y) + self.right(y) + y)
        return self.tail(z)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("passes", "objective"), [("default", "latency"), ("all", "latency"), ("all", "depth"), ("default", "params")]
)
def test_chains_branches_and_regions_are_cut_as_decided(
    passes: str, objective: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomize(Regions())
    plan = rgc.compile(model, X, passes=passes, objective=objective).plan
    other = redrawn(model, 1)
    with no_search(monkeypatch):
        applied = plan.apply(other)
    model.load_state_dict(other)
    assert_same(applied, rgc.compile(model, X, passes=passes, objective=objective))


def test_a_bias_that_became_zero_is_reported_where_it_allows_more_than_the_plan() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 4, 3, padding=1, groups=4)).eval()
    state = model.state_dict()
    state["0.weight"][3] = 0  # so that no constant behind the first layer's input gives what the second one pads with
    options: dict[str, Any] = {"passes": ["merge_pointwise"], "objective": "macs"}
    plan = rgc.compile(model, X, **options).plan
    assert plan.firings == ()
    without_bias = {**state, "0.bias": torch.zeros(4)}
    with pytest.raises(rgc.NotEquivalentError, match="merge_pointwise at 1: this checkpoint allows what the plan has"):
        plan.apply(without_bias)
    model.load_state_dict(without_bias)
    assert rgc.compile(model, X, **options).plan.firings == (("merge_pointwise", "1"),)


def test_a_slope_that_became_1_is_reported_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.PReLU(init=0.5), nn.Conv2d(4, 4, 1)).eval()
    plan = rgc.compile(model, X).plan
    with pytest.raises(rgc.NotEquivalentError, match="remove_linear_activation at 1: this checkpoint allows"):
        plan.apply({**model.state_dict(), "1.weight": torch.ones(1)})


def test_a_lambda_below_1_takes_its_rewrite_away_by_name() -> None:
    class Decayed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.decay = nn.Parameter(torch.tensor(1.0), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.second(self.decay * y + (1 - self.decay) * torch.relu(y))  # type: ignore[no-any-return]

    model = randomize(Decayed())
    plan = rgc.compile(model, X).plan
    assert plan.firings
    with pytest.raises(rgc.NotEquivalentError, match="does not hold for this checkpoint|has not decided"):
        plan.apply({**model.state_dict(), "decay": torch.tensor(0.9)})


def test_a_model_compiled_part_by_part_keeps_the_decisions_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.part(x)
            return y * 2 if float(y.detach().sum()) > 0 else y

    model = randomize(Untraceable())
    compiled = rgc.compile(model, X)
    assert compiled.report.tier == "submodules" and ("fold_batchnorm", "part.1") in compiled.plan.firings
    other = redrawn(model, 3)
    with no_search(monkeypatch):
        applied = compiled.plan.apply(other)
    model.load_state_dict(other)
    afresh = rgc.compile(model, X)
    assert all(
        torch.equal(a, b) for a, b in zip(applied.state_dict().values(), afresh.state_dict().values(), strict=True)
    )
    torch.testing.assert_close(applied(X), model(X))


def test_a_plan_weighs_no_graph_pass_and_says_when_other_channels_are_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    def pruned(dead: tuple[int, ...], seed: int) -> nn.Module:
        torch.manual_seed(seed)
        norm = nn.BatchNorm2d(8)
        model = randomize(nn.Sequential(nn.Conv2d(4, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 4, 3)), seed)
        with torch.no_grad():
            norm.weight[list(dead)] = 0
        return model

    plan, other = rgc.compile(pruned((1, 4), 0), X).plan, pruned((1, 4), 1)
    with no_search(monkeypatch):
        applied = plan.apply(other.state_dict())
    assert_same(applied, rgc.compile(other, X))
    assert [m.out_channels for m in applied.modules() if isinstance(m, nn.Conv2d)] == [6, 4]
    with pytest.raises(rgc.NotEquivalentError, match="drop_dead_channels"):
        plan.apply(pruned((1,), 2).state_dict())
