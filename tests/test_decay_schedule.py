"""Does a decay schedule reach exactly 1, resume to the last bit, and find activations behind every wrapper?"""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

from rgc.decay_schedule import DecayGroup, DecaySchedule, unwrapped
from rgc.errors import InputError
from rgc.models import reducenet
from rgc.nn import DecayedActivation, DecayedLeakyReLU


def network(count: int = 3) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), DecayedActivation(nn.ReLU())) for _ in range(count)))


def decays(model: nn.Module) -> list[float]:
    kinds = DecayedActivation | DecayedLeakyReLU
    return [module.decay.item() for module in model.modules() if isinstance(module, kinds)]


def test_linear_and_cosine_follow_their_formulas() -> None:
    for curve, formula in (("linear", lambda t: t), ("cosine", lambda t: (1 - math.cos(math.pi * t)) / 2)):
        schedule = DecaySchedule(network(), 10, curve=curve)
        seen = [schedule.get_last_decay()]
        for _ in range(10):
            schedule.step()
            seen.append(schedule.get_last_decay())
        assert seen == [[pytest.approx(formula(step / 10), abs=1e-15)] for step in range(11)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("curve", ["linear", "cosine"])
@pytest.mark.parametrize("total_steps", [1, 3, 7, 10, 49])
def test_the_end_is_exactly_one_and_stays_so(curve: str, total_steps: int, dtype: torch.dtype) -> None:
    model = network()
    schedule = DecaySchedule(model, total_steps, curve=curve)
    assert decays(model) == [0.0] * 3
    model.to(dtype)
    for step in range(total_steps + 3):
        schedule.step()
        if step + 1 >= total_steps:
            assert decays(model) == [1.0] * 3
        elif dtype in (torch.float32, torch.float64):  # the others have no number between the last step and 1
            assert max(decays(model)) < 1.0
    assert schedule.get_last_decay() == [1.0]


def test_a_stop_before_the_end_is_reached_where_it_says_in_spite_of_rounding() -> None:
    model = network()
    schedule = DecaySchedule(model, 10, groups=[DecayGroup(["0"], stop=0.7, curve="linear")])
    for _ in range(7):
        schedule.step()
    assert decays(model)[0] == 1.0


def test_nothing_decays_before_the_start() -> None:
    schedule = DecaySchedule(network(), 10, curve="linear", start=0.5)
    seen = []
    for _ in range(10):
        schedule.step()
        seen += schedule.get_last_decay()
    assert seen == [0.0] * 5 + [pytest.approx(k / 5) for k in range(1, 6)]


def test_groups_decay_from_the_last_to_the_first_and_what_is_in_none_is_left_as_it_is() -> None:
    model = network()
    model[0][1].set_decay(0.25)
    groups = [
        DecayGroup(["2"], stop=0.5, curve="linear"),
        DecayGroup(lambda path, module: path == "1.1", start=0.5, curve="linear"),
    ]
    schedule = DecaySchedule(model, 4, groups=groups)
    seen = []
    for _ in range(4):
        schedule.step()
        seen.append(decays(model))
    assert seen == [[0.25, 0.0, 0.5], [0.25, 0.0, 1.0], [0.25, 0.5, 1.0], [0.25, 1.0, 1.0]]


def test_it_resumes_to_the_last_bit() -> None:
    first = reducenet(8)
    schedule = DecaySchedule(first, 13)
    for _ in range(5):
        schedule.step()
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "decay": schedule.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = reducenet(8)
    resumed = DecaySchedule(second, 13)
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["decay"])
    for _ in range(8):
        assert decays(first) == decays(second)
        assert schedule.get_last_decay() == resumed.get_last_decay()
        schedule.step()
        resumed.step()
    assert decays(second) == [1.0] * 4


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: DecaySchedule(network(), 5), "total_steps = 4, this one 5"),
        (lambda: DecaySchedule(network(), 4, curve="linear"), "has groups = .*cosine.* this one .*linear"),
        (lambda: DecaySchedule(network(2), 4), r"has groups = .*'2\.1'.* this one"),
    ],
)
def test_the_state_of_another_schedule_is_refused(other: object, message: str) -> None:
    saved = DecaySchedule(network(), 4).state_dict()
    with pytest.raises(InputError, match=message + ".*build it with the same arguments"):
        other().load_state_dict(saved)  # type: ignore[operator]
    with pytest.raises(InputError, match="last_step = None"):
        DecaySchedule(network(), 4).load_state_dict({k: v for k, v in saved.items() if k != "last_step"})


