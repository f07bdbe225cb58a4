"""Is a recipe the model that its source says, the same every time, and made smaller without losing its failure?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from rgc.recipe import Recipe, Step, reduced, script

RECIPE = Recipe(
    inputs=(("x0", (2, 3, 5, 4)), ("x1", (2, 3, 5, 4))),
    layers=(("m0", "nn.Conv2d(3, 3, 1)"), ("m1", "nn.Conv2d(3, 3, 1)"), ("m2", "nn.BatchNorm2d(3)")),
    ties=(("m1", "m0"),),
    steps=(
        Step("{y0} = {m}({0})", ("x0",), ("v0",), "m0"),
        Step("{y0}, {y1} = {0}.split([1, 2], 1)", ("v0",), ("v1", "v2")),
        Step("{y0} = {m}({0})", ("v0",), ("v3",), "m1"),
        Step("{y0} = {0}\n{y0} += {1}", ("v3", "x1"), ("v4",)),
        Step("{y0} = {m}({0})", ("v4",), ("v5",), "m2"),
    ),
    returned=("v5", "v2"),
    structure="{{'a': {0}, 'b': {1}}}",
    seed=3,
)


def test_the_source_is_a_plain_module() -> None:
    assert RECIPE.source.splitlines() == [
        "class Model(nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
        "        self.m0 = nn.Conv2d(3, 3, 1)",
        "        self.m1 = nn.Conv2d(3, 3, 1)",
        "        self.m2 = nn.BatchNorm2d(3)",
        "        self.m1.weight = self.m0.weight",
        "",
        "    def forward(self, x0, x1):",
        "        v0 = self.m0(x0)",
        "        v1, v2 = v0.split([1, 2], 1)",
        "        v3 = self.m1(v0)",
        "        v4 = v3",
        "        v4 += x1",
        "        v5 = self.m2(v4)",
        "        return {'a': v5, 'b': v2}",
    ]


def test_a_named_tuple_is_defined_before_the_model_and_a_layer_has_two_names() -> None:
    layers = (*RECIPE.layers, ("m3", "self.m2"), ("m4", "self.m3"))
    last = Step("{y0} = {m}({0})", ("v5",), ("v6",), "m4")
    recipe = replace(
        RECIPE, layers=layers, steps=(*RECIPE.steps, last), returned=("v6", "x0"), structure="Pair({0}, {1})"
    )
    assert recipe.source.startswith("Pair = namedtuple('Pair', ['first', 'second'])\n\nclass Model")
    model = recipe.model()
    output = model(*recipe.call())
    assert output._fields == ("first", "second") and torch.equal(output.second, recipe.call()[0])
    assert model.get_submodule("m4") is model.get_submodule("m2")
    pruned = replace(
        recipe, steps=(replace(last, inputs=("x0",)),), returned=("v6",), structure="{0}", ties=()
    ).pruned()
    assert [name for name, _ in pruned.layers] == ["m2", "m3", "m4"]
    pruned.model()(*pruned.call())


def test_the_model_is_the_same_every_time_has_random_statistics_and_tied_weights() -> None:
    state = torch.random.get_rng_state()
    first, second = RECIPE.model(), RECIPE.model(torch.float64)
    assert torch.equal(state, torch.random.get_rng_state()) and not first.training
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor.double(), second.state_dict()[name].double()), name
    norm = first.get_submodule("m2")
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and bool(norm.running_mean.any())
    assert first.get_parameter("m0.weight") is first.get_parameter("m1.weight")


def test_a_call_has_the_batch_and_the_size_that_are_asked_for() -> None:
    assert [x.shape for x in RECIPE.call()] == [(2, 3, 5, 4)] * 2
    assert [(*x.shape,) for x in RECIPE.call(torch.float64, batch=1, wider=2)] == [(1, 3, 7, 6)] * 2
    assert torch.equal(RECIPE.call()[0], RECIPE.call()[0])


@pytest.mark.parametrize(("code", "overwrites"), [
    ("{y0} = {0} + 1", False), ("{y0} = F.relu({0})", False), ("{y0} = {0}\n{y0} += 1", True),
    ("{y0} = F.relu({0}, inplace=True)", True), ("{y0} = {0}.mul_(2)", True), ("{y0} = {0}\n{y0}[:, :1] = 0", True),
])  # fmt: skip
def test_it_says_whether_a_value_is_overwritten(code: str, overwrites: bool) -> None:
    assert replace(RECIPE, steps=(Step(code, ("x0",), ("v0",)),), returned=("v0",), structure="{0}").overwrites == (
        overwrites
    )


def test_pruning_leaves_what_the_returned_values_need() -> None:
    pruned = replace(RECIPE, returned=("v1",), structure="{0}").pruned()
    assert [step.results for step in pruned.steps] == [("v0",), ("v1", "v2")]
    assert [name for name, _ in pruned.inputs] == ["x0"]
    pruned.model()(*pruned.call())


def test_reducing_leaves_out_all_that_the_failure_does_not_need() -> None:
    smallest = reduced(RECIPE, lambda recipe: any(step.layer == "m2" for step in recipe.pruned().steps))
    assert [step.layer for step in smallest.steps] == ["m2"] and len(smallest.inputs) == 1
    assert smallest.structure == "{0}" and not smallest.source.count("Conv2d")
    assert reduced(RECIPE, lambda _: False) == RECIPE
    assert reduced(RECIPE, lambda _: True, attempts=0) == RECIPE


@pytest.mark.parametrize("by_name", [False, True])
def test_the_script_runs_and_fails_as_long_as_the_results_differ(
    by_name: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"passes": "default", "objective": "depth", "strict": True}
    program = script(RECIPE, options, torch.float64, "a\nreason", by_name=by_name)
    assert program.startswith("# a\n# reason\nfrom collections import OrderedDict, namedtuple\n")
    exec(compile(program, "<script>", "exec"), {})
    assert capsys.readouterr().out.startswith("torch.fx ")
    weights = "[p for p in compiled.parameters() if p.dim() > 1]"
    spoiled = program.replace("assert not", f"torch._foreach_mul_({weights}, 2)\nassert not", 1)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"), torch.no_grad():
        exec(compile(spoiled, "<script>", "exec"), {})
