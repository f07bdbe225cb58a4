"""Is what comes out a module like the user's own: names, layers, dtypes, memory formats, copies and files?"""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rgc
from rgc.emit import emit, narrow, operator_counts
from rgc.example import Example
from rgc.export_tier import trace_by_export
from rgc.ir import Graph, Input, TensorType, Value
from rgc.lift import lift
from rgc.operators import Activation, Identity

X = torch.randn(2, 4, 9, 8)


def randomised(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.conv1(x))) + x  # type: ignore[no-any-return]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer1(x)  # type: ignore[no-any-return]


def test_the_users_names_are_kept() -> None:
    compiled = rgc.compile(randomised(Network()), X)
    assert {name for name, module in compiled.named_modules() if not list(module.children())} == {
        "layer1.0.conv1", "layer1.0.relu", "layer1.1.conv1", "layer1.1.relu"
    }  # fmt: skip


@pytest.mark.parametrize("name", [
    "class", "lambda", "None", "3x3", "a-b", "with space", "été", "print", "torch", "input", "_call", "graph", "code",
    "report", "plan", "example", "recompile", "forward_", "x",
])  # fmt: skip
def test_any_name_of_a_layer_can_be_emitted(name: str) -> None:
    model = nn.Sequential(OrderedDict([(name, nn.Conv2d(4, 4, 3)), ("then", nn.Sigmoid())])).eval()
    holder = nn.ModuleDict({name: model}) if name != "forward_" else nn.ModuleDict({"a": model})

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = holder

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts.values():
                x = part(x)
            return x

    for each in (model, Holder().eval()):
        compiled = rgc.compile(each, X)
        torch.testing.assert_close(compiled(X), each(X))
        assert any(name in key for key in compiled.state_dict())


def test_layers_are_ordinary_frozen_and_contiguous() -> None:
    compiled = rgc.compile(randomised(Network()), X)
    assert not compiled.training and not any(module.training for module in compiled.modules())
    assert not any(parameter.requires_grad for parameter in compiled.parameters())
    assert all(parameter.is_contiguous() for parameter in compiled.parameters())
    assert type(compiled.get_submodule("layer1.0.conv1")) is nn.Conv2d


def test_a_channels_last_model_stays_channels_last() -> None:
    model = randomised(Network()).to(memory_format=torch.channels_last)
    x = X.to(memory_format=torch.channels_last)
    compiled = rgc.compile(model, x)
    weight = compiled.get_submodule("layer1.0.conv1").weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert compiled(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_an_inplace_activation_is_emitted_only_where_nobody_else_reads_its_input() -> None:
    def inplace(forward: Callable[[Any, Tensor], Tensor]) -> list[bool]:
        class Model(Block):
            pass

        Model.forward = forward  # type: ignore[method-assign]
        compiled = rgc.compile(randomised(Model()), X)
        return [module.inplace for module in compiled.modules() if isinstance(module, nn.ReLU)]

    assert inplace(lambda m, x: m.relu(m.conv1(x))) == [True]
    assert inplace(lambda m, x: m.relu(x * 1)) == [False]  # the tensor of the caller
    assert inplace(lambda m, x: m.conv1(m.relu(x.transpose(2, 3)))) == [False]

    def shared() -> Graph:
        x = Value(Input("x"), (), TensorType((2, 4), torch.float32))
        y = Activation("sigmoid")(x)
        overwriting = Activation("relu", inplace=True)
        return Graph([x], [overwriting(y), overwriting(overwriting(Identity()(y)))])

    module = emit(shared(), None)
    x = torch.randn(2, 4)
    for found in module(x):
        assert torch.equal(found, x.sigmoid())


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    f"{kind} in {rank} dimensions": (make, (2, 4, *(7, 6, 5)[:rank]))
    for rank in (1, 2, 3)
    for kind, make in {
        "convolution": lambda rank=rank: nn.Sequential(
            getattr(nn, f"Conv{rank}d")(4, 6, 3, 2, 1, 2, groups=2), getattr(nn, f"BatchNorm{rank}d")(6)
        ),
        "transposed convolution": lambda rank=rank: nn.Sequential(
            getattr(nn, f"ConvTranspose{rank}d")(4, 6, 3, 2, 1, 1, 2), getattr(nn, f"BatchNorm{rank}d")(6)
        ),
    }.items()
}
LAYERS |= {
    f"{mode} padding of kernel {kernel}": (
        lambda mode=mode, kernel=kernel: nn.Sequential(
            nn.Conv2d(4, 4, kernel, padding="same", padding_mode=mode), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 4, (2, 3), padding=(1, 2), padding_mode=mode, groups=2),
        ),
        (2, 4, 9, 8),
    )
    for mode in ("zeros", "reflect", "replicate", "circular")
    for kernel in (2, 3, 4)
}  # fmt: skip


