"""Is every reason for two operators not being one told, in the user's names, and no change that PyTorch lacks?"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rgc
from rgc.compiler import trace
from rgc.cost import CPU
from rgc.explanation import Cost, Gap
from rgc.models import reducenet20
from rgc.nn import DecayedLeakyReLU, set_decay
from rgc.testing import randomize


def gaps(model: nn.Module, where: str, channels: int = 2, **options: Any) -> tuple[Gap, ...]:
    x = torch.randn(1, channels, 12, 11, generator=torch.Generator().manual_seed(0))
    return rgc.explain(randomize(model), x, where, **options).gaps


def chain(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*layers)


def pointwise() -> nn.Module:
    return nn.Conv2d(2, 2, 1)


class Functional(nn.Module):
    """An activation that is no module, its input read by somebody else where ``shared``."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.first, self.second, self.shared = pointwise(), pointwise(), shared

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z: Tensor = self.second(F.silu(y))
        return z * torch.sigmoid(y) if self.shared else z


BOTTLENECK = ((32, 8, 1), (8, 32, 1), (32, 64, 3))


def test_a_pair_that_the_plan_leaves_apart_names_the_better_partner() -> None:
    model = chain(*(nn.Conv2d(reads, makes, kernel) for reads, makes, kernel in BOTTLENECK))
    for where in ("0", "0,1"):
        (gap,) = gaps(model, where, channels=32)
        assert gap.reasons[0] == "planned otherwise: it pays more to make 1 one operator with 2 than with 0"
        assert gap.reasons[1].startswith("estimated slower")
    (made,) = rgc.explain(model, torch.randn(1, 32, 12, 11), "1,2").places
    assert made.layers == ("1", "2") and made.fate == "merged"
    (pair,) = gaps(chain(*list(model)[:2]), "0,1", channels=32) or [None]
    assert pair is None  # without the better partner the two are one


def test_a_residual_around_an_activation_can_be_made_a_single_path() -> None:
    class Block(nn.Module):
        def __init__(self, act: nn.Module) -> None:
            super().__init__()
            self.first, self.act, self.second = nn.Conv2d(32, 24, 3, padding=1), act, nn.Conv2d(24, 32, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x + self.second(self.act(self.first(x))))

    model, x = Block(nn.GELU()), torch.randn(1, 32, 12, 11)
    gap = next(gap for gap in gaps(model, "second", 32) if gap.kind == "sum")
    (remedy,) = [each for each in gap.remedies if each.changes == ("--passes default,single_path",)]
    assert remedy.keeps_function and not remedy.pays and "made anyway" in remedy.note
    graph = trace(model, x, passes="default,single_path").graph
    made = [value for value in graph.nodes()[1:] if value.op.label != "tanh"]
    assert remedy.result == "conv 3x3 32->88, gelu and conv 3x3 88->32 in one path"
    assert [value.op.label for value in made] == ["conv 3x3 32->88", "gelu", "conv 3x3 88->32"]
    assert remedy.gain.after == Cost.of(made, CPU)
    for other, options in ((Block(nn.Mish()), {}), (model, {"passes": "fold_batchnorm"})):
        remedies = [each for gap in gaps(other, "second", 32, **options) for each in gap.remedies]
        assert not any("single_path" in change for each in remedies for change in each.changes)


def test_a_function_is_named_with_its_line() -> None:
    (gap,) = gaps(Functional(shared=False), "first,second")
    (reason,) = gap.reasons
    assert reason.startswith("silu at silu (test_gaps.py:") or reason.startswith("silu (test_gaps.py:")
    assert reason.endswith(" is not linear")
    (remedy,) = gap.remedies
    assert remedy.changes == ("replace the call of silu at silu by rgc.nn.DecayedActivation and decay it to 1",)
    assert not remedy.keeps_function and remedy.pays


def test_a_value_that_is_used_elsewhere_names_who_uses_it() -> None:
    (gap,) = gaps(Functional(shared=True), "first,second")
    assert gap.reasons[-1] == "first is also read by sigmoid: first must stay, so nothing is saved"
    assert gap.remedies == ()


