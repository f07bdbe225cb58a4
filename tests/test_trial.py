"""Is a trial of a pass on a model more than a compilation: the source model, other sizes, what it raises?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rgc import BatchNorm, Conv, Graph, Value, graph_pass, require, rewrite, trial
from rgc.passes import fold_batchnorm
from rgc.trial import attempt, made, relies_on_range

SHAPE = (2, 3, 6, 6)


def conv_bn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_a_pass_that_is_right_fires_without_a_fault() -> None:
    found = attempt(fold_batchnorm, conv_bn, SHAPE)
    assert found.fired and not found.fault and not found.unusable and found.outcome == (True, (), False, False)


def test_weights_are_the_same_for_the_same_seed() -> None:
    first, second, third = (made(conv_bn, seed, torch.float64).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["0.weight"], third["0.weight"])


def test_a_reason_is_kept_and_an_empty_one_is_a_fault() -> None:
    def refusing(reason: str) -> trial.Trial:
        @rewrite(lambda x, conv, bn: bn(conv(x)))
        def refuse(x: Value, conv: Conv, bn: BatchNorm) -> Value:
            require(False, reason)
            return x

        return attempt(refuse, conv_bn, SHAPE)

    assert refusing("it is late").reasons == ("it is late",) and not refusing("it is late").fault
    assert "without a reason" in refusing("").fault


def test_a_model_that_does_not_run_is_unusable_and_no_fault() -> None:
    found = attempt(fold_batchnorm, conv_bn, (2, 5, 6, 6))
    assert "does not run" in found.unusable and not found.fault


def test_a_wrong_result_is_a_fault_in_words() -> None:
    @rewrite(lambda x, conv, bn: bn(conv(x)))
    def twice(x: Value, conv: Conv, bn: BatchNorm) -> Value:
        return (bn.as_linear() @ bn.as_linear() @ conv)(x)

    assert attempt(twice, conv_bn, SHAPE).fault.startswith("the result is not equal: 1: differs by")


def test_a_difference_that_compiling_has_missed_is_found_at_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.model(x)
            return y + (x.shape[-1] > 30)

    compile_with = trial.compile_with

    def spoiled(*arguments: object) -> object:
        compiled = compile_with(*arguments)  # type: ignore[arg-type]
        wrong = Wrong(compiled)
        wrong.report = compiled.report  # type: ignore[assignment]
        return wrong

    monkeypatch.setattr(trial, "compile_with", spoiled)
    assert "on an input of 2x3x40x41" in attempt(fold_batchnorm, conv_bn, SHAPE).fault


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pass_that_writes_to_weights_is_stopped_and_the_model_stays(dtype: torch.dtype) -> None:
    @graph_pass
    def erase(graph: Graph) -> Graph:
        for value in graph.nodes():
            for tensor in value.op.tensors():
                tensor.zero_()
        return graph

    found = attempt(erase, conv_bn, SHAPE, dtype=dtype)
    assert "overwrites a weight (test_trial.py:" in found.fault


def test_a_source_model_that_has_changed_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_with = trial.compile_with

    def changing(model: nn.Module, *rest: object) -> object:
        compiled = compile_with(model, *rest)  # type: ignore[arg-type]
        next(model.parameters()).data.view(-1)[0] += 1
        return compiled

    monkeypatch.setattr(trial, "compile_with", changing)
    assert "it writes to the weights of the model, in place: 0.weight" in attempt(fold_batchnorm, conv_bn, SHAPE).fault


def test_the_twin_that_declares_a_range_is_another_rewrite() -> None:
    twin = relies_on_range(fold_batchnorm)
    assert all(case.relies_on_range for case in twin.cases)  # type: ignore[union-attr]
    assert not any(case.relies_on_range for case in fold_batchnorm.cases)
