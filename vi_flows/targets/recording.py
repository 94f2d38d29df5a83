"""Tensor operations written down while a function runs, to be run again without the Python between them.

The Python of effect handlers, distributions, vmap, modules and autograd costs more than the arithmetic while tensors
are small. The operations that one call dispatches are therefore recorded: what does not depend on the inputs becomes a
constant, what nothing uses is left out, what is computed twice is computed once, and the rest runs as it stands.
docs/recorder.md has the rule, an example of five operations, and what here is private in torch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

LARGEST_RESULTS = 2**28  # bytes of results; beyond it arithmetic, not Python, takes the time
ALIASES = ("detach", "view", "expand", "_unsafe_view", "permute")  # what may return its input's very elements
# torch.NAME runs the same operation as torch.ops.aten.NAME, and reads its arguments in half the time
QUICK = {
    *("abs", "add", "addmm", "baddbmm", "bitwise_and", "bmm", "cat", "clamp", "clamp_min", "cos", "cumsum", "div"),
    *("eq", "exp", "expm1", "flip", "gather", "ge", "gt", "index_select", "le", "log", "log1p", "logical_and"),
    *("logical_not", "logsumexp", "lt", "maximum", "minimum", "mm", "mul", "ne", "neg", "permute", "pow", "rsqrt"),
    *("rsub", "select", "sigmoid", "sign", "sin", "softmax", "split_with_sizes", "sqrt", "square", "stack", "sub"),
    *("sum", "tanh", "transpose", "tril", "triu", "unbind", "unsqueeze", "where"),
}
METHODS = {"view", "expand"}
READS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

READERS = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.data_ptr, Tensor.untyped_storage, Tensor.__dlpack__}

Function = Callable[..., tuple[Tensor, ...]]


class NotRecordedError(RuntimeError):
    """Why the operations that one call dispatched cannot stand for the function."""


class TooLargeError(NotRecordedError):
    """The results of one call are so large that there is nothing to gain."""


@dataclass(frozen=True)
class Operation:
    """One operation with its arguments, what it returned, and the default dtype if its result follows that.

    alias: whether it returned its first argument's elements, in the same places.
    """

    op: Any
    args: tuple
    kwargs: dict[str, Any]
    out: Any
    promotes_to: torch.dtype | None
    alias: bool

    @property
    def inputs(self) -> list[Tensor]:
        return list(tensors((self.args, self.kwargs)))

    @property
    def outputs(self) -> list[Tensor]:
        return list(tensors(self.out))

    def written(self) -> Iterator[Tensor]:
        """The arguments that it changes in place."""
        for i, argument in enumerate(self.op._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from tensors(self.args[i] if i < len(self.args) else self.kwargs.get(argument.name))


class Recorder(TorchDispatchMode):
    """Writes down every operation dispatched while it is active.

    Raises NotRecordedError inside the function where it draws random numbers, or where Python reads a value that
    depends on the inputs. ``reason`` keeps the first of these, in case the function catches it.
    """

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.reached = {id(t) for t in inputs}
        self.operations: list[Operation] = []
        self.reason: NotRecordedError | None = None
        self.bytes = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the wrapper that it asks for imports the compiler, which takes a second

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        inputs = list(tensors((args, kwargs)))
        if self._reads_values(func, args, inputs):  # a function may do without: it is told, and its results compared
            raise NotRecordedError(f"its Python reads values that depend on its inputs ({func.overloadpacket})")
        out = func(*args, **kwargs)
        outputs = list(tensors(out))
        if any(id(t) in self.reached for t in inputs):
            self.reached.update(map(id, outputs))
        if not func.is_view:
            self.bytes += sum(t.numel() * t.element_size() for t in outputs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.refuse(NotRecordedError(f"it draws random numbers ({func.overloadpacket})"))
        if self.bytes > LARGEST_RESULTS:
            self.refuse(TooLargeError(f"its results take more than {LARGEST_RESULTS >> 20} MB"))
        parts = _dtypes(func, inputs, kwargs, outputs, out)
        self.operations.append(Operation(func, args, *parts, alias=_is_alias(func, args, out)))
        return out

    def _reads_values(self, func: Any, args: tuple, inputs: list[Tensor]) -> bool:
        """Whether Python, or the shape of the result, depends on elements that the inputs reach."""
        if func is torch.ops.aten.index.Tensor:  # by positions, or by a mask whose elements give the result its shape
            inputs = [t for t in tensors(args[1]) if t.dtype in (torch.bool, torch.uint8)]
        elif not READS_VALUES & set(func.tags):
            return False
        return any(id(t) in self.reached for t in inputs)

    def refuse(self, reason: NotRecordedError) -> None:
        self.reason = self.reason or reason
        self.operations.clear()
        raise self.reason


def _is_alias(func: Any, args: tuple, out: Any) -> bool:
    if func.overloadpacket.__name__ not in ALIASES or not isinstance(out, Tensor):
        return False
    first = args[0]
    return out.shape == first.shape and out.stride() == first.stride() and out.dtype == first.dtype


def _dtypes(func: Any, inputs: list[Tensor], kwargs: dict, outputs: list[Tensor], out: Any) -> tuple:
    """kwargs with the dtype of a new tensor written out, out, and the default dtype where integers promote to it."""
    takes = any(argument.name == "dtype" and argument.kwarg_only for argument in func._schema.arguments)
    if takes and kwargs.get("dtype") is None and isinstance(out, Tensor):
        kwargs["dtype"] = out.dtype
    promotes = inputs and "dtype" not in kwargs and not any(t.dtype.is_floating_point for t in inputs)
    promotes = promotes and any(t.dtype.is_floating_point for t in outputs)
    return kwargs, out, torch.get_default_dtype() if promotes else None


class Reads(TorchFunctionMode):
    """Refuses, while a Recorder is active, what reads elements of tensors without dispatching an operation."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in READERS and (args[0].requires_grad or id(args[0]) in self.recorder.reached):
            name = getattr(func, "__name__", "")
            self.recorder.refuse(NotRecordedError(f"its Python reads values that depend on its inputs ({name})"))
        return func(*args, **(kwargs or {}))


