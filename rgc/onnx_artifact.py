"""How is a compiled model written to, and run from, an .onnx file?"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument
from torch.utils import _pytree as pytree

from rgc.errors import InputError
from rgc.exported_program import EXPORT_ERRORS, FreeProgram, export_program, quiet_export
from rgc.limits import machine_memory
from rgc.onnx_inspection import require_plain_onnx

if TYPE_CHECKING:  # onnx takes a second to import, and most uses of rgc never need it
    import onnx

PROTOBUF_LIMIT = 2**31 - 1  # bytes of one serialised message
STRUCTURE_ALLOWANCE = 2**24  # bytes left for everything that is not a weight


def write_onnx(
    module: nn.Module,
    path: Path,
    example_args: tuple[Any, ...],
    example_kwargs: Mapping[str, Any],
    *,
    free_sizes: bool,
    size_limit: int = PROTOBUF_LIMIT,
    data_name: str = "",
) -> FreeProgram:
    """Write ``module`` as ONNX: inputs named as in ``forward``, outputs ``output``, ``output_0``... or dictionary keys.

    Weights beyond ``size_limit`` bytes go beside the file, to ``data_name`` (by default ``<path>.data``). The model is
    simplified by onnxsim; where that fails or changes a result, the unsimplified model is written and the result's
    notes say so. Raises InputError if torch.onnx cannot express the model or onnxruntime cannot load it.
    """
    import onnx

    exported = export_program(module, example_args, example_kwargs, free_sizes=free_sizes)
    model = _convert(exported.program)
    _restore_input_names(model, exported.program)
    _name_dimensions(model, exported)
    _count_axes_from_the_front(model)
    _forget_sources(model)
    weight_bytes = sum(tensor.nbytes for tensor in module.state_dict().values())
    is_large = weight_bytes + min(STRUCTURE_ALLOWANCE, size_limit // 2) > size_limit
    notes = exported.notes
    if is_large:
        notes += (f"not simplified: {weight_bytes} bytes of weights are kept beside the model",)
    else:
        model, note = _simplify(model, example_args, example_kwargs)
        notes += (note,) if note else ()
    model.producer_name = "rgc"
    model.producer_version = ""
    if is_large:
        data = data_name or f"{path.name}.data"
        # onnxruntime wants shapes and axes, a few integers each, inside the model itself.
        onnx.save_model(model, path, save_as_external_data=True, location=data, size_threshold=256)
    else:
        onnx.save_model(model, path)
    OnnxModel(path)
    return FreeProgram(exported.program, exported.free_dimensions, notes)


class OnnxModel(nn.Module):
    """An ONNX file run by onnxruntime on the CPU: torch tensors in, a flat list of torch tensors out.

    Inputs: the tensors of the positional arguments in order (nested ones flattened), keywords by input name; values
    that are not tensors were fixed when the file was written and are ignored. Outputs: the tensors of the original
    result in the order of its flattened structure, dictionary values in order of insertion, without ``None`` entries;
    ``output_names`` names them.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """``threads``: how many it may use, by default as many as there are. Raises InputError if it cannot load it."""
        import onnxruntime

        super().__init__()
        require_plain_onnx(Path(path), machine_memory())
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # not to stderr: errors arrive as exceptions
        if threads is not None:
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # where it says that it tries the same again
                session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            self.input_names = tuple(entry.name for entry in session.get_inputs())
            self.output_names = tuple(entry.name for entry in session.get_outputs())
        except _runtime_errors() as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"onnxruntime cannot load {Path(path).name}: {reason}") from error
        self.path, self.session = path, session

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Raises InputError if the tensors do not match the model's inputs."""
        arrays = self.feeds(*args, **kwargs)
        try:
            results = self.session.run(None, arrays)
        except _runtime_errors() as error:
            reason = " ".join(str(error).split())
            raise InputError(f"onnxruntime cannot run the model on these inputs: {reason}") from error
        return [torch.from_numpy(array) for array in results]

    def feeds(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The call as onnxruntime takes it: an array for each input by name."""
        named = {name: value for name, value in kwargs.items() if name in self.input_names}
        rest = [value for name, value in kwargs.items() if name not in self.input_names]
        tensors = [leaf for leaf in pytree.tree_leaves((args, rest)) if isinstance(leaf, Tensor)]
        open_names = [name for name in self.input_names if name not in named]
        if len(tensors) != len(open_names):
            got = len(tensors) + len(named)
            raise InputError(f"the model has inputs {', '.join(self.input_names)}; got {got} tensors")
        feeds = {**dict(zip(open_names, tensors, strict=True)), **named}
        return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in feeds.items()}


def _runtime_errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises for a model or an input that it does not accept; `ValueError` for text not in UTF-8."""
    from onnxruntime.capi import onnxruntime_pybind11_state as kinds

    return (kinds.EPFail, kinds.Fail, kinds.InvalidArgument, kinds.InvalidGraph, kinds.InvalidProtobuf,
            kinds.NoSuchFile, kinds.NotImplemented, kinds.RuntimeException, RuntimeError, ValueError)  # fmt: skip


def weights_beside(path: Path) -> Path | None:
    """The file in the same folder that holds the weights of the ONNX file ``path``; None where there is none."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped,unused-ignore]  # it ships no types

    if not path.is_file():
        return None
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:
        return None
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
    names = {entry.value for entry in entries if entry.key == "location"}
    return next((path.with_name(name) for name in sorted(names) if name.startswith(f"{path.name}.data")), None)


def _convert(program: ExportedProgram) -> onnx.ModelProto:
    try:
        with quiet_export(), torch.no_grad():
            onnx_program = torch.onnx.export(
                program, (), dynamo=True, optimize=True, verbose=False, output_names=_output_names(program)
            )
    except EXPORT_ERRORS as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise InputError(f"torch.onnx cannot express the model: {reason}") from error
    assert onnx_program is not None
    return onnx_program.model_proto


def _output_names(program: ExportedProgram) -> list[str]:
    """One name for each tensor of the result: ``output``, ``output_0``..., or the path of dictionary keys to it."""
    spec = program.call_spec.out_spec
    assert spec is not None
    paths = [path for path, _ in pytree.tree_flatten_with_path(pytree.tree_unflatten(range(spec.num_leaves), spec))[0]]
    taken = set(program.graph_signature.user_inputs)
    names: list[str] = []
    for path, output in zip(paths, program.graph_signature.output_specs[-spec.num_leaves :], strict=True):
        if isinstance(output.arg, ConstantArgument):
            continue
        parts = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
        is_dictionary = len(path) > 0 and isinstance(path[0], pytree.MappingKey)
        name = "_".join(parts if is_dictionary else ["output", *parts])
        while name in taken:
            name = f"output_{name}"
        taken.add(name)
        names.append(name)
    return names


def _restore_input_names(model: onnx.ModelProto, program: ExportedProgram) -> None:
    """Undo the exporter's renaming of an input that is also a result (``extra`` to ``extra_orig``)."""
    names = [
        node.name
        for node in program.graph.find_nodes(op="placeholder")
        if node.name in program.graph_signature.user_inputs and isinstance(node.meta.get("val"), Tensor)
    ]
    if len(names) != len(model.graph.input):
        return
    renamed = {entry.name: name for entry, name in zip(model.graph.input, names, strict=True)}
    for entry in model.graph.input:
        entry.name = renamed[entry.name]
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]


