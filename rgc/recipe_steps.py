"""Which layers and calls may a random model consist of? Every operator of the vocabulary, in all its spellings.

A maker draws one call of a value of a given shape [N, C, ...]: the code of a `Step` and the constructor of its layer.
What a maker draws need not run (a kernel may be larger than what is left of the input): who asks tries it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rgc.recipe import Shape

Option = TypeVar("Option")


@dataclass(frozen=True)
class Chooser:
    """Draws: ``number(low, high)`` is the one source of chance, and the smaller the simpler."""

    number: Callable[[int, int], int]

    def pick(self, options: Sequence[Option]) -> Option:
        """One of the options; the first is the simplest."""
        return options[self.number(0, len(options) - 1)]

    def flag(self) -> bool:
        """True or False; False is simpler."""
        return bool(self.number(0, 1))

    def numbers(self, low: int, high: int, count: int) -> tuple[int, ...]:
        """``count`` numbers, all the same or each its own."""
        first = self.number(low, high)
        return (first,) * count if not self.flag() else tuple(self.number(low, high) for _ in range(count))


@dataclass(frozen=True)
class Made:
    """What a maker drew: an expression, or whole lines that assign to ``{y0}``; and the constructor of its layer."""

    code: str
    layer: str | None = None
    results: int = 1


Maker = Callable[[Chooser, Shape], Made]


def makers(shape: Shape) -> list[Maker]:
    """What can follow a value of this shape, the frequent ones several times."""
    spatial = len(shape) - 2
    found = [*ANY_SHAPE]
    if spatial in (1, 2, 3):
        found += [*IMAGES, *(CONVOLUTIONS * 3)]
    if spatial == 2:
        found += PLANE
    if spatial == 0:
        found += VECTORS
    return found


# --- linear layers ----------------------------------------------------------------------------------------------


def convolution(choose: Chooser, shape: Shape) -> Made:
    rank, channels = len(shape) - 2, shape[1]
    kernel = choose.numbers(1, 3, rank)
    groups = choose.pick([1, 1, 1, channels, *(g for g in (2, 3, 4) if channels % g == 0)])
    out = choose.pick(
        [channels, groups, 2 * groups, 4 if 4 % groups == 0 else groups, 6 if 6 % groups == 0 else groups]
    )
    mode = choose.pick(["zeros"] * 5 + ["reflect", "replicate", "circular"])
    options = _options(
        stride=(choose.pick([1, 1, 1, 2, 3]), 1),
        padding=(_padding(choose, kernel), 0),
        dilation=(choose.pick([1, 1, 1, 1, 2]), 1),
        groups=(groups, 1),
        bias=(not choose.flag(), True),
        padding_mode=(mode, "zeros"),
    )
    return Made("{m}({0})", f"nn.Conv{rank}d({channels}, {out}, {kernel}{options})")


def same_convolution(choose: Chooser, shape: Shape) -> Made:
    """Of the size that came in: what a residual or a branch needs."""
    rank, channels = len(shape) - 2, shape[1]
    k = choose.pick([1, 3, 3])
    padding = choose.pick([k // 2, k // 2, "'same'"])
    groups = choose.pick([1, 1, 1, channels])
    bias = "" if choose.flag() else ", bias=False"
    return Made("{m}({0})", f"nn.Conv{rank}d({channels}, {channels}, {k}, padding={padding}, groups={groups}{bias})")


def pointwise_convolution(choose: Chooser, shape: Shape) -> Made:
    out = choose.pick([shape[1], 2, 4, 8, 1])
    return Made("{m}({0})", f"nn.Conv{len(shape) - 2}d({shape[1]}, {out}, 1)")


def functional_convolution(choose: Chooser, shape: Shape) -> Made:
    rank = len(shape) - 2
    size = (choose.pick([shape[1], 3, 4]), shape[1], *choose.numbers(1, 3, rank))
    weight = choose.pick(["{m}", "{m} * 0.5", "{m} / {m}.norm()"])
    padding = choose.pick([0, 1, 2])
    return Made(f"F.conv{rank}d({{0}}, {weight}, padding={padding})", f"nn.Parameter(torch.randn{size} * 0.5)")


def transposed_convolution(choose: Chooser, shape: Shape) -> Made:
    rank, channels = len(shape) - 2, shape[1]
    stride = choose.pick([2, 1, 3])
    groups = choose.pick([1, 1, channels, *(g for g in (2,) if channels % g == 0)])
    out = groups * choose.pick([1, 2, 3])
    options = _options(
        stride=(stride, 1),
        padding=(choose.number(0, 1), 0),
        output_padding=(choose.number(0, 1) if stride > 1 else 0, 0),
        groups=(groups, 1),
        bias=(not choose.flag(), True),
        dilation=(choose.pick([1, 1, 2]), 1),
    )
    return Made("{m}({0})", f"nn.ConvTranspose{rank}d({channels}, {out}, {choose.numbers(1, 3, rank)}{options})")


def linear(choose: Chooser, shape: Shape) -> Made:
    bias = "" if choose.flag() else ", bias=False"
    return Made("{m}({0})", f"nn.Linear({shape[-1]}, {choose.pick([4, shape[-1], 3, 6])}{bias})")


def product(choose: Chooser, shape: Shape) -> Made:
    """A product with a constant matrix, in one of its spellings."""
    rows, columns = choose.pick([4, 3, 5]), shape[-1]
    last = "abc"[: len(shape) - 2]
    matrix = f"nn.Parameter(torch.randn({columns}, {rows}) * 0.4)"
    channels = f"nn.Parameter(torch.randn({rows}, {shape[1]}) * 0.4)"
    spellings = [
        Made("{0} @ {m}", matrix),
        Made("torch.matmul({0}, {m})", matrix),
        Made("F.linear({0}, {m}.t())", matrix),
        Made("torch.tensordot({0}, {m}, dims=1)", matrix),
        Made(f"torch.einsum('nk{last},ok->no{last}', {{0}}, {{m}})", channels),
    ]
    if len(shape) == 2:
        spellings += [Made("torch.addmm({m}[0], {0}, {m})", matrix), Made("({m}.t() @ {0}.t()).t()", matrix)]
    if len(shape) == 3:
        spellings += [Made("{m} @ {0}", channels), Made("torch.einsum('nkl,lo->nko', {0}, {m})", matrix)]
    return choose.pick(spellings)


# --- norms and scales ---------------------------------------------------------------------------------------------


def batch_norm(choose: Chooser, shape: Shape) -> Made:
    eps, affine = choose.pick([1e-5, 1e-3, 0.1]), "" if choose.pick([True, True, False]) else ", affine=False"
    return Made("{m}({0})", f"nn.BatchNorm{max(len(shape) - 2, 1)}d({shape[1]}, eps={eps}{affine})")


def sample_norm(choose: Chooser, shape: Shape) -> Made:
    rank, channels, last = len(shape) - 2, shape[1], shape[-1]
    kinds = [
        f"nn.LayerNorm({last})",
        f"nn.GroupNorm({choose.pick([1, *(g for g in (2, 3) if channels % g == 0)])}, {channels})",
        f"nn.RMSNorm({last}, eps=1e-3)",
        f"nn.LayerNorm({list(shape[1:])})",
        f"nn.LayerNorm({last}, bias=False)",
        f"nn.LayerNorm({last}, elementwise_affine=False)",
    ]
    if rank:
        kinds += [
            f"nn.InstanceNorm{rank}d({channels})",
            f"nn.InstanceNorm{rank}d({channels}, affine=True)",
            f"nn.InstanceNorm{rank}d({channels}, affine=True, track_running_stats=True)",
        ]
    if choose.number(0, 4) == 4:
        return Made(f"F.layer_norm({{0}}, ({last},), eps=1e-3)")
    return Made("{m}({0})", choose.pick(kinds))


def scale(choose: Chooser, shape: Shape) -> Made:
    """A factor or an offset: a number, one per channel, one per position, or one frozen."""
    ones = [1] * (len(shape) - 2)
    number = choose.pick([2.0, 0.5, -1.0, 0.0, 1.0])
    constant = choose.pick([
        f"nn.Parameter(torch.ones({shape[1]}, {', '.join(map(str, ones))}))" if ones
        else f"nn.Parameter(torch.ones({shape[1]}))",
        "nn.Parameter(torch.tensor(0.7))",
        f"{number}",
        f"nn.Parameter(torch.tensor({number}), requires_grad=False)",
        f"nn.Buffer(torch.randn({(1, shape[1], *ones)}))",
        f"nn.Parameter(torch.ones({shape[-1]}))",
        f"nn.Buffer(torch.randn({shape[1:]}))",
    ])  # fmt: skip
    code = choose.pick([
        "{0} * {m}", "{0} + {m}", "{0} - {m}", "{m} - {0}", "{m} * {0}", "-{0}", "{0} / 2.5", "{0} * {m} + {0}",
        "{0} * {m} + {m}", "torch.add({0}, {m}, alpha=2)", "torch.mul({0}, {m})", "torch.sub({0}, {m})",
        "{0} - {0} * {m}", "torch.lerp({0}, {0} * {m}, 0.25)",
        "torch.addcmul({0}, {0}, {m} * torch.ones(()), value=0.5)",
        "{0}.add({m}).mul(0.5)", "torch.neg({0})", "{0} - 1", "1 - {0}",
    ])  # fmt: skip
    return Made(code, constant if "{m}" in code else None)


# --- activations --------------------------------------------------------------------------------------------------

_MODULES = (
    "nn.ReLU()", "nn.ReLU(inplace=True)", "nn.GELU()", "nn.SiLU()", "nn.LeakyReLU(0.1)", "nn.LeakyReLU(1.0)",
    "nn.Hardswish()", "nn.ReLU6()", "nn.Sigmoid()", "nn.Tanh()", "nn.ELU(0.7)", "nn.CELU()", "nn.SELU()", "nn.Mish()",
    "nn.Hardsigmoid()", "nn.Hardtanh(-0.5, 2.0)", "nn.Softplus()", "nn.LogSigmoid()", "nn.Softsign()",
    "nn.Tanhshrink()", "nn.PReLU()", "nn.PReLU(init=1.0)", "nn.SiLU(inplace=True)", "nn.LeakyReLU(0.2, inplace=True)",
    "nn.GELU(approximate='tanh')", "nn.Softmax(dim=1)", "nn.Hardswish(inplace=True)", "nn.GLU(dim=1)",
)  # fmt: skip

_CALLS = (
    "F.relu({0})", "torch.relu({0})", "{0}.relu()", "F.relu({0}, inplace=True)", "F.gelu({0})", "torch.sigmoid({0})",
    "{0}.sigmoid()", "F.leaky_relu({0}, 0.3)", "torch.clamp({0}, min=0)", "{0}.clamp(-1, 1)", "torch.abs({0})",
    "{0}.square()", "{0} ** 2", "torch.tanh({0})", "F.silu({0})", "torch.sqrt({0}.abs() + 1)", "F.softmax({0}, -1)",
    "F.log_softmax({0}, dim=1)", "torch.exp(-{0}.abs())", "{0} * torch.sigmoid({0})", "F.relu6({0} + 3) / 6 * {0}",
    "F.elu({0})", "{0}.clamp(min=-0.5)", "torch.relu_({0})", "F.hardtanh({0}, 0.0, 1.0)", "F.softplus({0})",
    "torch.clamp(torch.sigmoid({0}), 0, 1)", "F.relu(F.relu({0}))", "F.normalize({0}, dim=1)",
)  # fmt: skip


def activation(choose: Chooser, shape: Shape) -> Made:
    if choose.flag():
        return Made(choose.pick(_CALLS))
    return Made("{m}({0})", choose.pick([*_MODULES, f"nn.PReLU({shape[1]})"]))


def clamp(choose: Chooser, shape: Shape) -> Made:
    """Bounds of each channel's own, on one side or on both."""
    code = choose.pick([
        "torch.clamp({0}, {m}, {m} + 1)", "torch.maximum({0}, {m})", "torch.minimum({m}, {0})", "{0}.clamp(min={m})",
        "torch.clamp({0}, max={m})", "{0}.clamp({m}, 1.5)",
    ])  # fmt: skip
    return Made(code, f"nn.Buffer(torch.randn{(shape[1], *[1] * (len(shape) - 2))})")