def test_a_value_that_is_an_output_is_read_by_the_caller() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = pointwise(), pointwise()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.first(x)
            return y, self.second(y)

    (gap,) = gaps(Both(), "first,second")
    assert gap.reasons == ("first is also read by the caller of the model: first must stay, so nothing is saved",)


def test_what_is_not_affine_ends_it() -> None:
    (gap,) = gaps(chain(pointwise(), nn.ReLU(), nn.MaxPool2d(2), pointwise()), "0,3")
    assert gap.reasons == (
        "max pool 2x2 at 2 is between them and is not affine: rgc leaves it as it is",
        "relu at 1 is not linear",
    )
    assert gap.remedies == ()


def test_a_view_between_is_named_and_what_a_fixed_size_makes_of_all_was_really_tried() -> None:
    tail = chain(nn.Conv2d(2, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 12 * 11, 3))
    (gap,) = gaps(tail, "0,2")
    (reason,) = gap.reasons
    assert reason.startswith("Flatten at 1 is between them: affine")
    (remedy,) = gap.remedies
    assert remedy.changes == ("fixed size: --passes all",) and remedy.keeps_function and remedy.pays
    assert remedy.result.endswith("in place of 3 operators")
    x = torch.randn(1, 2, 12, 11)
    report = rgc.compile(tail, x, passes="all").report
    made = " and ".join(next(firing.result for firing in report.rewrites if firing.rewrite == "collapse"))
    assert remedy.result.startswith(made) and report.macs_after == remedy.gain.after.macs
    assert gaps(tail, "0,2", passes="all") == ()


def test_a_decayed_network_is_one_matrix_at_a_fixed_size() -> None:
    model = reducenet20()
    set_decay(model, 1.0)
    gap = rgc.explain(randomize(model), None, "stage1.0.conv1,stage1.1.conv1").gaps[0]
    left = trace(model, None, passes="default").graph
    assert gap.reasons[0].startswith("border ring")
    assert gap.remedies[0].result == f"flatten and linear 3072->10 in place of {len(left) - 1} operators"
    assert gap.remedies[0].gain.before == Cost.of(left.nodes(), CPU)


def test_a_sum_before_a_layer_has_to_be_one_operator_first() -> None:
    gap = rgc.explain(reducenet20().eval(), None, "stage1.1.conv1,stage1.0.add").gaps[-1]
    assert gap.layers == ("stage1.0.add", "stage1.1.conv1")
    assert gap.reasons == ("add at stage1.0.add is not one operator with its branches; explain it first",)


def test_branches_without_a_common_source_name_what_keeps_them_apart() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(2, 2, 3, padding=1), nn.MaxPool2d(3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.conv(x) + self.pool(x))

    (gap,) = gaps(Pooled(), "conv")
    assert gap.kind == "sum" and gap.layers == ("conv", "pool")
    assert "that meet in add are not affine in one common value: max pool 3x3 at pool comes between" in gap.reasons[0]


def test_a_sum_that_the_passes_refused_repeats_their_reason() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(2, 2, 3, padding=1)
            self.b = nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.a(x) + self.b(x))

    (gap,) = gaps(Padded(), "a,b")
    assert gap.layers == ("a", "b") and gap.reasons == ("padding modes differ: zeros and reflect",)
    assert gap.remedies == ()


def test_more_activations_than_anyone_fades_at_once_are_only_named() -> None:
    (gap,) = gaps(chain(pointwise(), nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.GELU(), pointwise()), "0,5")
    assert [reason.split()[0] for reason in gap.reasons] == ["relu", "tanh", "sigmoid", "gelu"]
    assert gap.remedies == ()