def test_activations_are_found_behind_wrappers_under_their_own_paths() -> None:
    model = network()
    compiled = torch.compile(model, backend="eager")
    assert DecaySchedule(compiled, 4).state_dict() == DecaySchedule(model, 4).state_dict()
    wrapped = nn.Module()
    wrapped.module = model  # as DistributedDataParallel has it
    schedule = DecaySchedule(wrapped, 4, groups=[DecayGroup(["1"])])
    for _ in range(4):
        schedule.step()
    assert decays(model) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("path", "plain"),
    [("module._orig_mod.a", "a"), ("a._orig_mod.b", "a.b"), ("module.module.a", "a"), ("module", "module"), ("", "")],
)
def test_wrappers_leave_no_name(path: str, plain: str) -> None:
    assert unwrapped(path) == plain


def test_a_child_that_is_named_module_is_no_wrapper_where_another_has_its_path() -> None:
    model = nn.ModuleDict({"a": DecayedLeakyReLU(), "module": nn.ModuleDict({"a": DecayedLeakyReLU()})})
    DecaySchedule(model, 1).step()
    assert decays(model) == [1.0, 1.0]


def test_a_shared_activation_and_a_copy_of_the_schedule_and_its_model_decay_once_a_step() -> None:
    shared = DecayedActivation(nn.ReLU())
    model = nn.Sequential(nn.Linear(2, 2), shared, nn.Linear(2, 2), shared)
    schedule = DecaySchedule(model, 4, curve="linear")
    other_model, other = copy.deepcopy((model, schedule))
    schedule.step()
    assert decays(model) == [0.25]
    assert decays(other_model) == [0.0]
    other.step()
    assert decays(other_model) == [0.25]


@pytest.mark.parametrize("total_steps", [0, -3, 2.5, True])
def test_a_number_of_steps_that_is_none_is_refused(total_steps: int) -> None:
    with pytest.raises(InputError, match=f"total_steps must be a whole number of at least 1, got {total_steps}"):
        DecaySchedule(network(), total_steps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"curve": "exponential"}, "curve must be one of cosine, linear, got 'exponential'"),
        ({"start": 1.0}, "0 <= start < stop <= 1; got 1.0, 1.0"),
        ({"start": float("nan")}, "got nan, 1.0"),
        ({"groups": []}, "list of groups is empty"),
        ({"groups": [DecayGroup(["0"])], "curve": "linear"}, "groups have a curve and a start of their own"),
        ({"groups": [DecayGroup(["3"])]}, r"group 0: no activation is named '3'; there are 0\.1, 1\.1, 2\.1"),
        ({"groups": [DecayGroup(["1.11"])]}, r"did you mean 1\.1"),
        ({"groups": [DecayGroup(lambda path, module: False)]}, "group 0 matches no decaying activation"),
        ({"groups": [DecayGroup(["0", "1"]), DecayGroup(["1.1"])]}, r"1\.1 is in the groups 0 and 1"),
    ],
)
def test_what_cannot_be_scheduled_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DecaySchedule(network(), 4, **arguments)  # type: ignore[arg-type]


def test_a_path_alone_and_a_model_without_decaying_activations_are_refused() -> None:
    with pytest.raises(InputError, match=r"predicate or a list of paths; write \['stage1'\]"):
        DecayGroup("stage1")
    with pytest.raises(InputError, match="DecaySchedule: Sequential has no decaying activation; .* rgc.nn.linearize"):
        DecaySchedule(nn.Sequential(nn.ReLU()), 4)
