"""Which products with a constant are linear operators of one axis? matmul, addmm, einsum, tensordot and their kin.

A product that contracts one axis of a value with a constant matrix, and leaves the new axis in its place, is a linear
layer (the last axis) or a 1x1 convolution (axis 1). What a call orders differently is permuted afterwards.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rgc.algebra import Conv, Scale
from rgc.functions import Handler, Lifting, add, measures, multiply
from rgc.ir import Value
from rgc.operators import Opaque, Slot, Structural
from rgc.views import inverts


def matmul(lifter: Lifting, x: Any, other: Any) -> Value | None:
    if isinstance(x, Value) and (constant := _constant(lifter, other, x)) is not None:
        return _from_the_right(lifter, x, constant)
    if isinstance(other, Value) and (constant := _constant(lifter, x, other)) is not None:
        return _from_the_left(lifter, constant, other)
    return None


def _bmm(lifter: Lifting, x: Any, mat2: Any) -> Value | None:
    return matmul(lifter, *(_one_of_equal(each) for each in (x, mat2)))


def _addmm(lifter: Lifting, bias: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Value | None:
    """beta bias + alpha mat1 mat2; with constants a linear layer with its bias."""
    if isinstance(alpha, Value) or isinstance(beta, Value):
        return None
    product = matmul(lifter, mat1, mat2)
    if product is None:
        return None
    conv = product.op
    assert isinstance(conv, Conv)
    if conv.spatial == 0 and _is_bias(bias, conv, len(lifter.shape(product))):
        return lifter.emit(Conv(alpha * conv.weight, beta * bias.reshape(-1)), product.inputs[0])
    scaled: Value | None = product if alpha == 1 else multiply(lifter, product, alpha)
    if scaled is None or beta == 0:
        return scaled
    return add(lifter, scaled, bias, beta)


def _baddbmm(lifter: Lifting, bias: Any, batch1: Any, batch2: Any, *, beta: Any = 1, alpha: Any = 1) -> Value | None:
    return _addmm(lifter, *(_one_of_equal(each) for each in (bias, batch1, batch2)), beta=beta, alpha=alpha)


def _inner(lifter: Lifting, x: Any, other: Any) -> Value | None:
    if not isinstance(x, Value) or not isinstance(other, Tensor) or other.dim() > 2:
        return None
    return matmul(lifter, x, other.T if other.dim() == 2 else other)


def _einsum(lifter: Lifting, equation: Any, *operands: Any, path: Any = None) -> Value | None:
    given = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    if not isinstance(equation, str) or len(given) != 2 or isinstance(given[0], Value) == isinstance(given[1], Value):
        return None
    if not all(isinstance(each, Value | Tensor) for each in given) or not _is_floating(lifter, *given):
        return None
    terms = _parsed(equation, [len(lifter.shape(each)) if isinstance(each, Value) else each.dim() for each in given])
    if terms is None:
        return None
    (first, second), result = terms
    if isinstance(given[0], Value):
        return _contract(lifter, given[0], first, given[1], second, result)
    return _contract(lifter, given[1], second, given[0], first, result)


def _tensordot(lifter: Lifting, a: Any, b: Any, dims: Any = 2, dims_other: Any = None) -> Value | None:
    if isinstance(a, Value) == isinstance(b, Value) or not _is_floating(lifter, a, b):
        return None
    ranks = [len(lifter.shape(each)) if isinstance(each, Value) else each.dim() for each in (a, b)]
    if isinstance(dims, int):
        dims = (range(ranks[0] - dims, ranks[0]), range(dims))
    pair = dims if dims_other is None else (dims, dims_other)  # torch.export writes the two apart
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        return None
    left, right = ((each,) if isinstance(each, int) else tuple(each) for each in pair)
    if len(left) != 1 or len(right) != 1 or sum(ranks) > len(string.ascii_letters):
        return None
    first, second = list(string.ascii_letters[: ranks[0]]), list(string.ascii_letters[ranks[0] : sum(ranks)])
    second[right[0]] = first[left[0]]
    result = [label for label in first + second if label != first[left[0]]]
    if isinstance(a, Value):
        return _contract(lifter, a, first, b, second, result)
    return _contract(lifter, b, second, a, first, result)


#: Products by PyTorch's names.
CONTRACTIONS: dict[str, Handler] = {
    "matmul": matmul, "rmatmul": lambda lifter, x, other: matmul(lifter, other, x), "mm": matmul, "bmm": _bmm,
    "addmm": _addmm, "baddbmm": _baddbmm, "inner": _inner, "einsum": _einsum, "tensordot": _tensordot,
}  # fmt: skip


def _from_the_right(lifter: Lifting, x: Value, constant: Tensor) -> Value | None:
    """x W, or x w with a vector: a linear layer on the last axis."""
    rank = len(lifter.shape(x))
    if rank < 2 or constant.dim() > max(rank, 2) or not _is_floating(lifter, x, constant):
        return None
    if constant.dim() == 1:
        y = lifter.emit(Conv(constant[None]), x)
        return lifter.emit(Structural(torch.squeeze, (Slot(0), -1)), y)
    matrix = _without_leading_ones(constant)
    return None if matrix is None else lifter.emit(Conv(matrix.T), x)


def _from_the_left(lifter: Lifting, constant: Tensor, x: Value) -> Value | None:
    """W x for [N, C, L]: a convolution with one tap. W x^T for [N, C] is (x W^T)^T: a linear layer, transposed."""
    matrix = _without_leading_ones(constant)
    before = _transposed(lifter, x)
    if before is not None and matrix is not None and constant.dim() == 2 and _is_floating(lifter, x, constant):
        return lifter.emit(Structural(torch.transpose, (Slot(0), 0, 1)), lifter.emit(Conv(matrix), before))
    if matrix is None or len(lifter.shape(x)) != 3 or constant.dim() > 3 or not _is_floating(lifter, x, constant):
        return None
    return lifter.emit(Conv(matrix[:, :, None]), x)


def _transposed(lifter: Lifting, x: Value) -> Value | None:
    """The matrix of which ``x`` is the transpose."""
    if len(lifter.shape(x)) != 2 or not inverts(x.op, Structural(torch.transpose, (Slot(0), 0, 1)), 2):
        return None
    return x.inputs[0] if x.inputs[0] in lifter.real else None


def _contract(
    lifter: Lifting, x: Value, axes: list[str], constant: Tensor, labels: list[str], result: list[str]
) -> Value | None:
    """x with the axes ``axes`` times a constant with the axes ``labels``, summed to the axes ``result``."""
    if any(len(set(each)) < len(each) for each in (axes, labels, result)):
        return None
    shared = [label for label in labels if label in axes]
    if len(shared) != 1 or len(labels) > 2:
        return None
    (channel,) = shared
    position = axes.index(channel)
    behind = len(axes) - 1 - position
    made = [label for label in labels if label != channel]
    if channel in result:
        made = [channel] if len(labels) == 1 else []  # a constant with a further axis is an outer product
        if not made:
            return None
    arranged = [*axes[:position], *made, *axes[position + 1 :]]
    if position == 0 or sorted(arranged) != sorted(result):
        return None
    length = constant.shape[labels.index(channel)]
    if length != lifter.shape(x)[position] or length == 1:  # a length of one broadcasts at other sizes
        return None
    if channel in result:
        y = lifter.emit(Scale(constant, constant.new_zeros(1), behind), x)
    elif behind > 3 or (behind and position != 1):  # no convolution has two batch axes
        return None
    else:
        matrix = constant.reshape(1, -1) if not made else constant if labels[1] == channel else constant.T
        y = lifter.emit(Conv(matrix.reshape(*matrix.shape, *[1] * behind)), x)
        if not made:
            y = lifter.emit(Structural(torch.squeeze, (Slot(0), position)), y)
    if arranged == result:
        return y
    return lifter.emit(Structural(torch.permute, (Slot(0), tuple(arranged.index(label) for label in result))), y)


def _parsed(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]] | None:
    """The labels of the operands and of the result, with numbers for the axes that ``...`` stands for."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        return None
    hidden = [
        rank - len(term.replace("...", "")) if "..." in term else 0 for term, rank in zip(terms, ranks, strict=True)
    ]
    rest = [str(index) for index in range(max(hidden))]

    def axes(term: str, count: int) -> list[str]:
        before, dots, after = term.partition("...")
        return [*before, *(rest[len(rest) - count :] if dots else []), *after]

    operands = [axes(term, count) for term, count in zip(terms, hidden, strict=True)]
    if any(len(labels) != rank for labels, rank in zip(operands, ranks, strict=True)):
        return None
    if arrow:
        return operands, axes(right, len(rest))
    letters = [label for labels in operands for label in labels if label not in rest]
    return operands, [*rest, *sorted(label for label in letters if letters.count(label) == 1)]