class Program:
    """fn(*inputs) -> tensors as the operations of one call, to be called with inputs of the same shapes.

    Runs without a graph: gradients are what fn itself computes by ``torch.autograd.grad``. Constants are the tensors
    that fn reads besides its inputs; :meth:`current` tells whether they are as they were. ``run`` is the function that
    runs them; it is made of ``torch.ops`` alone if ``traceable``, which torch.fx can follow.

    Raises NotRecordedError if the operations depend on more than the inputs and constants, and what fn raises.
    """

    def __init__(self, fn: Function, *inputs: Tensor, traceable: bool = False) -> None:
        leaves = tuple(t.detach().clone() for t in inputs)
        with Recorder(leaves) as recorder, Reads(recorder):
            results = fn(*leaves)
        if recorder.reason is not None:
            raise recorder.reason
        operations, outside = _dependent(recorder.operations, leaves)
        self.constants = [(weakref.ref(t), t._version) for t in outside]
        self.reads_parameters = any(t.requires_grad for t in outside)
        self.operations = len(operations := _used(operations, results))
        self.elements = sum(t.numel() for o in operations if not o.op.is_view for t in o.outputs)
        self.run, self.source = _written(operations, leaves, results, traceable)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return self.run(*(t.detach() for t in inputs))

    def current(self) -> bool:
        """Whether the tensors that it holds as constants have not been changed in place since."""
        return all((t := ref()) is None or t._version == version for ref, version in self.constants)


def agree(a: tuple[Tensor, ...], b: tuple[Tensor, ...], tolerance: float) -> bool:
    """Whether tensors agree to a tolerance relative to each one's largest finite element, infinities and NaN too."""
    for x, y in zip(a, b, strict=True):
        size = float(torch.where(y.isfinite(), y, 0.0).abs().max()) if y.numel() else 0.0
        if not torch.allclose(x, y, rtol=tolerance, atol=tolerance * size, equal_nan=True):
            return False
    return True


def is_recorded() -> bool:
    """Whether somebody else is recording the operations dispatched now."""
    return torch._C._len_torch_dispatch_stack() > 0


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(tuple(value.values()))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _dependent(operations: list[Operation], inputs: tuple[Tensor, ...]) -> tuple[list[Operation], list[Tensor]]:
    """The operations that the inputs reach, directly or through memory written in place; and the tensors from outside.

    The other operations always give what they gave: their results are constants.
    """
    written = {_storage(t) for o in operations if o.op._schema.is_mutable for t in o.written()}
    reached, made, outside, kept = {id(t) for t in inputs}, set(), {}, []
    for o in operations:
        ins, outs = o.inputs, o.outputs
        fresh = o.op._schema.name == "aten::lift_fresh_copy"  # of a tensor that Python has just made from numbers
        outside.update({id(t): t for t in ins if not fresh and id(t) not in made and id(t) not in reached})
        made.update(map(id, outs))
        shared = written and any(_storage(t) in written for t in (*ins, *outs))
        if shared or any(id(t) in reached for t in ins):
            reached.update(map(id, outs))
            kept.append(o)
    if any(_storage(t) in written for t in (*inputs, *outside.values())):
        raise NotRecordedError("it changes a tensor from outside in place")
    return kept, list(outside.values())


