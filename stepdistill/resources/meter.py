"""Running a training step without values: shapes are computed, bytes are counted, and nothing is stored.

torch's fake tensors carry shapes and types only. Three modes together make a game playable with them on any machine:
`FakeTensorMode` does the arithmetic of shapes, `MemoryMeter` counts what lives, and `ShapesOnly` answers where Python
asks for a value that does not exist, and takes the types that an accelerator's autocast takes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


BLOCK_BYTES = 512  # what CUDA's caching allocator rounds a request up to


class MemoryMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that are alive, as an allocator would: views and in-place results count once.

    Attributes:
        now: bytes alive.
        peak: most bytes alive at once since `start_anew`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._sizes: dict[int, int] = {}

    def start_anew(self) -> None:
        """Forgets the peak so far."""
        self.peak = self.now

    def hold(self, module: nn.Module) -> None:
        """Counts a module that was built outside."""
        self._note([*module.parameters(), *module.buffers()])

    def divide(self, tensors: Iterable[Tensor], parts: int) -> None:
        """Counts of these tensors one of so many equal parts only, from now on: the others live in other processes."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            part = _in_blocks(-(-storage.nbytes() // parts))
            if storage._cdata in self._sizes:
                self.now += part - self._sizes[storage._cdata]
                self._sizes[storage._cdata] = part

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._note(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def _note(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._alive:
                continue
            self._sizes[key] = _in_blocks(storage.nbytes())
            # The object that stands for a storage in Python lives exactly as long as the storage does.
            self._alive[key] = weakref.ref(storage, self._forgetting(key))
            self.now += self._sizes[key]
        self.peak = max(self.peak, self.now)

    def _forgetting(self, key: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            if self._alive.pop(key, None) is not None:
                self.now -= self._sizes.pop(key)

        return forget


def _in_blocks(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _value(tensor: Tensor) -> bool | int | float:
    """What a number is taken for that nobody computes: no mask is set, and everything else is one."""
    if tensor.dtype == torch.bool:
        return False
    return 1.0 if tensor.is_floating_point() else 1


# What an autocast of CUDA computes in float32 and that of the CPU, under which fakes run, does not; see torch.amp's
# documentation, "CUDA Ops that can autocast to float32".
WIDE: frozenset[Any] = frozenset({
    F.group_norm, F.layer_norm, F.rms_norm, torch.group_norm, torch.layer_norm, F.softmax, F.log_softmax,
    torch.softmax, torch.log_softmax, Tensor.softmax, Tensor.log_softmax, torch.exp, Tensor.exp, torch.log, Tensor.log,
    torch.pow, Tensor.pow, Tensor.__pow__, torch.rsqrt, Tensor.rsqrt, torch.sum, Tensor.sum, torch.cumsum,
    Tensor.cumsum, torch.norm, Tensor.norm, F.softplus, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss,
    F.cosine_similarity, F.normalize,
})  # fmt: skip
NORMS: frozenset[Any] = frozenset({F.group_norm, F.layer_norm})
VALUES: dict[Any, Callable[[Tensor], Any]] = {
    Tensor.item: _value,
    Tensor.__float__: lambda _: 1.0,
    Tensor.__int__: lambda _: 1,
    Tensor.__index__: lambda _: 1,
    Tensor.__bool__: lambda _: False,
}


class ShapesOnly(TorchFunctionMode):
    """Lets code that reads values run on tensors that have none, and widens types as CUDA's autocast does."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in VALUES:
            return VALUES[func](args[0])
        if func is Tensor.tolist:
            flat = [_value(args[0])] * args[0].numel()
            return flat if args[0].ndim else flat[0]
        if func in (torch.equal, torch.allclose):
            return False
        if func in WIDE and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
        if func in NORMS and _has_tangent(args[0] if args else kwargs["input"]):
            return _norm_with_tangent(func, *args, **kwargs)
        return func(*args, **kwargs)


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def _norm_with_tangent(
    func: Callable[..., Tensor],
    input: Tensor,
    shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """A norm, and then its weight and bias: all in one, torch puts the tangents of fakes on another device."""
    output = func(input, shape, eps=eps)
    for parameter, combine in ((weight, torch.mul), (bias, torch.add)):
        if parameter is not None:
            channels = (-1, *(1,) * (input.ndim - 2)) if func is F.group_norm else parameter.shape
            output = combine(output, parameter.reshape(channels))
    return output


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


@contextmanager
def shaped(fake: FakeTensorMode) -> Iterator[None]:
    """Inside, modules are built, and moved from type to type, as shapes.

    torch converts a module's parameters in place, which it refuses for fakes; here they are replaced, and those that a
    conversion would not change stay the very objects that they are.
    """
    before = nn.Module._apply
    with fake:
        nn.Module._apply = _replacing  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module._apply = before  # type: ignore[method-assign]


def _replacing(root: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    for module in root.modules() if recurse else [root]:
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                new = None if old is None else fn(old.detach())
                if old is None or new is None or (new.dtype, new.stride()) == (old.dtype, old.stride()):
                    continue
                made: Any = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                tensors[name] = made
    return root


@contextmanager
def without_values(fake: FakeTensorMode, meter: MemoryMeter) -> Iterator[None]:
    """Inside, everything that torch does happens to shapes alone and is counted."""
    with shaped(fake), meter, ShapesOnly():
        yield


def fake_mode() -> FakeTensorMode:
    """A mode that takes real tensors as well: noise schedules are computed before it."""
    return FakeTensorMode(allow_non_fake_inputs=True)
