"""A denoiser is a view: one network, seen through one set of weights, one schedule and one convention.

Shapes: B batch, C channels, H height, W width of the latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepdistill.adapters import SharedNetwork
from stepdistill.condition import Condition
from stepdistill.errors import UserError
from stepdistill.prediction import Levels, Prediction, beside
from stepdistill.processes.sharding import ShardedWeights, carried
from stepdistill.schedule import NoiseSchedule


class NetworkCall(Protocol):
    """How one architecture is called (a method of its family): => native output of the shape of x_t."""

    def __call__(self, network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition, /) -> Tensor: ...


class Weights(Protocol):
    """One set of weights of a network."""

    @property
    def network(self) -> nn.Module:
        """The module to call while the weights are active."""

    def active(self) -> AbstractContextManager[None]:
        """Inside, the network computes with these weights."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """What may be trained, by the name used in files."""

    def plain_state(self) -> dict[str, Tensor]:
        """The state of a plain network that computes the same."""


class OwnWeights:
    """A network of its own: every parameter belongs to the role."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.requires_grad_(False)

    def active(self) -> AbstractContextManager[None]:
        return nullcontext()

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.network.named_parameters())

    def plain_state(self) -> dict[str, Tensor]:
        return {key: value.detach().clone() for key, value in self.network.state_dict().items()}


class AdapterWeights:
    """An adapter on a shared network, or the bare base for name None."""

    def __init__(self, shared: SharedNetwork, name: str | None) -> None:
        self._shared, self._name = shared, name

    @property
    def network(self) -> nn.Module:
        return self._shared.network

    def active(self) -> AbstractContextManager[None]:
        return self._shared.routed(self._name)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {} if self._name is None else self._shared.parameters(self._name)

    def plain_state(self) -> dict[str, Tensor]:
        return self._shared.plain_state(self._name)


