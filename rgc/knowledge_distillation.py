"""How does a network learn from another one? By matching its softened probabilities, beside the labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rgc.errors import InputError

#: The weight of the teacher beside the labels; Hinton et al. give the labels "a considerably lower weight".
ALPHA = 0.9


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """What a student is to minimise: ``alpha T^2 KL(teacher || student) + (1 - alpha) cross_entropy(labels)``.

    Both probabilities in KL are softened by the temperature T; T^2 keeps the size of its gradient while T changes
    (Hinton, Vinyals, Dean, arXiv 1503.02531, section 2). Both logits are [batch, classes, ...] (or [classes]);
    ``labels`` is what ``torch.nn.functional.cross_entropy`` takes. Means are over all but the classes. The result is a
    0-dim tensor, computed in float32 at least, also under autocast. The teacher gets no gradient.

    alpha: by default 0.9; without labels there is only the first term, ``T^2 KL``. label_smoothing: of the labels.

    Raises ``InputError`` for logits of different shapes, a temperature that is not positive, and an alpha outside
    [0, 1] or without labels.

    >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
    >>> distillation_loss(logits, logits)
    tensor(0.)
    """
    if student_logits.shape != teacher_logits.shape or student_logits.dim() == 0:
        raise InputError(
            f"distillation_loss: student and teacher must give logits of one shape [batch, classes, ...], "
            f"got {list(student_logits.shape)} and {list(teacher_logits.shape)}"
        )
    if not 0.0 < temperature < float("inf"):
        raise InputError(f"distillation_loss: the temperature must be positive, got {temperature}")
    if alpha is not None and (labels is None or not 0.0 <= alpha <= 1.0):
        found = "no labels" if labels is None else f"alpha = {alpha}"
        raise InputError(f"distillation_loss: alpha, in [0, 1], weighs the teacher against the labels; got {found}")
    with torch.autocast(student_logits.device.type, enabled=False):
        student, teacher = _at_least_float32(student_logits), _at_least_float32(teacher_logits.detach())
        classes = min(1, student.dim() - 1)
        p = F.log_softmax(teacher / temperature, classes)
        q = F.log_softmax(student / temperature, classes)
        divergence = F.kl_div(q, p, reduction="none", log_target=True).sum(classes).mean()
        soft: Tensor = temperature**2 * divergence
        if labels is None:
            return soft
        weight = ALPHA if alpha is None else alpha
        hard = F.cross_entropy(student, labels, label_smoothing=label_smoothing)
        return weight * soft + (1.0 - weight) * hard


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
