"""A GPU that is not there: tensors that say `cuda:0`, lie on the CPU, and refuse what CUDA refuses.

    with simulated_gpu(monkeypatch) as gpu:      # torch, Accelerate and transformers see one GPU
        ...
        with gpu.phase("rollout"):
            ...
    gpu.counts["rollout"]                        # Counter of operators, waits, copies

Where a tensor is, is an attribute of its storage, so views, parameters and what autograd keeps share it. A dispatch
mode looks at every operator: a host tensor beside a device tensor is an error, as on CUDA, unless it is a single number
that is only read; and what comes of device tensors is on the device. It counts operators that compute (about: kernel launches), waits of the
host for the device (`.item()`, `.cpu()`, `.tolist()`, `bool()`, boolean indices, `nonzero` …) with the line of the
project that caused them, and copies from the host. PyTorch itself sees CPU tensors only: autocast is the CPU's, and
nothing is learned about speed, memory, NCCL or kernels.
"""

from __future__ import annotations

import collections
import contextlib
import sys
import traceback
import types
from pathlib import Path

import torch
import torch._dynamo  # reads, once, which functions torch has: before they are replaced
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.utils import _pytree as pytree
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
PACKAGE = str(Path(__file__).parents[1] / "pipelines") + "/"
# Operators that launch nothing.
VIEWS = set(
    "view _unsafe_view transpose permute expand slice select t unsqueeze squeeze detach alias as_strided split unbind "
    "split_with_sizes _reshape_alias lift_fresh empty new_empty empty_like empty_strided new_empty_strided diagonal".split()
)
# Operators whose result has a size, or is a number, that the host must know.
WAITS = set(
    "_local_scalar_dense nonzero masked_select equal unique2 _unique2 unique_consecutive unique_dim bincount".split()
)
INDEXED = set("index index_put _index_put_impl _unsafe_index _unsafe_index_put".split())


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on the simulated device."""
    try:
        return getattr(tensor.untyped_storage(), "simulated_gpu", False)
    except NotImplementedError:  # of a sparse tensor, or another without storage
        return False


def _place(tensor: torch.Tensor, gpu: bool) -> torch.Tensor:
    with contextlib.suppress(NotImplementedError):
        tensor.untyped_storage().simulated_gpu = gpu
    return tensor


class _Move(torch.autograd.Function):
    """A copy on the other device; its gradient comes back."""

    @staticmethod
    def forward(ctx, x, gpu):
        ctx.back = on_gpu(x)
        return _place(x.detach().clone(), gpu)

    @staticmethod
    def backward(ctx, grad):
        return _Move.apply(grad, ctx.back), None


class SimulatedGPU(TorchDispatchMode):
    """The mode that checks and counts. `counts[phase][kind]` and `places[phase]["kind file:line"]` are Counters."""

    def __init__(self):
        super().__init__()
        self.counts = collections.defaultdict(collections.Counter)
        self.places = collections.defaultdict(collections.Counter)
        self.phases = ["other"]
        self.tape = None  # what is computed while a CUDA graph is recorded

    @contextlib.contextmanager
    def phase(self, name: str):
        """Count what happens within under this name."""
        self.phases.append(name)
        try:
            yield self.counts[name]
        finally:
            self.phases.pop()

    def watch(self, monkeypatch, owner, method: str, name: str | None = None) -> None:
        """Count each call of `owner.method` as the phase `name`, and the calls themselves as its "calls"."""
        real, name = getattr(owner, method), name or method

        def counted(*args, **kwargs):
            with self.phase(name):
                self.counts[name]["calls"] += 1
                return real(*args, **kwargs)

        monkeypatch.setattr(owner, method, counted)

    def count(self, kind: str) -> None:
        """One more of "wait" or "copy", at the line of the project that is running."""
        if self.tape is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        self.counts[self.phases[-1]][kind] += 1
        frames = [f for f in traceback.extract_stack(limit=80) if "simulated_gpu" not in f.filename]
        ours = [f for f in frames if f.filename.startswith(PACKAGE)]
        others = [f for f in frames if "/torch/" not in f.filename] or frames
        frame = (ours or others)[-1]
        self.places[self.phases[-1]][f"{kind} {frame.filename.removeprefix(PACKAGE)}:{frame.lineno}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        base = func._schema.name.partition("::")[2]
        base = base.removesuffix("_") or base
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = [x for x in tensors if on_gpu(x)]
        if there:
            self._check(func, base, args, [x for x in tensors if not on_gpu(x)])
            if base in WAITS or base in INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1]):
                self.count("wait")
            if base == "repeat_interleave" and func._overloadname == "Tensor" and kwargs.get("output_size") is None:
                self.count("wait")
            if base not in VIEWS:
                self.counts[self.phases[-1]]["operators"] += 1
        out = func(*args, **kwargs)
        if there and self.tape is not None:
            self.tape.append((func, args, kwargs, None if base in VIEWS else out))
        if there and base not in ("copy", "_foreach_copy"):
            for x in pytree.tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    _place(x, True)
        return out

    def _check(self, func, base: str, args, here: list[torch.Tensor]) -> None:
        """Raise where a GPU would: `here` are the tensors on the host beside others on the device."""
        if base in ("copy", "_foreach_copy"):
            if here:
                self.count("copy" if on_gpu(pytree.tree_leaves(args[0])[0]) else "wait")
            return
        schema = zip(func._schema.arguments, args, strict=False)
        written = [x for of, x in schema if of.alias_info is not None and of.alias_info.is_write]
        for x in here:
            if x.dim() == 0 and base not in ("cat", "stack") and not any(x is out for out in written):
                continue
            if base in INDEXED and on_gpu(args[0]) and not (len(args) > 2 and x is args[2]):
                self.count("copy")  # indices may be on the host
                continue
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"(in {func}; a CPU tensor of shape {tuple(x.shape)})"
            )


class Graph:
    """In `torch.cuda.CUDAGraph`'s place: what was computed is computed again, into the same tensors.

    A real one computes nothing while it is recorded; this one does, and nothing the first time it is replayed.
    """

    def __init__(self, gpu: SimulatedGPU):
        self.gpu, self.tape, self.replays = gpu, [], 0

    @contextlib.contextmanager
    def record(self, **_):
        """What `torch.cuda.graph` does around the lines that are recorded."""
        self.gpu.tape = self.tape
        try:
            yield
        finally:
            self.gpu.tape = None

    def replay(self) -> None:
        """All of it again: one launch."""
        self.replays += 1
        self.gpu.counts[self.gpu.phases[-1]]["operators"] += 1
        self.gpu.counts[self.gpu.phases[-1]]["replays"] += 1
        if self.replays == 1:
            return
        with _disable_current_modes():
            for func, args, kwargs, before in self.tape:
                out = func(*args, **kwargs)
                for old, new in zip(pytree.tree_leaves(before), pytree.tree_leaves(out), strict=before is not None):
                    if isinstance(old, torch.Tensor) and old is not new:
                        old.copy_(new)


def _is_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


@contextlib.contextmanager
def simulated_gpu(monkeypatch, bf16: bool = True, devices: int = 1):
    """Within it this process has `devices` GPUs, which compute in bf16 or not; yields the `SimulatedGPU`."""
    gpu = SimulatedGPU()
    _fake_cuda(monkeypatch, gpu, bf16, devices)
    _fake_tensors(monkeypatch, gpu)
    _fake_factories(monkeypatch, gpu)
    _fake_groups(monkeypatch)
    _fake_autocast(monkeypatch)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    _forget()
    try:
        with gpu:
            yield gpu
    finally:
        monkeypatch.undo()
        _forget()


def _forget() -> None:
    """What Accelerate and transformers found out about the hardware."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()
    import accelerate.utils.imports
    import transformers.utils.import_utils

    for module in (accelerate.utils.imports, transformers.utils.import_utils):
        for function in vars(module).values():
            if callable(getattr(function, "cache_clear", None)):
                function.cache_clear()