class Denoiser:
    """x_t, time, condition => Prediction. Never decides about no_grad, train(), devices or requires_grad.

    Args:
        call: how the architecture is called.
        weights: which weights it computes with.
        schedule: the noise schedule that the network was trained on.
        kind: what its native output is, see `Prediction`.

    Attributes:
        even_sigmas: see `ModelFamily.even_sigmas`.
    """

    even_sigmas: ClassVar[bool] = False

    def __init__(self, call: NetworkCall, weights: Weights, schedule: NoiseSchedule, kind: str) -> None:
        self._call = call
        self.weights = weights
        self.schedule = schedule
        self.kind = kind

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """One network call.

        Args:
            x_t: noisy sample, (B, C, H, W).
            t: times in [0, 1], (B,).
            condition: B rows.
        """
        return self._prediction(self._native(x_t, self._model_time(x_t, t), condition), x_t, t)

    def guided(
        self, x_t: Tensor, t: Tensor, condition: Condition, null: Condition, scale: float | Tensor
    ) -> Prediction:
        """Classifier-free guidance in one batched call; scale 1 and 0 need no second half and make none.

        Args:
            x_t: noisy sample, (B, C, H, W).
            t: times, (B,).
            condition: B rows.
            null: the unconditional or negative condition, B rows.
            scale: standard scale (1 = no guidance), one number or (B,).
        """
        if isinstance(scale, int | float) and scale in (0, 1):
            return self(x_t, t, condition if scale == 1 else null)
        both = self(torch.cat([x_t, x_t]), torch.cat([t, t]), Condition.cat([condition, null]))
        with_prompt, without = split(both, len(x_t))
        if isinstance(scale, Tensor):
            scale = beside(x_t, scale.to(x_t))
        return with_prompt.guide(without, scale)

    def fresh_noise(self, x: Tensor) -> Tensor:
        """Noise of the shape of x, in the order in which the stock pipeline's scheduler draws it between steps."""
        return torch.randn_like(x)

    def jvp(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        tangent_x: Tensor,
        tangent_t: Tensor,
        *,
        difference: float = 0.0,
    ) -> tuple[Prediction, Tensor]:
        """The prediction, and how fast its native output changes along a direction of (x_t, t).

        By forward-mode differentiation, run as Python with plain attention, since compiled code may drop the tangents
        and the fused kernels have no forward mode; or from two more calls, all of them in float32 or more whatever the
        precision around them: half precision would round the difference away. No reverse mode is needed for either,
        so a caller who wants none takes no_grad around it.

        Args:
            x_t: noisy sample, (B, C, H, W).
            t: times in [0, 1], (B,).
            condition: B rows; it does not change along the direction.
            tangent_x: direction of x_t, (B, C, H, W).
            tangent_t: direction of t, (B,).
            difference: 0 for forward mode; else a central difference, combined in float64, whose points lie so far
                off, relative to the norm of x_t and to the whole range of times together. Diffusers' time embedding
                turns by one radian a timestep, so 1e-4, a tenth of a timestep, is a good size at float32.

        Returns:
            The prediction, and the derivative of `prediction.native`, (B, C, H, W), at least float32.

        Raises:
            UserError: differences of a network whose weights are in half precision.
        """
        model_time = self._model_time(x_t, t)
        tangent = tangent_x.to(x_t), (self.schedule.d_model_time(t) * tangent_t).to(model_time)
        if difference > 0:
            step = _relative_step(x_t, tangent_x, tangent_t, difference)
            native, slope = self._central_difference(x_t, model_time, condition, tangent, step)
        else:
            with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
                x, time = map(forward_ad.make_dual, (x_t, model_time), tangent)
                native, found = forward_ad.unpack_dual(self._native(x, time, condition))  # type: ignore[no-untyped-call]
                slope = torch.zeros_like(native) if found is None else found  # None: it depends on neither
        return self._prediction(native, x_t, t), slope.to(torch.promote_types(x_t.dtype, torch.float32))

    def features(self, x_t: Tensor, t: Tensor, condition: Condition, layers: Sequence[str]) -> list[Tensor]:
        """Outputs of inner modules of the network; the pass ends at the last of them.

        Args:
            x_t: noisy sample, (B, C, H, W).
            t: times in [0, 1], (B,).
            condition: B rows.
            layers: names of modules in the order of the pass, e.g. ("mid_block",).

        Returns:
            One tensor per layer, (B, ...).

        Raises:
            UserError: the network has no such module, or the pass ended without it.
        """
        with suppress(_LastLayerError), self._watching(layers, last=layers[-1]) as found:
            self._native(x_t, self._model_time(x_t, t), condition)
        missing = [name for name in layers if name not in found]
        if missing:
            raise UserError(f"the network's pass does not come by its module {missing[0]!r} before it ends at "
                            f"{layers[-1]!r}; name layers in the order of the pass, or others")  # fmt: skip
        return [found[name] for name in layers]

    def observed(
        self, x_t: Tensor, t: Tensor, condition: Condition, layers: Sequence[str]
    ) -> tuple[Prediction, list[Tensor]]:
        """The prediction, and the outputs of inner modules on the way to it, in one whole pass.

        Args:
            x_t: noisy sample, (B, C, H, W).
            t: times in [0, 1], (B,).
            condition: B rows.
            layers: names of modules that the pass comes by, in any order.

        Raises:
            UserError: the network has no such module.
        """
        with self._watching(layers) as found:
            prediction = self(x_t, t, condition)
        return prediction, [found[name] for name in layers]

    def parameters(self) -> dict[str, nn.Parameter]:
        """What may be trained in this view, by file name."""
        return self.weights.parameters()

    @contextmanager
    def _watching(self, layers: Sequence[str], last: str | None = None) -> Iterator[dict[str, Tensor]]:
        """Inside, passes note the outputs of modules by name, and end at the one called `last`."""
        found: dict[str, Tensor] = {}
        divided = isinstance(self.weights, ShardedWeights)  # such a network has to end its passes properly

        def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def keep(module: nn.Module, inputs: Any, output: Any) -> None:
                found[name] = output[0] if isinstance(output, tuple) else output
                if name == last and not divided:
                    raise _LastLayerError

            return keep

        with ExitStack() as stack:
            for name in layers:
                stack.enter_context(_hooked(self.weights.network, name, hook(name)))
            if divided:
                stack.enter_context(carried(self.weights.network, found))
            yield found

    def _model_time(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.schedule.model_time(t).to(torch.promote_types(x_t.dtype, torch.float32))

    def _native(self, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        with self.weights.active():
            # Contiguous whatever order the network computes in (`memory.channels_last`): noise that is drawn like a
            # sample is filled in in the order of its strides.
            return self._call(self.weights.network, x_t, model_time, condition).contiguous()

    def _prediction(self, native: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        return Prediction(native.to(x_t.dtype), self.kind, x_t, Levels.at(self.schedule, t, x_t))

    def _central_difference(
        self, x_t: Tensor, model_time: Tensor, condition: Condition, tangent: tuple[Tensor, Tensor], step: Tensor
    ) -> tuple[Tensor, Tensor]:
        """F(p), and (F(p + h v) - F(p - h v)) / 2h with one h per sample, (B,), float64."""
        _refuse_half(self.weights.network)
        x_t = x_t.to(torch.promote_types(x_t.dtype, torch.float32))
        condition = Condition({name: _at_least_float32(value) for name, value in condition.tensors.items()})
        h = beside(x_t, step)
        ends: list[Tensor] = []
        with torch.autocast(x_t.device.type, enabled=False):
            native = self._native(x_t, model_time, condition)
            for sign in (1, -1):
                x, time = x_t + sign * h * tangent[0], model_time + sign * step * tangent[1]
                ends.append(self._native(x.to(x_t), time.to(model_time), condition).double())
        slope: Tensor = (ends[0] - ends[1]) / (2 * h)
        return native, slope


def _refuse_half(network: nn.Module) -> None:
    """Raises UserError for weights of half precision or less, in which neighbouring points often look the same."""
    found = {p.dtype for p in network.parameters() if p.is_floating_point() and torch.finfo(p.dtype).bits < 32}
    if found:
        kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise UserError(f"difference: a network with weights in {kinds} rounds central differences away; set "
                        "memory.base: fp32, or difference: 0 for forward mode")  # fmt: skip


def _at_least_float32(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32)) if value.is_floating_point() else value


def _relative_step(x_t: Tensor, tangent_x: Tensor, tangent_t: Tensor, difference: float) -> Tensor:
    """h, (B,), float64, such that h |tangent_x| / |x_t| + h |tangent_t| = difference."""
    lengths = [v.detach().double().flatten(1).norm(dim=1).clamp(min=1e-12) for v in (tangent_x, x_t)]
    speed: Tensor = lengths[0] / lengths[1] + tangent_t.detach().double().abs()
    return difference / speed.clamp(min=1e-6)


class _LastLayerError(Exception):
    """Ends a pass whose remaining layers nobody asked for."""


@contextmanager
def _hooked(network: nn.Module, name: str, hook: Callable[[nn.Module, Any, Any], None]) -> Iterator[None]:
    try:
        handle = network.get_submodule(name).register_forward_hook(hook)
        uncompile(network, name)
    except AttributeError as error:
        raise UserError(f"{type(network).__name__} has no module {name!r}; see its named_modules()") from error
    try:
        yield
    finally:
        handle.remove()


def uncompile(network: nn.Module, name: str) -> None:
    """Has a module, and whatever it is a part of, run as Python from now on: compiled code calls no later hooks.

    For good, since activation checkpointing may compute it once more after the hook is gone, and must do the same.
    """
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        module = network.get_submodule(".".join(parts[:length]))
        if module._compiled_call_impl is not None:
            module._compiled_call_impl = None


def split(prediction: Prediction, at: int) -> tuple[Prediction, Prediction]:
    """Cuts a batched prediction in two."""

    def part(index: slice) -> Prediction:
        old = prediction.levels
        levels = Levels(*(v[index] for v in (old.alpha, old.sigma, old.d_alpha, old.d_sigma)))
        return Prediction(prediction.native[index], prediction.kind, prediction.x_t[index], levels)

    return part(slice(0, at)), part(slice(at, None))


@contextmanager
def only_trainable(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside, exactly these parameters require a gradient; outside, none of them does."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
