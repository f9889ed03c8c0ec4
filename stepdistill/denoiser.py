"""A denoiser is a view: one network, seen through one set of weights, one schedule and one convention.

Shapes: B batch, C channels, H height, W width of the latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stepdistill.adapters import SharedNetwork
from stepdistill.condition import Condition
from stepdistill.errors import UserError
from stepdistill.prediction import Levels, Prediction
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
    """

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
        model_time = self.schedule.model_time(t).to(torch.promote_types(x_t.dtype, torch.float32))
        with self.weights.active():
            native = self._call(self.weights.network, x_t, model_time, condition)
        return Prediction(native.to(x_t.dtype), self.kind, x_t, Levels.at(self.schedule, t, x_t))

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
            scale = scale.to(x_t).reshape((-1,) + (1,) * (x_t.ndim - 1))
        return with_prompt.guide(without, scale)

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
        network = self.weights.network
        found: dict[str, Tensor] = {}

        def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def keep(module: nn.Module, inputs: Any, output: Any) -> None:
                found[name] = output[0] if isinstance(output, tuple) else output
                if name == layers[-1]:
                    raise _LastLayerError

            return keep

        model_time = self.schedule.model_time(t).to(torch.promote_types(x_t.dtype, torch.float32))
        with ExitStack() as stack:
            for name in layers:
                stack.enter_context(_hooked(network, name, hook(name)))
            with self.weights.active(), suppress(_LastLayerError):
                self._call(network, x_t, model_time, condition)
        missing = [name for name in layers if name not in found]
        if missing:
            raise UserError(f"the network's pass does not come by its module {missing[0]!r} before it ends at "
                            f"{layers[-1]!r}; name layers in the order of the pass, or others")  # fmt: skip
        return [found[name] for name in layers]

    def parameters(self) -> dict[str, nn.Parameter]:
        """What may be trained in this view, by file name."""
        return self.weights.parameters()


class _LastLayerError(Exception):
    """Ends a pass whose remaining layers nobody asked for."""


@contextmanager
def _hooked(network: nn.Module, name: str, hook: Callable[[nn.Module, Any, Any], None]) -> Iterator[None]:
    try:
        handle = network.get_submodule(name).register_forward_hook(hook)
    except AttributeError as error:
        raise UserError(f"{type(network).__name__} has no module {name!r}; see its named_modules()") from error
    try:
        yield
    finally:
        handle.remove()


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
