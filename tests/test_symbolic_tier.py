"""What does the first tier refuse to trace, and what does it make of parameters?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import rgc
from rgc.errors import TraceError
from rgc.example import Example
from rgc.lift import lift
from rgc.symbolic_tier import trace_symbolically

X = Example((torch.randn(2, 3, 6, 6),))


class Model(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 4, 3), nn.Parameter(torch.tensor(1.0))
        self.token = nn.Parameter(torch.randn(1, 3, 6, 6))
        self.register_buffer("count", torch.zeros(()))
        self.body = forward

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def _counts(m: Any, x: Tensor) -> Tensor:
    m.count += 1
    return m.conv(x)


def _clamps_its_weight(m: Any, x: Tensor) -> Tensor:
    m.conv.weight.data.clamp_(-0.01, 0.01)
    return m.conv(x)


def _grows(m: Any, x: Tensor) -> Tensor:
    m.register_buffer("extra", torch.ones(1))
    return m.conv(x)


def _autocasts(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.conv(x)


@pytest.mark.parametrize(("forward", "message"), [
    (_counts, "forward overwrites count of the model"),
    (_clamps_its_weight, "forward overwrites conv.weight of the model"),
    (_grows, "forward adds extra to the model"),
    (_autocasts, "forward turns autocast on or off, which a graph cannot hold"),
])  # fmt: skip
def test_what_a_graph_would_lose_is_refused_by_name(forward: Callable[[Any, Tensor], Tensor], message: str) -> None:
    model = Model(forward).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TraceError) as caught:
        trace_symbolically(model, X)
    assert str(caught.value) == message
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_hook_on_the_model_itself_is_refused() -> None:
    model = Model(lambda m, x: m.conv(x)).eval()
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(TraceError, match="the model itself has forward hooks, which tracing would lose"):
        trace_symbolically(model, X)


def test_parameters_are_constants_that_steer_control_flow() -> None:
    source, _ = trace_symbolically(Model(lambda m, x: m.conv(x) if m.scale == 1.0 else x).eval(), X)
    assert [node.target for node in source.graph.nodes if node.op == "call_module"] == ["conv"]


def test_a_parameter_expanded_to_the_batch_becomes_a_symbol() -> None:
    source, _ = trace_symbolically(Model(lambda m, x: x + m.token.expand(x.shape[0], -1, -1, -1)).eval(), X)
    assert [node.target for node in source.graph.nodes if node.op == "get_attr"] == ["token"]


def test_an_assignment_to_items_is_recorded_where_it_happens() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        z = y * 2
        y[:, :1] = z[:, 1:2]
        return y + z

    source, _ = trace_symbolically(Model(forward).eval(), X)
    nodes = list(source.graph.nodes)
    names = [getattr(node.target, "__name__", node.target) for node in nodes]
    assert names[names.index("mul") :] == ["mul", "getitem", "setitem", "add", "output"]


def _asks_what_sizes_do_not_change(m: Any, x: Tensor) -> Tensor:
    known = x.ndim == 4 and x.dim() == len(x.shape) and not x.is_cuda and x.dtype != torch.float16
    channels = x.shape[1] == 3 and x.size(-3) == 3 and torch.is_floating_point(x) and x.device.type == "cpu"
    return m.conv(x) if known and channels else x


def test_rank_dtype_device_and_channels_are_constants_that_leave_sizes_free() -> None:
    model = Model(_asks_what_sizes_do_not_change).eval()
    source, checks_sizes = trace_symbolically(model, X)
    assert not checks_sizes
    assert [node.target for node in source.graph.nodes if node.op == "call_module"] == ["conv"]
    compiled = rgc.compile(model, X)
    assert compiled.report.tier == "torch.fx" and not compiled.report.fixed_size
    other = torch.randn(5, 3, 9, 4)
    torch.testing.assert_close(compiled(other), model(other))


def _pads_to_multiples_of_four(m: Any, x: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    if height % 4 or width % 4:
        x = nn.functional.pad(x, (0, -width % 4, 0, -height % 4))
    windows = x.reshape(batch, 3, x.shape[2] // 4, 4, x.shape[3] // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, 4, 4)
    grid = torch.arange(4, device=x.device, dtype=x.dtype)
    return (m.conv(windows) * grid[:2]).reshape(batch, windows.shape[0] // batch, -1)


def test_a_size_that_steers_forward_is_that_of_the_example_and_the_batch_stays_free() -> None:
    model = Model(_pads_to_multiples_of_four).eval()
    compiled = rgc.compile(model, X)
    assert (compiled.report.tier, compiled.report.fixed_size) == ("torch.fx", True)
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 6, 6)
        torch.testing.assert_close(compiled(x), model(x))
    with pytest.raises(AssertionError, match=r"holds where x is of size 3x6x6 \(any batch\); compile it again"):
        compiled(torch.randn(2, 3, 6, 8))


@pytest.mark.parametrize("forward", [
    lambda m, x: m.conv(x)[:, : int(x.argmax())],
    lambda m, x: m.conv(x) * x.nonzero().shape[0],
    lambda m, x: m.conv(x) * x[x > 0].shape[0],
    lambda m, x: m.conv(x) if x.max() > -9 else x,
    lambda m, x: m.conv(x) if x.shape[0] > 3 else x,
], ids=["an index", "a count", "a mask", "a condition", "the batch"])  # fmt: skip
def test_what_depends_on_values_or_on_the_batch_is_no_constant(forward: Callable[[Any, Tensor], Tensor]) -> None:
    model = Model(forward).eval()
    for probe in (X, Example((torch.zeros(2, 3, 6, 6),))):
        try:
            source, _ = trace_symbolically(model, probe)
        except Exception:
            continue  # refused: the next tier's affair
        other = Example((torch.randn(4, 3, 6, 6),))
        graph = lift(source, torch.float32, fixed=False)
        torch.testing.assert_close(graph.evaluate(other.bind(model)), model(*other.args))


def test_an_error_of_the_first_attempt_is_the_one_that_is_told() -> None:
    with pytest.raises(
        fx.proxy.TraceError, match="symbolically traced variables cannot be used as inputs to control flow"
    ):
        trace_symbolically(Model(lambda m, x: x if x.sum() > 0 else m.token).eval(), X)


def test_the_channels_of_an_input_that_no_layer_counts_stay_free() -> None:
    model = Model(lambda m, x: (y := torch.relu(x)).reshape(y.shape[0], y.shape[1], -1)).eval()
    compiled = rgc.compile(model, X)
    for shape in ((2, 3, 6, 6), (1, 8, 5, 4)):
        x = torch.randn(shape)
        assert torch.equal(compiled(x), model(x))


def test_channels_of_an_input_that_steer_forward_are_checked_at_run_time() -> None:
    model = Model(lambda m, x: torch.relu(x) if x.shape[1] == 3 else x).eval()
    compiled = rgc.compile(model, X)
    assert compiled.report.tier == "torch.fx" and not compiled.report.fixed_size
    other = torch.randn(4, 3, 9, 5)
    assert torch.equal(compiled(other), model(other))
    with pytest.raises(AssertionError, match="holds where x has 3 channels"):
        compiled(torch.randn(2, 4, 6, 6))


# --- functions that asked not to be traced ----------------------------------------------------------------------------


def halve_in_training(x: Tensor, p: float, training: bool) -> Tensor:
    if p < 0:
        raise ValueError("p is negative")
    if not training or p == 0.0:
        return x
    return x * p


def by_value(x: Tensor) -> Tensor:
    y = x + 1
    return y if bool((x > 0).all()) else 2 * y


for _name in ("halve_in_training", "by_value"):
    fx.wrap(_name)


def test_a_wrapped_function_is_looked_into_where_that_can_be_done() -> None:
    model = Model(lambda m, x: halve_in_training(m.conv(x), 0.5, m.training)).eval()
    source, _ = trace_symbolically(model, X)
    assert [node.op for node in source.graph.nodes] == ["placeholder", "call_module", "output"]


def test_a_wrapped_function_that_looks_at_values_is_called_and_leaves_nothing_of_the_attempt() -> None:
    model = Model(lambda m, x: m.conv(by_value(x))).eval()
    source, _ = trace_symbolically(model, X)
    assert [node.target for node in source.graph.nodes if node.op == "call_function"] == [by_value]
    compiled = rgc.compile(model, X)
    for x in (torch.randn(2, 3, 6, 6), torch.rand(2, 3, 6, 6)):
        torch.testing.assert_close(compiled(x), model(x))