def _fake_cuda(monkeypatch, gpu: SimulatedGPU, bf16: bool, devices: int) -> None:
    card = types.SimpleNamespace(
        name="Simulated", major=9 if bf16 else 7, minor=0, total_memory=80 * 2**30, multi_processor_count=132
    )
    nothing = lambda *_, **__: None  # noqa: E731
    found = {
        "is_available": lambda: True,
        "device_count": lambda: devices,
        "current_device": lambda: 0,
        "is_initialized": lambda: True,
        "synchronize": lambda *_: gpu.count("wait"),
        "is_bf16_supported": lambda including_emulation=True: bf16 or including_emulation,
        "get_device_capability": lambda *_: (card.major, 0),
        "get_device_properties": lambda *_: card,
        "get_device_name": lambda *_: card.name,
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda *_: (70 * 2**30, 80 * 2**30),
        "CUDAGraph": lambda: Graph(gpu),
        "graph": lambda graph, **how: graph.record(**how),
        "current_stream": lambda *_: None,
        "set_stream": nothing,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)] * devices,
    }
    found |= dict.fromkeys(
        "set_device init _lazy_init empty_cache manual_seed manual_seed_all set_rng_state set_rng_state_all "
        "ipc_collect "
        "reset_peak_memory_stats".split(),
        nothing,
    )
    zero = "memory_allocated max_memory_allocated memory_reserved max_memory_reserved".split()
    found |= dict.fromkeys(zero, lambda *_: 0)
    for name, fake in found.items():
        monkeypatch.setattr(torch.cuda, name, fake)
        if hasattr(torch.cuda.random, name):
            monkeypatch.setattr(torch.cuda.random, name, fake)
    for name, fake in {
        "is_available": lambda: True,
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "device_count": lambda: devices,
        "current_device_index": lambda: 0,
        "set_device_index": nothing,
        "empty_cache": nothing,
        "synchronize": nothing,
        "current_stream": lambda *_: types.SimpleNamespace(is_capturing=lambda: False),
    }.items():
        monkeypatch.setattr(torch.accelerator, name, fake)