def decayed_activation(choose: Chooser, shape: Shape) -> Made:
    """lambda x + (1 - lambda) f(x): linear where lambda has reached 1."""
    kept = choose.pick([1.0, 0.0, 0.5])
    constant = choose.pick([f"{kept}", f"nn.Parameter(torch.tensor({kept}), requires_grad=False)"])
    function = choose.pick(["F.relu({0})", "F.gelu({0})", "F.relu({0}, inplace=True)", "torch.tanh({0})"])
    code = choose.pick([f"{{m}} * {{0}} + (1 - {{m}}) * {function}", f"(1 - {{m}}) * {function} + {{m}} * {{0}}"])
    return Made(code, constant)


def leaves_as_it_is(choose: Chooser, shape: Shape) -> Made:
    calls = ("F.dropout({0}, 0.3, training=False)", "{0}.contiguous()", "{0}.clone()", "{0}.to({0}.dtype)",
             "{0} * 1", "{0} + 0", "{0}.view_as({0})")  # fmt: skip
    modules = (
        "nn.Identity()",
        "nn.Dropout(0.5)",
        f"nn.Dropout{max(len(shape) - 2, 1)}d(0.2)",
        "nn.AlphaDropout()",
        "nn.Sequential()",
    )
    chosen = choose.pick([*modules, *calls])
    return Made(chosen) if chosen in calls else Made("{m}({0})", chosen)