def _is_bias(constant: Any, conv: Conv, rank: int) -> bool:
    """One number per output channel of a linear layer?"""
    if not isinstance(constant, Tensor) or constant.dim() > rank or constant.numel() != conv.out_channels:
        return False
    return tuple(constant.shape[-1:]) == (conv.out_channels,)


def _constant(lifter: Lifting, operand: Any, beside: Value) -> Tensor | None:
    """A constant operand, also one that is expanded to the batch of the value ``beside`` it."""
    if isinstance(operand, Tensor):
        return operand
    if not isinstance(operand, Value) or not isinstance(operand.op, Opaque):
        return None
    op = operand.op
    tensor = op.args[0] if op.args else None
    if op.name != "expand" or not isinstance(tensor, Tensor) or tensor.dim() < 2:
        return None
    matrix, shape = _without_leading_ones(tensor), lifter.shape(operand)
    if matrix is None or shape[1:] != tuple(matrix.shape) or shape[0] != lifter.shape(beside)[0]:
        return None
    return matrix if all(measures(size, beside, 0) for size in operand.inputs) else None


def _without_leading_ones(constant: Tensor) -> Tensor | None:
    if constant.dim() < 2 or any(n != 1 for n in constant.shape[:-2]):
        return None
    return constant.reshape(constant.shape[-2:])


def _one_of_equal(operand: Any) -> Any:
    """A constant [B, ...] that is the same for each sample of a batch product, as [1, ...]."""
    if not isinstance(operand, Tensor) or operand.dim() != 3 or not bool((operand == operand[:1]).all()):
        return operand
    return operand[:1]


def _is_floating(lifter: Lifting, *operands: Any) -> bool:
    reals = [lifter.real.get(each) if isinstance(each, Value) else each for each in operands]
    return all(isinstance(real, Tensor) and real.is_floating_point() for real in reals)
