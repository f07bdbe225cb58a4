"""Which program shows somebody what a pass does to a model? One that needs rgc, torch and the file of the pass."""

from __future__ import annotations

import builtins
import re
import textwrap
from collections.abc import Sequence

import torch
from torch import fx, nn

from rgc.constructors import constructor


def program(
    comment: str,
    model: nn.Module,
    shape: Sequence[int],
    *,
    name: str,
    file: str | None,
    passes: Sequence[str] = (),
    objective: str = "latency",
    fixed_size: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> str:
    """A program that compiles ``model`` with the pass ``name`` of ``file``; "" for a model that cannot be written down.

    ``passes`` are names of others beside it; ``comment`` says what the program shows.
    """
    written = source_of(model)
    if written is None:
        return ""
    chosen = ", ".join([*map(repr, passes), name])
    compiling = (
        f"rgc.compile(model, x, passes=[{chosen}], objective={objective!r})"
        if not fixed_size
        else f"compile_with(model, example_of(model, x), Options([{chosen}], {objective!r}, fixed_size=True))"
    )
    return "\n".join([
        *textwrap.wrap(comment, 110, initial_indent="# ", subsequent_indent="# "),
        "import torch",
        "from torch import nn",
        "",
        "import rgc",
        *(["from rgc.compiler import Options, compile_with, example_of"] if fixed_size else []),
        *(["from rgc.passbook import load_passes"] if file else []),
        "from rgc.testing import randomize",
        "",
        *([f"{name} = next(each for each in load_passes({file!r}) if each.name == {name!r})", ""] if file else []),
        "",
        written,
        "",
        "",
        f"torch.manual_seed({seed})",
        f"model = randomize(Model(), {seed}).to({dtype})",
        f"x = torch.randn({', '.join(map(str, shape))}, dtype={dtype})",
        f"compiled = {compiling}",
        "print(compiled.report.rewrites, compiled.report.refusals, compiled.report.failures, sep='\\n')",
        "torch.testing.assert_close(compiled(x), model(x))",
    ]) + "\n"  # fmt: skip


def source_of(model: nn.Module) -> str | None:
    """The source code of a class ``Model`` that is like ``model`` but for its weights.

    None where symbolic tracing does not take the model, or where it has layers that are none of torch.nn.
    """
    try:
        traced = fx.symbolic_trace(model)
    except Exception:  # what forward does with a value that is none may end in any way
        return None
    made: dict[str, str] = {}
    for node in traced.graph.nodes:
        node.type = None
        if node.op not in ("call_module", "get_attr"):
            continue
        text = _made(traced, node)
        if text is None:
            return None
        node.target = f"m_{node.target.replace('.', '_')}"
        made[node.target] = text
    code = traced.graph.python_code("self")
    used = {name: value for name, value in code.globals.items() if re.search(rf"\b{name}\b", code.src)}
    others = {name: value for name, value in used.items() if name != "torch" and name not in vars(builtins)}
    if not all(hasattr(value, "__module__") and hasattr(value, "__name__") for value in others.values()):
        return None
    body = "\n".join(line for line in re.sub(r";  .+ = None", "", code.src).splitlines() if line.strip())
    imports = "\n".join(f"from {value.__module__} import {value.__name__} as {name}" for name, value in others.items())
    layers = "\n".join(f"self.{name} = {text}" for name, text in made.items())
    return "\n".join([
        *([imports, "", ""] if imports else []),
        "class Model(nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
        *([textwrap.indent(layers, 8 * " ")] if layers else []),
        "",
        textwrap.indent(body, 4 * " "),
    ])  # fmt: skip


def _made(traced: fx.GraphModule, node: fx.Node) -> str | None:
    """What makes the layer, parameter or buffer that a node of the trace names."""
    assert isinstance(node.target, str)
    if node.op == "call_module":
        return constructor(traced.get_submodule(node.target))
    owner, _, attribute = node.target.rpartition(".")
    tensor = getattr(traced.get_submodule(owner), attribute)
    if not isinstance(tensor, torch.Tensor):
        return None
    text = f"torch.randn({', '.join(map(str, tensor.shape)) or '()'})"
    return f"nn.Parameter({text})" if isinstance(tensor, nn.Parameter) else text


__all__ = ["program", "source_of"]