def repeated(choose: Chooser, shape: Shape) -> Made:
    """Layers in a container, one of them there twice."""
    rank, channels = len(shape) - 2, shape[1]
    norm = f"nn.BatchNorm{max(rank, 1)}d({channels})"
    layer = f"nn.Conv{rank}d({channels}, {channels}, 3, padding=1)" if rank in (1, 2, 3) else norm
    return Made("{m}({0})", choose.pick([
        f"nn.Sequential(*[{layer}] * 2)", f"nn.Sequential({layer}, {norm}, nn.ReLU())",
        f"nn.Sequential(*[nn.Sequential({layer}, {norm})] * 2)", f"nn.Sequential(*[{norm}, nn.ReLU()] * 2)",
    ]))  # fmt: skip


# --- pooling and resampling ---------------------------------------------------------------------------------------


def average_pool(choose: Chooser, shape: Shape) -> Made:
    rank = len(shape) - 2
    kernel = choose.number(1, 3)
    options = _options(
        stride=(choose.pick([kernel, 1, 2, 3]), kernel),
        padding=(choose.number(0, kernel // 2), 0),
        ceil_mode=(choose.flag(), False),
        count_include_pad=(not choose.flag(), True),
    )
    divisor = ", divisor_override=3" if rank > 1 and choose.number(0, 4) == 4 else ""
    if choose.number(0, 3) == 3:
        return Made(f"F.avg_pool{rank}d({{0}}, {kernel}{options}{divisor})")
    return Made("{m}({0})", f"nn.AvgPool{rank}d({kernel}{options}{divisor})")


def max_pool(choose: Chooser, shape: Shape) -> Made:
    rank = len(shape) - 2
    kernel = choose.number(1, 3)
    options = _options(
        stride=(choose.pick([kernel, 1, 2]), kernel),
        padding=(choose.number(0, kernel // 2), 0),
        dilation=(choose.pick([1, 1, 2]), 1),
        ceil_mode=(choose.flag(), False),
    )
    return Made("{m}({0})", f"nn.MaxPool{rank}d({kernel}{options})")


def adaptive_pool(choose: Chooser, shape: Shape) -> Made:
    rank, kind = len(shape) - 2, choose.pick(["Avg", "Max"])
    size = choose.pick(["1", "2", "3", f"({', '.join(['2'] * (rank - 1) + ['None'])},)"])
    return Made("{m}({0})", f"nn.Adaptive{kind}Pool{rank}d({size})")


def mean(choose: Chooser, shape: Shape) -> Made:
    axes = tuple(range(2, len(shape)))
    return Made(choose.pick([
        f"{{0}}.mean({axes})", f"{{0}}.mean({axes}, keepdim=True)", "{0}.mean(1, keepdim=True)", "{0}.mean(-1)",
        "{0}.sum(-1, keepdim=True)", "torch.mean({0}, dim=1)", "{0}.amax(-1, keepdim=True)", "{0}.flatten(2).mean(2)",
    ]))  # fmt: skip


def upsample(choose: Chooser, shape: Shape) -> Made:
    rank = len(shape) - 2
    smooth = {1: "linear", 2: choose.pick(["bilinear", "bicubic"]), 3: "trilinear"}[rank]
    factor = choose.pick(["2", "2.0", "1.5"])
    return choose.pick([
        Made("{m}({0})", f"nn.Upsample(scale_factor={factor})"),
        Made("{m}({0})", f"nn.Upsample(scale_factor={factor}, mode={smooth!r}, align_corners={choose.flag()})"),
        Made(f"F.interpolate({{0}}, scale_factor=2, mode={smooth!r})"),
        Made(f"F.interpolate({{0}}, size={tuple(n + 1 for n in shape[2:])})"),
        Made("F.interpolate({0}, scale_factor=0.5)"),
        Made("F.interpolate({0}, scale_factor=2, mode='nearest-exact')"),
    ])  # fmt: skip


def pad(choose: Chooser, shape: Shape) -> Made:
    rank = len(shape) - 2
    axes = choose.number(1, rank)
    amounts = [choose.pick([1, 0, 2, -1]) for _ in range(2 * axes)]
    whole = choose.numbers(0, 2, 2 * rank)
    return choose.pick([
        Made(f"F.pad({{0}}, {amounts})"),
        Made(f"F.pad({{0}}, {amounts}, value={choose.pick([0.5, -1.0, 0.0])})"),
        Made(f"F.pad({{0}}, {whole}, mode={choose.pick(['reflect', 'replicate', 'circular'])!r})"),
        Made("{m}({0})", f"nn.ZeroPad{rank}d({whole})"),
        Made("{m}({0})", f"nn.{choose.pick(['Reflection', 'Replication', 'Circular'])}Pad{rank}d({whole})"),
        Made("{m}({0})", f"nn.ConstantPad{rank}d({whole}, 0.5)"),
    ])  # fmt: skip


# --- views and rearrangements -------------------------------------------------------------------------------------


def view(choose: Chooser, shape: Shape) -> Made:
    spatial, rest = len(shape) - 2, ", ".join(map(str, shape[1:]))
    calls = ["{0}.flatten(1)", "torch.flatten({0}, 1)", "{0}.view({0}.size(0), -1)", "{0}.reshape({0}.shape[0], -1)",
             f"{{0}}.reshape(-1, {rest})", "{0}.unsqueeze(2)", "{0}.transpose(1, -1)", "{0}.flip(-1)",
             "{0}.flip(1)", "torch.roll({0}, 1, -1)", "{0}.squeeze()[None]", "{0}.expand_as({0})",
             "{0}.repeat_interleave(2, 1)"]  # fmt: skip
    if spatial:
        back = (0, len(shape) - 1, *range(1, len(shape) - 1))
        calls += ["{0}.flatten(2)", "{0}.flatten(2).transpose(1, 2)", f"{{0}}.permute({back})", "{0}.transpose(1, 2)",
                  "{0}.movedim(1, -1)", "{0}.transpose(1, 2).contiguous()", "{0}.squeeze(-1)", "{0}[..., 0]",
                  "{0}.select(2, 0)", "{0}.flatten(2).flatten(1)"]  # fmt: skip
    if shape[1] % 2 == 0:
        calls += ["{0}.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)", "{0}.unflatten(1, (2, -1)).sum(1)",
                  "{0}.unflatten(1, (-1, 2))[:, :, 0]"]  # fmt: skip
    return Made(choose.pick(calls))


def piece(choose: Chooser, shape: Shape) -> Made:
    """A part of the channels or positions."""
    half = max(shape[1] // 2, 1)
    order = [choose.number(0, shape[1] - 1) for _ in range(choose.pick([shape[1], 2]))]
    calls = [
        "{0}[:, 1:]", "{0}[:, ::2]", f"{{0}}[:, :{half}]", f"{{0}}[:, {half}:]", "{0}[:, -1:]",
        f"{{0}}[:, {order}]", f"{{0}}.narrow(1, 0, {half})", "{0}[..., 1:]", "{0}[..., :-1]", "{0}[..., ::2]",
        "{0}[..., 1:-1]", f"{{0}}[:, [{shape[1] - 1}, 0]]", f"torch.index_select({{0}}, 1, torch.tensor({order}))",
    ]  # fmt: skip
    if len(shape) == 4:
        calls += ["{0}[:, :, 1::2, ::2]", "{0}[:, 1:, :, 1:]", "{0}[:, :, 1:-1, 1:-1]"]
    return Made(choose.pick(calls))


def pieces(choose: Chooser, shape: Shape) -> Made:
    """All parts of the channels, each a value."""
    channels = shape[1]
    half = max(channels // 2, 1)
    two = [f"torch.split({{0}}, [{half}, {channels - half}], 1)", "torch.tensor_split({0}, 2, 1)"]
    if channels % 2 == 0:
        two += ["{0}.chunk(2, 1)", f"torch.split({{0}}, {half}, dim=1)", "{0}.unflatten(1, (2, -1)).unbind(1)",
                "({0}[:, ::2], {0}[:, 1::2])"]  # fmt: skip
    return Made(f"{{y0}}, {{y1}} = {choose.pick(two)}", results=2)


def shuffle(choose: Chooser, shape: Shape) -> Made:
    groups = choose.pick([*(g for g in (2, 3, 4) if shape[1] % g == 0), 1])
    rest = "".join(f", {n}" for n in shape[2:])
    blocks = f"{{0}}.view({{0}}.shape[0], {groups}, {shape[1] // groups}{rest}).transpose(1, 2)"
    calls = [
        Made("{m}({0})", f"nn.ChannelShuffle({groups})"),
        Made(f"{blocks}.reshape({{0}}.shape[0], -1{rest})"),
        Made(f"{blocks}.flatten(1, 2)"),
    ]
    if shape[1] % 4 == 0:
        calls += [Made("{m}({0})", "nn.PixelShuffle(2)"), Made("F.pixel_shuffle({0}, 2)")]
    if all(n % 2 == 0 for n in shape[2:]):
        calls += [Made("{m}({0})", "nn.PixelUnshuffle(2)"), Made("F.pixel_unshuffle({0}, 2)")]
    return choose.pick(calls[::-1])


def space_to_depth(choose: Chooser, shape: Shape) -> Made:
    parts = ", ".join(f"{{0}}[..., {i}::2, {j}::2]" for j in range(2) for i in range(2))
    return Made(f"torch.cat([{parts}], 1)")


# --- in place -----------------------------------------------------------------------------------------------------


def in_place(choose: Chooser, shape: Shape) -> Made:
    """An overwritten value, by itself, by another name of it, or on a copy."""
    source = choose.pick(["{0} * 2", "{0}.clone()", "{0}", "F.relu({0})"])
    change = choose.pick([
        "{y0} += 1", "{y0} *= 0.5", "{y0}.mul_(2)", "{y0}.add_(1)", "{y0}.relu_()", "{y0}[:, :1] = 0.5", "{y0} -= {0}",
        "{y0}[..., :1] = 0", "{y0}[:, :1] += 1", "{y0}.clamp_(min=0)", "{y0} += {0}", "{y0}.sub_({0}, alpha=2)",
    ])  # fmt: skip
    return Made(f"{{y0}} = {source}\n{change}")


def border(choose: Chooser, shape: Shape) -> Made:
    """A padding that is overwritten, as by a block that pads a normalised input with the norm's image of zero."""
    value = choose.pick(["0.5", "{m}"])
    sides = ["[:, :, :1, :]", "[:, :, -1:, :]", "[:, :, :, :1]", "[:, :, :, -1:]"]
    lines = "\n".join(f"{{y0}}{side} = {value}" for side in sides[: choose.pick([4, 4, 2])])
    layer = f"nn.Buffer(torch.randn(1, {shape[1]}, 1, 1))" if value == "{m}" else None
    return Made(f"{{y0}} = F.pad({{0}}, (1, 1, 1, 1))\n{lines}", layer)


# --- layers that belong together --------------------------------------------------------------------------------


def unpadded_convolution(choose: Chooser, shape: Shape) -> Made:
    out, groups = choose.pick([shape[1], 4, 2]), choose.pick([1, 1, 2])
    fits = groups if shape[1] % groups == out % groups == 0 else 1
    kernel = choose.numbers(1, 3, len(shape) - 2)
    return Made("{m}({0})", f"nn.Conv{len(shape) - 2}d({shape[1]}, {out}, {kernel}, groups={fits})")


def widening_convolution(choose: Chooser, shape: Shape) -> Made:
    kernel, out = choose.pick([1, 3]), choose.pick([16, 4, 18])
    return Made("{m}({0})", f"nn.Conv{len(shape) - 2}d({shape[1]}, {out}, {kernel}, padding={kernel // 2})")


def pixel_shuffle(choose: Chooser, shape: Shape) -> Made:
    return Made("{m}({0})", f"nn.PixelShuffle({3 if shape[1] == 18 else 2})")


def plain_batch_norm(choose: Chooser, shape: Shape) -> Made:
    return Made("{m}({0})", f"nn.BatchNorm{max(len(shape) - 2, 1)}d({shape[1]}, affine=False)")


def rectifier(choose: Chooser, shape: Shape) -> Made:
    return Made(choose.pick(["F.relu({0})", "F.gelu({0})", "F.silu({0})", "F.leaky_relu({0}, 0.2)"]))


def tokens(choose: Chooser, shape: Shape) -> Made:
    return Made(choose.pick(["{0}.flatten(2).transpose(1, 2)", "{0}.movedim(1, -1)", "{0}.flatten(2).mT"]))


def channels_first(choose: Chooser, shape: Shape) -> Made:
    return Made(choose.pick(["{0}.movedim(-1, 1)", f"{{0}}.permute(0, {len(shape) - 1}, {_upto(len(shape) - 1)})"]))


def global_mean(choose: Chooser, shape: Shape) -> Made:
    axes = tuple(range(2, len(shape)))
    return choose.pick([
        Made("{m}({0}).flatten(1)", f"nn.AdaptiveAvgPool{len(axes)}d(1)"), Made(f"{{0}}.mean({axes})"),
        Made("{0}.flatten(2).mean(-1)"),
    ])  # fmt: skip


def _upto(axes: int) -> str:
    return ", ".join(map(str, range(1, axes)))


#: Makers in a row, for the rewrites whose patterns few draws of single layers make.
CHAINS: tuple[tuple[Maker, ...], ...] = (
    (same_convolution, rectifier, same_convolution),
    (same_convolution, rectifier, pointwise_convolution, rectifier, same_convolution),
    (unpadded_convolution, unpadded_convolution, unpadded_convolution),
    (convolution, batch_norm, convolution),
    (widening_convolution, pixel_shuffle, pointwise_convolution),
    (widening_convolution, pixel_shuffle, batch_norm),
    (convolution, max_pool, plain_batch_norm),
    (rectifier, plain_batch_norm, max_pool, unpadded_convolution),
    (pointwise_convolution, upsample, pointwise_convolution),
    (convolution, upsample, batch_norm),
    (pointwise_convolution, average_pool, convolution),
    (convolution, global_mean, linear),
    (batch_norm, global_mean, linear),
    (convolution, tokens, linear),
    (rectifier, tokens, linear, channels_first, convolution),
    (tokens, linear, sample_norm, linear),
    (batch_norm, view, linear),
    (convolution, pieces, same_convolution),
    (pad, convolution, scale),
    (transposed_convolution, batch_norm, pointwise_convolution),
    (linear, decayed_activation, linear),
    (leaves_as_it_is, activation, leaves_as_it_is),
)


# --- of two values ------------------------------------------------------------------------------------------------

#: Of two values of one shape.
PAIRS = (
    "{0} + {1}", "{0} + {1}", "torch.cat([{0}, {1}], 1)", "{0} - {1}", "{0} * {1}", "torch.add({0}, {1}, alpha=0.5)",
    "torch.stack([{0}, {1}]).sum(0)", "torch.cat(({0}, {1}), -1)", "{0} * torch.sigmoid({1})",
    "torch.stack([{0}, {1}], 1).mean(1)", "F.relu({0} + {1})", "{0} + {1} + {0}", "0.5 * {0} + 0.5 * {1}",
    "torch.maximum({0}, {1})", "{y0} = {0} + {1}\n{y0} += {1}", "{y0} = {0}\n{y0} += {1}", "torch.add({0}, {1})",
    "torch.sub({0}, {1}, alpha=2)", "sum([{0}, {1}, {0}])", "torch.cat([{0}, {1}, {0}], dim=1)",
    "torch.cat([{1}, {0}, {0}, {1}], dim=1)", "{0} - 0.5 * {1}",
)  # fmt: skip

#: Of two values of which the second may be broadcast.
BROADCAST = ("{0} + {1}", "{0} * {1}", "{0} * torch.sigmoid({1})", "{0} - {1}", "{1} + {0}", "{1} - {0}")

ANY_SHAPE: list[Maker] = [
    linear, scale, scale, batch_norm, activation, activation, decayed_activation, leaves_as_it_is, view, view, piece,
    pieces, in_place, sample_norm, product, clamp, repeated,
]  # fmt: skip
VECTORS: list[Maker] = [linear, linear, batch_norm]
CONVOLUTIONS: list[Maker] = [convolution, same_convolution, pointwise_convolution]
IMAGES: list[Maker] = [
    functional_convolution, transposed_convolution, average_pool, max_pool, adaptive_pool, mean, upsample, pad,
    batch_norm, shuffle,
]  # fmt: skip
PLANE: list[Maker] = [border, shuffle, space_to_depth]


def _padding(choose: Chooser, kernel: tuple[int, ...]) -> int | tuple[int, ...] | str:
    options: list[int | tuple[int, ...] | str] = [0, 1, kernel[0] // 2, 2]
    return choose.pick([*options, tuple(k // 2 for k in kernel), tuple(k - 1 for k in kernel)])


def _options(**given: tuple[object, object]) -> str:
    """Arguments that are not at their default."""
    return "".join(f", {name}={value!r}" for name, (value, default) in given.items() if value != default)
