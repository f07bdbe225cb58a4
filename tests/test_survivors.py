"""Are faults in the source of a pass planted where it counts, and told apart by what its examples notice?"""

from __future__ import annotations

from pathlib import Path

from rgc import Conv, Rewrite, Value, rewrite
from rgc.examination import problem_of_example
from rgc.passbook import load_passes
from rgc.survivors import Mutation, file_of, mutate
from rgc.trial import attempt
from rgc.variations import variations

PASS = '''
from torch import nn

from rgc import BatchNorm, Conv, Value, require, rewrite


@rewrite(lambda x, conv, bn: bn(conv(x)))
def mine(x: Value, conv: Conv, bn: BatchNorm) -> Value:
    """s(Wx + b) + t = (sW)x + sb + t."""
    require(conv.bias is not None, "no bias")
    if conv.out_channels == 77:
        return x
    return joined(conv, bn)(x)


def joined(conv: Conv, bn: BatchNorm) -> Conv:
    return bn.as_linear() @ conv


def unused(x: int) -> int:
    return x + 1


@mine.fires_on(shape=(5, 4))
def linear_bn() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(2 + 1))
'''

GUARD = """

@mine.leaves_alone(shape=(5, 4), because="no bias")
def without_bias() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3))
"""


def mutated(folder: Path, text: str) -> Mutation:
    (folder / "mine.py").write_text(text)
    (pass_,) = load_passes(str(folder / "mine.py"))
    assert isinstance(pass_, Rewrite) and file_of(pass_) == str(folder / "mine.py")
    (likeness,) = (each for each in variations(pass_.examples[0]) if "bias=False in its layer '0'" in each.words)

    def again() -> object:
        return attempt(pass_, likeness.build, likeness.shape)

    likenesses = [(again, again(), str(likeness))]
    return mutate(
        pass_, lambda example: problem_of_example(pass_, example, 0), likenesses,  # type: ignore[arg-type]
        most=50, progress=lambda *_: None,
    )  # fmt: skip


def test_a_fault_is_noticed_or_survives_with_the_model_that_notices_it(tmp_path: Path) -> None:
    found = mutated(tmp_path, PASS)
    changes = {each.mutant.change: each for each in found.survivors}
    (guard,) = (each for change, each in changes.items() if change.startswith("`require("))
    assert guard.is_reached and not guard.is_raising
    assert guard.noticed is not None and "bias=False" in guard.noticed[0] and guard.noticed[1].reasons == ("no bias",)
    assert found.noticed == found.planted - len(found.survivors) > 0
    assert {each.mutant.function for each in found.survivors} <= {"mine", "joined"}  # neither what is unused nor models
    assert found.possible == found.planted


def test_an_example_for_the_guard_notices_it(tmp_path: Path) -> None:
    changes = [each.mutant.change for each in mutated(tmp_path, PASS + GUARD).survivors]
    assert not any(change.startswith("`require(") for change in changes)


def test_a_pass_of_no_file_has_none() -> None:
    code = "def build(x, conv):\n    return x\n"
    made: dict[str, object] = {}
    exec(compile(code, "<prompt>", "exec"), made)
    build = made["build"]
    build.__annotations__ = {"x": Value, "conv": Conv, "return": Value}  # type: ignore[attr-defined]
    assert file_of(rewrite(lambda x, conv: conv(x))(build)) is None  # type: ignore[arg-type]