LAYERS |= {
    str(layer): (lambda layer=layer: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), layer), (2, 4, 12, 11))
    for layer in (
        nn.MaxPool2d((3, 2), (1, 2), (1, 0), (2, 1), ceil_mode=True),
        nn.MaxPool2d(2),
        nn.AdaptiveMaxPool2d((3, None)),
        nn.AdaptiveMaxPool2d(2),
        nn.Upsample(scale_factor=(1.5, 2), mode="bilinear", align_corners=True),
        nn.Upsample(scale_factor=1.3, mode="bilinear", recompute_scale_factor=True),
        nn.Upsample(size=(3, 5), mode="nearest-exact"),
        nn.UpsamplingNearest2d(scale_factor=2),
        nn.UpsamplingBilinear2d(size=7),
    )
}


def test_a_pooling_is_written_as_people_write_it() -> None:
    layers = (nn.MaxPool2d(2), nn.MaxPool2d((3, 2), 1), nn.AvgPool2d(3, 2, 1), nn.Upsample(scale_factor=2.0))
    compiled = rgc.compile(nn.Sequential(*layers).eval(), X)
    assert [repr(compiled.get_submodule(str(index))) for index in range(4)] == [repr(layer) for layer in layers]


def test_views_and_sizes_of_an_exported_program_do_not_count() -> None:
    """They come under the names of ATen."""

    class Heads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            batch, channels, height, width = x.shape
            y = torch.relu(x).reshape(batch, 2, channels // 2, height * width).transpose(1, 2)
            return torch.sigmoid(y.reshape(batch, channels, height, width))

    example = Example((X.double(),))
    source, _ = trace_by_export(Heads().eval().double(), example)
    counted = operator_counts(lift(source, torch.float32, fixed=False))
    assert counted == {"ReLU": 1, "transpose": 1, "clone": 1, "Sigmoid": 1}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_is_emitted_with_all_its_options(name: str) -> None:
    make, shape = LAYERS[name]
    model = randomised(make())
    compiled = rgc.compile(model, torch.randn(shape))
    assert not any(count for layer, count in compiled.report.ops_after.items() if layer.startswith("BatchNorm"))
    for size in (shape, (1, *shape[1:]), (3, 4, *(n + 3 for n in shape[2:]))):
        x = torch.randn(size)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_of_the_model_and_the_dtype_asked_for_are_those_of_the_result(dtype: torch.dtype) -> None:
    model = randomised(Network())
    by_model = rgc.compile(copy.deepcopy(model).to(dtype), X)  # the example is cast to the model's dtype
    by_option = rgc.compile(model, X, dtype=dtype)
    for compiled in (by_model, by_option):
        assert {parameter.dtype for parameter in compiled.parameters()} == {dtype}
        assert compiled(X.to(dtype)).dtype == dtype


# --- copies and files ----------------------------------------------------------------------------------------------


def _saved(compiled: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(compiled, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each)), _saved])
@pytest.mark.parametrize("passes", ["default", "all"])
def test_a_copy_of_a_compiled_model_keeps_its_record(copied: Callable[[Any], Any], passes: str) -> None:
    compiled = rgc.compile(
        randomised(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten())), X, passes=passes
    )
    again = copied(compiled)
    assert isinstance(again, rgc.CompiledModule) and not again.training
    assert again.report == compiled.report and list(again.state_dict()) == list(compiled.state_dict())
    assert torch.equal(again(X), compiled(X))


