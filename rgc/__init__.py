"""rgc: a graph-rewriting compiler that makes trained PyTorch models smaller without changing what they compute.

>>> import torch, rgc
>>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 4, 3)).eval()
>>> rgc.compile(model, torch.randn(1, 3, 16, 16)).report.ops_after
Counter({'Conv2d': 1})
"""

from rgc import models, nn, testing
from rgc.algebra import Conv, Deferred, Linear, Scale, add, border, compose, unit
from rgc.attribution import Attribution
from rgc.compiler import CompiledModule, Plan, bisect, compile, error_bound
from rgc.errors import GraphError, InputError, NotEquivalentError, Refusal, RgcError, TraceError, require
from rgc.expansion import expand
from rgc.explainer import explain
from rgc.explanation import Explanation
from rgc.ir import Graph, Operator, Origin, TensorType, Value
from rgc.limits import Limits
from rgc.measurement import Measurement, bench
from rgc.operators import (
    Activation,
    AdaptiveMaxPool,
    Add,
    AvgPool,
    BatchNorm,
    ChannelMean,
    Clamp,
    Concat,
    Constant,
    Flatten,
    Identity,
    MaxPool,
    Multiply,
    Normalize,
    Opaque,
    Structural,
    Unflatten,
    Upsample,
    average_pool_at,
    is_adaptive_average,
)
from rgc.ranges import Interval, range_of
from rgc.rearrange import (
    Assign,
    BorderFill,
    Gather,
    Pad,
    PixelShuffle,
    PixelUnshuffle,
    Rearrangement,
    Subsample,
)
from rgc.recalibration import recalibrate
from rgc.region import Join, Region
from rgc.report import ErrorBound, Firing, OutputBound, Refused, Report, Verification
from rgc.rewrite import GraphPass, Rewrite, graph_pass, rewrite
from rgc.saving import load, save
from rgc.sparsity import block_diagonal, regroup_by_sparsity
from rgc.specialization import specialize
from rgc.tail import AxisSums, Tail, averaged, tail_of
from rgc.verify import verify
from rgc.views import (
    carried_axis,
    carrying_axis,
    inverts,
    is_permutation,
    is_reshape,
    relocated,
    takes_shape_of_another,
)

from rgc import passes  # isort: skip  # the built-in passes use only the public names above

__version__ = "0.1.0"

__all__ = [
    "Activation", "AdaptiveMaxPool", "Add", "Assign", "Attribution", "AvgPool", "AxisSums", "BatchNorm",
    "BorderFill", "ChannelMean", "Clamp", "CompiledModule", "Concat", "Constant", "Conv", "Deferred", "ErrorBound",
    "Explanation", "Firing", "Flatten", "Gather", "Graph", "GraphError", "GraphPass", "Identity", "InputError",
    "Interval", "Join", "Limits", "Linear", "MaxPool", "Measurement", "Multiply", "Normalize", "NotEquivalentError",
    "Opaque", "Operator", "Origin", "OutputBound", "Pad", "PixelShuffle", "PixelUnshuffle", "Plan", "Rearrangement",
    "Refusal", "Refused", "Region", "Report", "Rewrite", "RgcError", "Scale", "Structural", "Subsample", "Tail",
    "TensorType", "TraceError", "Unflatten", "Upsample", "Value", "Verification", "add", "average_pool_at",
    "averaged", "bench", "bisect", "block_diagonal", "border", "carried_axis", "carrying_axis", "compile",
    "compose", "error_bound", "expand", "explain", "graph_pass", "inverts", "is_adaptive_average", "is_permutation",
    "is_reshape", "load", "models", "nn", "passes", "range_of", "recalibrate", "regroup_by_sparsity", "relocated",
    "require", "rewrite", "save", "specialize", "tail_of", "takes_shape_of_another", "testing", "unit", "verify",
]  # fmt: skip