def _fake_tensors(monkeypatch, gpu: SimulatedGPU) -> None:
    plain = {
        name: getattr(torch.Tensor, name) for name in ("to", "cpu", "tolist", "numpy", "__array__", "__deepcopy__")
    }
    parse = torch._C._nn._parse_to

    def move(x: torch.Tensor, device) -> torch.Tensor:
        if _is_cuda(device) == on_gpu(x):
            return x
        gpu.count("copy" if _is_cuda(device) else "wait")
        return _Move.apply(x, _is_cuda(device))

    def to(self, *args, **kwargs):
        others = [x for x in (*args[:1], kwargs.get("other")) if isinstance(x, torch.Tensor)]
        if others:
            device, dtype = others[0].device, others[0].dtype
        else:
            device, dtype, *_ = parse(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
        moved = self if device is None or device.type not in ("cuda", "cpu") else move(self, device)
        if device is not None and device.type not in ("cuda", "cpu"):  # to meta
            return plain["to"](self, *args, **kwargs)
        copy = kwargs.get("copy", False) and moved is self
        return plain["to"](moved, dtype or moved.dtype, copy=copy)

    def tolist(self):
        if on_gpu(self):
            gpu.count("wait")
        return plain["tolist"](self)

    def refused(name):
        def call(self, *args, **kwargs):
            if on_gpu(self):
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
            return plain[name](self, *args, **kwargs)

        return call

    def deepcopy(self, memo):
        return _place(plain["__deepcopy__"](self, memo), on_gpu(self))

    real = torch._C.TensorBase.device
    for name, fake in {
        "to": to,
        "tolist": tolist,
        "numpy": refused("numpy"),
        "__array__": refused("__array__"),
        "__deepcopy__": deepcopy,
        "cpu": lambda self, *_, **__: self.to("cpu"),
        "cuda": lambda self, *_, **__: self.to(CUDA),
        "pin_memory": lambda self, *_: self,
        "is_pinned": lambda self, *_: False,
        "get_device": lambda self: 0 if on_gpu(self) else -1,
        "device": property(lambda self: CUDA if on_gpu(self) else real.__get__(self)),
        "is_cuda": property(on_gpu),
    }.items():
        monkeypatch.setattr(torch.Tensor, name, fake)


def _fake_factories(monkeypatch, gpu: SimulatedGPU) -> None:
    """What makes tensors on a device that it is told."""

    def making(make, of_values: bool):
        def call(*args, device=None, **kwargs):
            if not _is_cuda(device):
                return make(*args, **kwargs) if device is None else make(*args, device=device, **kwargs)
            if of_values:
                gpu.count("copy")
            kwargs.pop("pin_memory", None)
            return _place(make(*args, **kwargs), True)

        return call

    def like(make):
        def call(self, *args, device=None, **kwargs):
            there = on_gpu(self) if device is None else _is_cuda(device)
            kwargs |= {} if device is None else {"device": "cpu" if there else device}
            return _place(make(self, *args, **kwargs), there)

        return call

    values = ("tensor", "as_tensor", "asarray")
    for function in _device_constructors():
        name = function.__name__
        if getattr(torch, name, None) is function:
            monkeypatch.setattr(torch, name, making(function, name in values))
    for name in ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"):
        monkeypatch.setattr(torch, name, like(getattr(torch, name)))
    for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"):
        monkeypatch.setattr(torch.Tensor, name, like(getattr(torch.Tensor, name)))


def _fake_groups(monkeypatch) -> None:
    """What optimizers and clipping sort by device, which is done below Python."""
    real = torch.utils._foreach_utils._group_tensors_by_device_and_dtype

    def group(*args, **kwargs):
        groups = {}
        for (device, dtype), (tensors, places) in real(*args, **kwargs).items():
            there = next((on_gpu(x) for column in tensors for x in column if x is not None), False)
            groups[CUDA if there else device, dtype] = tensors, places
        return groups

    for module in ("torch.utils._foreach_utils", "torch.nn.utils.clip_grad", "torch.optim.optimizer"):
        monkeypatch.setattr(sys.modules[module], "_group_tensors_by_device_and_dtype", group)


def _fake_autocast(monkeypatch) -> None:
    """Autocast of the GPU is the CPU's."""
    cpu = lambda kind: "cpu" if kind == "cuda" else kind  # noqa: E731
    enter = torch.autocast.__init__

    def begin(self, device_type, dtype=None, *args, **kwargs):
        enter(self, cpu(device_type), torch.bfloat16 if dtype is None else dtype, *args, **kwargs)

    monkeypatch.setattr(torch.autocast, "__init__", begin)
    for name in ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled", "set_autocast_dtype"):
        real = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *args, real=real: real(*((cpu(args[0]), *args[1:]) if args else ("cpu",)))
        )