@pytest.mark.parametrize("passes", ["default", "all"])
def test_compiling_twice_changes_nothing_the_second_time(passes: str) -> None:
    once = rgc.compile(randomised(Network()), X, passes=passes)
    twice = rgc.compile(once, X, passes=passes)
    assert twice.report.tier == "torch.fx" and not twice.report.rewrites
    assert list(twice.state_dict()) == list(once.state_dict()) and torch.equal(twice(X), once(X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_clamp_is_emitted_as_it_was_lifted_and_keeps_its_infinite_bounds(dtype: torch.dtype) -> None:
    class Bounded(nn.Module):
        lower: Tensor
        upper: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("lower", torch.tensor([0.0, -math.inf, -2.0]).reshape(3, 1, 1))
            self.register_buffer("upper", torch.tensor([6.0, math.inf, math.inf]).reshape(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.clamp(x, self.lower, self.upper)

    model, x = Bounded().eval().to(dtype), 10 * torch.randn(2, 3, 7, 5).to(dtype)
    compiled = rgc.compile(model, x)
    assert compiled.report.ops_after == {"maximum": 1, "minimum": 1}
    assert torch.equal(compiled(x), model(x)) and compiled(x).dtype == dtype
    again = rgc.compile(compiled, x)
    assert again.report.ops_after == {"maximum": 1, "minimum": 1} and torch.equal(again(x), model(x))


def test_torch_compile_takes_a_compiled_model_whole() -> None:
    compiled = rgc.compile(randomised(Network()), X)
    graph_mode = torch.compile(compiled, backend="eager", fullgraph=True)
    torch.testing.assert_close(graph_mode(X), compiled(X))


def test_a_model_for_one_size_refuses_another_in_plain_words() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)).eval()
    compiled = rgc.compile(model, X, passes="all", objective="depth")
    assert compiled.report.fixed_size
    x = torch.randn(5, 4, 9, 8)
    torch.testing.assert_close(compiled(x), model(x))
    with pytest.raises(
        AssertionError, match=r"holds for inputs of size 4x9x8 \(any batch\); compile again for another"
    ):
        compiled(torch.randn(2, 4, 8, 8))


def test_two_thousand_names_that_collide_are_still_found_quickly() -> None:
    relu = Activation("relu")
    x = Value(Input("x"), (), TensorType((2, 4), torch.float32))
    value = x
    for _ in range(2000):
        value = type(relu)("relu")(value)
    module = emit(Graph([x], value), None)
    assert len(list(module.modules())) == 2001


def test_kernels_are_narrowed_before_emission_but_for_those_that_are_tied_or_computed_with() -> None:
    x = Value(Input("x"), (), TensorType((1, 4, 5, 5), torch.float32), name="x")
    weight, tied = (torch.randn(4, 4, 1, 1, dtype=torch.float64) for _ in range(2))
    plain = rgc.Conv(weight, torch.randn(4, dtype=torch.float64))
    padded = rgc.Conv(torch.randn(4, 4, 3, 3, dtype=torch.float64), padding=1, pad_value=torch.rand(4).double())
    y = plain(padded(rgc.Conv(tied)(rgc.Conv(tied, groups=1, stride=2)(plain(x)))))
    graph = Graph([x], y)
    expected = dict(emit(graph, torch.float32).state_dict().items())
    narrow(graph, torch.float32)
    dtypes = [value.op.weight.dtype for value in graph.nodes() if isinstance(value.op, rgc.Conv)]
    assert dtypes == [torch.float32, torch.float64, torch.float64, torch.float64, torch.float32]
    assert plain.weight is weight  # operators do not change
    found = emit(graph, torch.float32)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.state_dict().items())
    parameters = dict(found.named_parameters())
    assert len(parameters) == 5  # three weights, one of them tied, and two biases


def test_a_module_for_the_proof_only_shares_the_weights_of_the_graph() -> None:
    x = Value(Input("x"), (), TensorType((1, 4, 5, 5), torch.float32), name="x")
    weight = torch.randn(4, 4, 1, 1)
    graph = Graph([x], rgc.Conv(weight)(x))
    shared, copied = (next(emit(graph, None, copies=copies).parameters()) for copies in (False, True))
    assert shared.data_ptr() == weight.data_ptr() != copied.data_ptr()
