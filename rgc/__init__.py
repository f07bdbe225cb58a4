"""rgc: a graph-rewriting compiler that makes trained PyTorch models smaller without changing what they compute.

>>> import torch, rgc
>>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 4, 3)).eval()
>>> rgc.compile(model, torch.randn(1, 3, 16, 16)).report.ops_after
Counter({'Conv2d': 1})
"""

from rgc import models, nn, testing
from rgc.algebra import Conv, Deferred, Linear, Scale, add, border, compose, unit
from rgc.compiler import CompiledModule, Plan, compile
from rgc.errors import GraphError, InputError, NotEquivalentError, Refusal, RgcError, TraceError, require
from rgc.explainer import explain
from rgc.explanation import Explanation
from rgc.ir import Graph, Operator, Origin, TensorType, Value
from rgc.operators import (
    Activation,
    Add,
    AvgPool,
    BatchNorm,
    Concat,
    Constant,
    Flatten,
    Identity,
    Multiply,
    Opaque,
    Structural,
    Unflatten,
)
from rgc.region import Join, Region
from rgc.report import Firing, Refused, Report, Verification
from rgc.rewrite import GraphPass, Rewrite, graph_pass, rewrite
from rgc.saving import load, save
from rgc.verify import verify

from rgc import passes  # isort: skip  # the built-in passes use only the public names above

__version__ = "0.1.0"

__all__ = [
    "Activation", "Add", "AvgPool", "BatchNorm", "CompiledModule", "Concat", "Constant", "Conv", "Deferred",
    "Explanation", "Firing", "Flatten", "Graph", "GraphError", "GraphPass", "Identity", "InputError", "Join", "Linear",
    "Multiply", "NotEquivalentError", "Opaque", "Operator", "Origin", "Plan", "Refusal", "Refused", "Region", "Report",
    "Rewrite", "RgcError", "Scale", "Structural", "TensorType", "TraceError", "Unflatten", "Value", "Verification",
    "add", "border", "compile", "compose", "explain", "graph_pass", "load", "models", "nn", "passes", "require",
    "rewrite", "save", "testing", "unit", "verify",
]  # fmt: skip