def test_an_activation_shows_what_it_keeps_apart() -> None:
    assert gaps(chain(pointwise(), nn.ReLU(), pointwise()), "1")[0].layers == ("0", "2")
    faded = chain(pointwise(), rgc.nn.DecayedActivation(nn.ReLU(), 0.5), pointwise())
    for where in ("1.activation", "1.mul", "1.add", "1"):
        (gap,) = gaps(faded, where)
        assert gap.layers == ("0", "2") and gap.remedies[0].changes == ("decay 1 to 1 (now 0.5)",)


def test_a_fading_leaky_relu_is_told_by_its_decay() -> None:
    (gap,) = gaps(chain(pointwise(), DecayedLeakyReLU(0.5), pointwise()), "0,2")
    assert gap.remedies[0].changes == ("decay 1 to 1 (now 0.5)",)


def test_a_shared_activation_says_that_it_is_called_twice() -> None:
    act = nn.ReLU()
    gap = gaps(chain(pointwise(), act, pointwise(), act, pointwise()), "0,2")[0]
    assert gap.remedies[0].changes == ("replace ReLU 1 (called 2 times) by rgc.nn.DecayedActivation and decay it to 1",)


def test_padding_of_several_branches_is_moved_by_no_option_of_one_layer() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow, self.last = (
                nn.Conv2d(2, 2, 3, padding=1),
                pointwise(),
                nn.Conv2d(2, 2, 3, padding=1),
            )

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.wide(x) + self.narrow(x))
            return y

    (gap,) = gaps(Branches(), "wide,last")
    assert gap.remedies == () and gap.reasons[0].startswith("border ring")
    assert gap.reasons[1] == "wide was made of 2 convolutions, so no option of one layer moves its padding"


def test_padding_is_not_moved_past_a_skip_connection() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            z: Tensor = y + self.last(y)
            return z

    (gap,) = gaps(Skips(), "first,last")
    assert gap.remedies == () and gap.reasons[0].startswith("border ring")


def test_zeros_go_before_the_layer_that_reads_the_input() -> None:
    model = chain(nn.AvgPool2d(2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3, padding=1))
    (gap,) = gaps(model, "1,2")
    assert [each.changes for each in gap.remedies] == [("nn.ZeroPad2d(1) before 0, then padding=0 of 2",)]


def test_the_options_of_a_shared_convolution_are_not_changed_for_one_place() -> None:
    conv = nn.Conv2d(2, 2, 3, padding=1)
    (gap,) = gaps(chain(conv, nn.ReLU(), conv), "0")
    assert gap.layers == ("0", "0") and gap.remedies == ()
    assert gap.reasons[-1] == "0 is called 2 times, so its options cannot be changed for this place alone"


def test_a_pass_that_was_left_out_is_named_as_the_way() -> None:
    (gap,) = gaps(chain(pointwise(), pointwise()), "0,1", passes="fold_batchnorm")
    assert gap.reasons == ("none of the passes in use takes 0 and 1 together",)
    assert ("--passes default",) in [remedy.changes for remedy in gap.remedies]


def test_a_pass_that_was_undone_is_a_bug_and_not_the_fault_of_the_model() -> None:
    @rgc.rewrite(lambda x, first, second: second(first(x)))
    def lose_first(x: rgc.Value, first: rgc.Conv, second: rgc.Conv) -> rgc.Value:
        return rgc.Conv(second.weight, second.bias)(x)

    (gap,) = gaps(chain(pointwise(), pointwise()), "0,1", passes=[lose_first])
    assert gap.reasons[0].startswith("lose_first was undone, because its result was not equal")
    assert gap.remedies == ()


def test_padding_is_moved_only_where_pytorch_has_an_option_for_it() -> None:
    reflecting = nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")
    (gap,) = gaps(chain(nn.Conv2d(2, 2, 3, padding=1), reflecting), "0,1")
    assert gap.remedies == () and "commutes only with a pointwise layer" in gap.reasons[0]
    even = nn.Conv2d(2, 2, 2, padding="same")
    (gap,) = gaps(chain(nn.Conv2d(2, 2, 3, padding=1), even), "0,1")
    assert not any("moved" in change for remedy in gap.remedies for change in remedy.changes)