def _used(operations: list[Operation], results: tuple[Tensor, ...]) -> list[Operation]:
    """Those that the results need, that write in place, or that return nothing: checks, which may raise."""
    needed, kept = set(map(id, results)), []
    for o in reversed(operations):
        outputs = o.outputs
        if o.op._schema.is_mutable or not outputs or any(id(t) in needed for t in outputs):
            needed.update(map(id, o.inputs))
            kept.append(o)
    return kept[::-1]


def _written(operations: list[Operation], inputs: tuple, results: tuple, traceable: bool) -> tuple[Function, str]:
    """A Python function of the inputs that runs the operations line by line, and its source.

    Inputs are named x0, x1, ..., operations f0, ..., constants c0, ..., results v0, ..., let go after their last use.
    """
    written = {_storage(t) for o in operations if o.op._schema.is_mutable for t in o.written()}
    writer = _Writer(inputs, written, traceable)
    lines = [line for o in operations if (line := writer.line(o)) is not None]
    writer.used = []
    returned = ", ".join(map(writer.name, results))
    body, alive = [], set(writer.used)
    for line, used in reversed(lines):
        over = [name for name in dict.fromkeys(used) if name not in alive and name[0] == "v"]
        alive.update(over)
        body.append(line + (f"; {' = '.join(over)} = None" if over else ""))
    head = f"def run({', '.join(f'x{i}' for i in range(len(inputs)))}):"
    source = "\n    ".join([head, *reversed(body), f"return ({returned},)"])
    exec(compile(source, "<recorded>", "exec"), writer.space)
    return writer.space["run"], source


class _Writer:
    """Names for operations, tensors and other arguments, and the lines that call them."""

    def __init__(self, inputs: tuple[Tensor, ...], written: set[int], traceable: bool) -> None:
        self.names = {id(t): f"x{i}" for i, t in enumerate(inputs)}
        self.written, self.traceable = written, traceable
        self.space: dict[str, Any] = {}
        self.known: dict[Any, str] = {}  # names of operations and constants, and of results by their calls
        self.used: list[str] = []

    def line(self, o: Operation) -> tuple[str, list[str]] | None:
        """One line and the names in it; None where the result has a name already."""
        changes = bool(self.written & {_storage(t) for t in (*o.outputs, *o.inputs)})
        if o.alias and not changes:
            self.names[id(o.out)] = self.name(o.args[0])
            return None
        self.used = []
        arguments = [self.text(a) for a in o.args] + [f"{key}={self.text(a)}" for key, a in o.kwargs.items()]
        call = f"{self.operation(o)}({', '.join(arguments)})"
        if isinstance(o.out, Tensor) and not changes:
            if call in self.known:
                self.names[id(o.out)] = self.known[call]
                return None
            self.known[call] = self.new(o.out)
        if isinstance(o.out, Tensor):
            return f"{self.new(o.out)} = {call}", self.used
        outs = "".join(f"{self.new(t)}, " for t in o.out) if o.outputs else ""
        return f"{outs}{'= ' if outs else ''}{call}", self.used

    def operation(self, o: Operation) -> str:
        name = "" if self.traceable else o.op.overloadpacket.__name__
        run = getattr(torch, name) if name in QUICK else getattr(Tensor, name) if name in METHODS else o.op
        if o.promotes_to is not None:
            run = _promoting(o.op, o.promotes_to)
        return self.constant(run, (o.op, o.promotes_to), "f")

    def new(self, t: Any) -> str:
        if not isinstance(t, Tensor):
            return "_"
        name = self.names.setdefault(id(t), f"v{len(self.names)}")
        self.used.append(name)
        return name

    def name(self, t: Tensor) -> str:
        if id(t) not in self.names:
            self.names[id(t)] = self.constant(t.detach(), id(t))
        self.used.append(self.names[id(t)])
        return self.names[id(t)]

    def text(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return self.name(value)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(self.text, value))}]"
        plain = value is None or isinstance(value, (bool, int))
        return repr(value) if plain else self.constant(value, (type(value), repr(value)))

    def constant(self, value: Any, key: Any, letter: str = "c") -> str:
        if key not in self.known:
            self.known[key] = f"{letter}{len(self.space)}"
            self.space[self.known[key]] = value
        return self.known[key]


def _promoting(op: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    """op under the default dtype with which it was recorded, to which operations on integers promote."""

    def run(*args: Any, **kwargs: Any) -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return op(*args, **kwargs)
        finally:
            torch.set_default_dtype(before)

    return run
