"""Is the distillation loss that of Hinton et al., with the right gradients, in every dtype?"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rgc.errors import InputError
from rgc.nn import distillation_loss


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 6, 10, generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(0, 10, (6,), generator=generator)


def test_it_is_the_sum_that_the_paper_gives(logits: tuple[torch.Tensor, ...]) -> None:
    student, teacher, labels = logits
    p, q = torch.softmax(teacher / 3, 1), torch.softmax(student / 3, 1)
    soft = 9 * (p * (p / q).log()).sum(1).mean()
    hard = -torch.log_softmax(student, 1)[torch.arange(6), labels].mean()
    torch.testing.assert_close(distillation_loss(student, teacher, temperature=3.0), soft)
    found = distillation_loss(student, teacher, labels, temperature=3.0, alpha=0.25)
    torch.testing.assert_close(found, 0.25 * soft + 0.75 * hard)
    smooth = distillation_loss(student, teacher, labels, alpha=0.0, label_smoothing=0.1)
    torch.testing.assert_close(smooth, F.cross_entropy(student, labels, label_smoothing=0.1))


def test_in_the_limit_of_a_high_temperature_it_matches_logits(logits: tuple[torch.Tensor, ...]) -> None:
    """Section 2.1: there the gradient is (z_i - v_i) / N for logits without a mean; T^2 takes the place of 1/T^2."""
    student, teacher, _ = (each - each.double().mean(-1, keepdim=True) for each in logits)
    student.requires_grad_()
    distillation_loss(student, teacher, temperature=1e5).backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 10 / 6, rtol=1e-4, atol=1e-6)


def test_gradients_are_right_and_none_goes_to_the_teacher(logits: tuple[torch.Tensor, ...]) -> None:
    student, teacher, labels = logits
    student.requires_grad_()
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: distillation_loss(z, teacher.detach(), labels, temperature=2.0), student)
    distillation_loss(student, teacher, labels).backward()
    assert teacher.grad is None
    assert student.grad is not None and bool(student.grad.any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_also_under_autocast(
    dtype: torch.dtype, logits: tuple[torch.Tensor, ...]
) -> None:
    student, teacher = (each.to(dtype) for each in logits[:2])
    expected = distillation_loss(student.float(), teacher.float(), logits[2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = distillation_loss(student, teacher, logits[2])
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_classes_come_second_as_in_cross_entropy() -> None:
    student, teacher = torch.randn(2, 2, 5, 3, 4).unbind()
    labels = torch.randint(0, 5, (2, 3, 4))
    rows = [each.permute(0, 2, 3, 1).reshape(-1, 5) for each in (student, teacher)]
    torch.testing.assert_close(
        distillation_loss(student, teacher, labels), distillation_loss(*rows, labels.reshape(-1))
    )
    torch.testing.assert_close(distillation_loss(rows[0][0], rows[1][0]), distillation_loss(rows[0][:1], rows[1][:1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher_logits": torch.zeros(2, 4)}, r"logits of one shape .*, got \[2, 3\] and \[2, 4\]"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be positive, got nan"),
        ({"alpha": 0.5}, "got no labels"),
        ({"labels": torch.zeros(2, dtype=torch.long), "alpha": 1.5}, "got alpha = 1.5"),
    ],
)
def test_what_makes_no_loss_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        distillation_loss(**{"student_logits": torch.zeros(2, 3), "teacher_logits": torch.zeros(2, 3), **arguments})