def _name_dimensions(model: onnx.ModelProto, exported: FreeProgram) -> None:
    """Call free dimensions ``batch`` and ``x_dim2`` instead of torch's ``s77`` and ``s53``."""
    names: dict[str, str] = {}
    for entry in model.graph.input:
        for position, dimension in enumerate(entry.type.tensor_type.shape.dim):
            if dimension.dim_param.isidentifier():
                names.setdefault(dimension.dim_param, "batch" if position == 0 else f"{entry.name}_dim{position}")
    for entry in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        for dimension in entry.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_param = re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m[0], m[0]), dimension.dim_param)


def _count_axes_from_the_front(model: onnx.ModelProto) -> None:
    """Call the channels of a concatenation axis 1: onnxruntime keeps its blocked layout only if it sees a 1."""
    graph = model.graph
    known = [*graph.value_info, *graph.input, *graph.output]
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in known if v.type.tensor_type.HasField("shape")}
    for node in graph.node:
        if node.op_type == "Concat" and node.output[0] in ranks:
            (axis,) = node.attribute
            axis.i %= ranks[node.output[0]]


def _forget_sources(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes to itself, among them source paths of the machine that wrote the model."""
    graph = model.graph
    for part in [model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]:
        del part.metadata_props[:]
        part.doc_string = ""
    for function in model.functions:
        for node in function.node:
            del node.metadata_props[:]


def _simplify(
    model: onnx.ModelProto, example_args: tuple[Any, ...], example_kwargs: Mapping[str, Any]
) -> tuple[onnx.ModelProto, str | None]:
    """Simplify, and compare with the unsimplified model on the example; on failure that one and the reason."""
    import onnxsim

    printed = io.StringIO()
    names = [entry.name for entry in model.graph.input]
    named = {name: value for name, value in example_kwargs.items() if name in names}
    rest = (example_args, [value for name, value in example_kwargs.items() if name not in names])
    tensors = [leaf for leaf in pytree.tree_leaves(rest) if isinstance(leaf, Tensor)]
    feeds = {**dict(zip([name for name in names if name not in named], tensors, strict=False)), **named}
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in feeds.items() if tensor.dtype != torch.bfloat16}
    if len(arrays) != len(names):
        return model, "not simplified: the example's tensors do not match the model's inputs"
    try:
        with quiet_export(), contextlib.redirect_stdout(printed):
            simplified, is_equal = onnxsim.simplify(model, check_n=1, input_data=arrays)
    except (RuntimeError, ValueError, TypeError) as error:
        return model, f"not simplified: onnxsim failed ({str(error).strip().splitlines()[0]})"
    return (simplified, None) if is_equal else (model, "not simplified: onnxsim's result differed from its input")
