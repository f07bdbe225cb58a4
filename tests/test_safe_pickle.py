"""Are the names of a pickle judged by what it does with them, and never run in the process?"""

from __future__ import annotations

import collections
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from rgc.safe_pickle import judge, read_uses

# Programs are written by hand, as hostile ones are. c: GLOBAL, R: REDUCE, \x81: NEWOBJ, b: BUILD, \x85: TUPLE1.
HEAD = b"\x80\x02"


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def test_uses_are_told_apart() -> None:
    program = HEAD + name("a", "B") + b")\x81" + name("c", "D") + b"}b" + name("e", "f") + text("x") + b"\x85R\x87."
    uses = read_uses(program)
    assert uses.mentioned == {"a.B", "c.D", "e.f"}
    assert uses.instantiated == {"a.B"}
    assert uses.filled == {"c.D"}
    assert uses.called == {"e.f"}


def test_a_call_through_the_memo_is_a_call() -> None:
    program = HEAD + b"]" + name("posix", "system") + b"q\x00a" + b"h\x00" + text("true") + b"\x85R\x86."
    assert read_uses(program).called == {"posix.system"}


@pytest.mark.parametrize(
    "value",
    [
        nn.ReLU,
        functional.relu,
        functional.gelu,
        functools.partial(nn.BatchNorm2d, eps=1e-3),
        collections.OrderedDict(a={1, 2}),
        torch.Size([1, 2]),
        torch.float16,
        torch.device("cpu"),
    ],
    ids=["class", "function", "builtin", "partial", "containers", "size", "dtype", "device"],
)
def test_what_models_are_made_of_is_admitted(value: object) -> None:
    assert judge(pickle.dumps(value, protocol=2)).refused == ()


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        ("posix", "system"),
        ("builtins", "eval"),
        ("__builtin__", "getattr"),
        ("torch.nnevil", "Linear"),
        ("torch.nn_", "Linear"),
        ("torch", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch.nn.modules.module", "torch.os.system"),
        ("torch.nn.modules.module.torch.os", "system"),
        ("torch.nn.modules.module", "importlib"),
        ("torch.nn.modules.linear", "Linear.__init__"),
        ("torch.nn.functional", "handle_torch_function"),
        ("torch.nn.functional", "_verify_batch_size"),
        ("torch.nn.functional", "Callable"),
        ("torch.nn.modules.module", "register_module_forward_hook"),
        ("torch.nn.utils.rnn", "PackedSequence.__new__"),
        ("torch.fx.graph_module", "GraphModule"),
        ("torch.jit._script", "ScriptModule"),
        ("torchvision.models.feature_extraction", "DualGraphModule"),
        ("torchvision.models._api", "get_model"),
        ("torchvision.models._api", "partial"),
        ("timm.models._factory", "create_model"),
        ("rgc.loading", "load_model"),
        ("torch.nn.modules.linear", ""),
        ("", ""),
        ("torch.nn.modules.linear", "Lin\\x65ar."),
    ],
)
def test_names_that_lead_out_of_the_libraries_are_refused(module: str, attribute: str) -> None:
    verdict = judge(HEAD + name(module, attribute) + b".")
    assert len(verdict.refused) == 1
    assert verdict.admitted == ()


def test_a_layer_may_not_be_called_with_arguments_of_the_files_choosing() -> None:
    program = HEAD + name("torch.nn.modules.linear", "Linear") + b"K\x01K\x01\x86R."
    assert judge(program).refused == ("torch.nn.modules.linear.Linear",)


def test_a_function_may_be_kept_but_not_called() -> None:
    program = HEAD + name("torch.nn.functional", "relu") + b")R."
    assert judge(program).refused == ("torch.nn.functional.relu",)


@pytest.mark.parametrize("call", [b")R.", b")\x81."], ids=["REDUCE", "NEWOBJ"])
def test_only_what_is_named_may_be_called(call: bytes) -> None:
    program = HEAD + name("functools", "partial") + name("torch.nn.functional", "relu") + b"\x85R" + call
    with pytest.raises(pickle.UnpicklingError, match="calls a value that it computed"):
        judge(program)


def test_a_class_may_not_be_changed() -> None:
    program = HEAD + name("torch.nn.modules.linear", "Linear") + b"}" + text("forward") + b"Nsb."
    assert judge(program).refused == ("torch.nn.modules.linear.Linear",)


def test_a_rebuilder_may_not_be_instantiated() -> None:
    program = HEAD + name("functools", "partial") + name("builtins", "set") + b"\x85\x81."
    assert judge(program).refused == ("functools.partial",)


def test_what_torch_save_does_not_write_is_refused() -> None:
    with pytest.raises(pickle.UnpicklingError, match="its pickle uses FRAME, which torch.save does not write"):
        judge(pickle.dumps(nn.ReLU, protocol=4))
    with pytest.raises(pickle.UnpicklingError, match="its pickle uses STACK_GLOBAL"):
        judge(HEAD + text("posix") + text("system") + b"\x93.")
    with pytest.raises(pickle.UnpicklingError, match="its pickle uses POP"):
        judge(HEAD + name("posix", "system") + b"q\x000h\x00)R.")
    with pytest.raises(pickle.UnpicklingError, match="its pickle uses INST"):
        judge(HEAD + b"(iposix\nsystem\n.")


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b"\x80",
        HEAD,
        HEAD + b"R.",
        HEAD + b"N(R.",
        HEAD + b"t.",
        HEAD + b"h\x05.",
        HEAD + b"cposix\nsys",
        b"\xff\xfe",
    ],
    ids=repr,
)
def test_damage_is_reported_and_not_guessed_around(program: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError, match="its pickle is damaged"):
        judge(program)


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm.models", None)
    with pytest.raises(pickle.UnpicklingError, match="it needs timm.models, which does not import here"):
        judge(HEAD + name("timm.models.resnet", "ResNet") + b".")


def test_abstract_classes_are_plain_only_where_they_are_ours() -> None:
    assert judge(HEAD + name("rgc.slimmable", "SlimmableConv2d") + b".").refused == ()
    assert judge(HEAD + name("torch.nn.utils.prune", "RandomUnstructured") + b".").refused != ()
