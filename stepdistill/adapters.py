"""Several sets of adapters on one frozen network. The only file that touches peft's state.

Two rules make it safe to have student, teacher and critic share one network:

1. Switching changes the *route* only, never `requires_grad`. peft's own `set_adapter` also flips `requires_grad`, and
   a student whose forward pass came first then gets no gradient, without an error.
2. Under activation checkpointing, the recomputation in the backward pass takes the route of its forward pass, whatever
   is active by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepdistill.errors import UserError
from stepdistill.processes.sharding import placed_like
from stepdistill.seeds import seed_of


# In a forward pass => a context in which that pass's layers can be computed once more.
Capture = Callable[[], Callable[[], AbstractContextManager[None]]]
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LoraSettings:
    """Size and place of a low-rank adapter: dW = (alpha / rank) B A on every layer whose name ends in a target."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


class SharedNetwork:
    """One frozen network and named adapters on it.

    Args:
        network: a torch module; it is frozen here and its own parameters are never written again.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.requires_grad_(False)
        self._layers: list[BaseTunerLayer] = []
        self._route: str | None = None
        self._captures: list[Capture] = []
        self._checkpointing = False

    def add(self, name: str, settings: LoraSettings, seed: int = 0) -> None:
        """Adds a LoRA that changes nothing yet (B = 0); its A is a function of seed and name on every process.

        Raises:
            UserError: no layer of the network matches the targets.
        """
        config = LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, target_modules=list(settings.targets), init_lora_weights=True
        )
        try:
            with torch.random.fork_rng(devices=[]):  # peft draws A from the global generator
                torch.manual_seed(seed_of(seed, name))
                inject_adapter_in_model(config, self.network, name)
        except ValueError as error:
            network = type(self.network).__name__
            raise UserError(f"role {name!r}: no layer of {network} ends in any of the LoRA targets "
                            f"{', '.join(settings.targets)}; set weights.lora.targets") from error  # fmt: skip
        self._layers = [module for module in self.network.modules() if isinstance(module, BaseTunerLayer)]
        for key, module in self.network.named_modules():
            if ".lora_" in key and key.endswith(f".{name}") and any(p.dtype in HALF for p in module.parameters()):
                module.float()  # peft takes the base's type, in which small updates would be lost
        # peft leaves the newest adapter active and trainable; here nothing is, until somebody says so.
        for parameter in self.parameters(name).values():
            parameter.requires_grad_(False)
        self._apply(self._route)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's own parameters under peft's file names, `...to_q.lora_A.weight`."""
        found = {}
        for key, parameter in self.network.named_parameters():
            layer, mark, rest = key.partition(".lora_")  # ...to_q | .lora_ | A.student.weight
            if mark and rest.split(".")[1] == name:
                found[f"{layer}{mark}{rest.replace(f'.{name}.', '.')}"] = parameter
        return found

    @property
    def route(self) -> str | None:
        """The adapter that the network computes with at the moment, or None for the bare base."""
        return self._route

    @contextmanager
    def routed(self, name: str | None) -> Iterator[None]:
        """Inside, the network computes with this adapter, or as the bare base for None."""
        before = self._route
        self._apply(name)
        try:
            yield
        finally:
            self._apply(before)

    def replay_also(self, capture: Capture) -> None:
        """Has a recomputation take more than the route of its forward pass.

        Args:
            capture: called in the forward pass; gives a context for the recomputation.
        """
        self._captures.append(capture)

    def enable_checkpointing(self) -> None:
        """Activation checkpointing through Diffusers' switch, with a function that replays the route."""

        def replaying(function: Any, *args: Any) -> Any:
            route, captured = self._route, [capture() for capture in self._captures]

            def run(*inputs: Any) -> Any:
                with ExitStack() as stack:
                    for context in captured:
                        stack.enter_context(context())
                    stack.enter_context(self.routed(route))
                    return function(*inputs)

            return checkpoint(run, *args, use_reentrant=False)

        network: Any = self.network
        network.enable_gradient_checkpointing(gradient_checkpointing_func=replaying)
        self._checkpointing = True

    def remove_all(self) -> None:
        """Takes all adapters off: the network's modules then are those that it was loaded with."""
        for name, layer in list(self.network.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                parent, _, attribute = name.rpartition(".")
                setattr(self.network.get_submodule(parent), attribute, layer.get_base_layer())
        network: Any = self.network
        if self._layers:
            del network.peft_config  # peft's record of what was added
        if self._checkpointing:
            network.disable_gradient_checkpointing()
        self._layers, self._route, self._checkpointing = [], None, False

    def plain_state(self, name: str | None) -> dict[str, Tensor]:
        """The state of a plain network with the adapter folded in (None: the base), under the original names."""
        state = {
            key.replace(".base_layer.", "."): value.detach().clone()
            for key, value in self.network.state_dict().items()
            if ".lora_" not in key
        }
        if name is None:
            return state
        for key, layer in self.network.named_modules():
            if isinstance(layer, BaseTunerLayer) and name in layer.lora_A:
                with torch.no_grad():
                    state[f"{key}.weight"] += layer.get_delta_weight(name).to(state[f"{key}.weight"].dtype)
        return state

    def _apply(self, name: str | None) -> None:
        self._route = name
        for layer in self._layers:
            layer._active_adapter = [] if name is None else [name]
            layer._disable_adapters = name is None


def copy_into(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Writes a state into parameters of the same names and shapes.

    Raises:
        UserError: names or shapes differ; `what` says where the state came from.
    """
    missing: Sequence[str] = sorted(set(parameters) ^ set(state))
    wrong = [k for k in parameters if k in state and parameters[k].shape != state[k].shape]
    if missing or wrong:
        raise UserError(f"{what} does not fit: {len(missing)} names and {len(wrong)} shapes differ, "
                        f"first {[*missing, *wrong][0]!r}; was it made with another rank, other targets "
                        "or another student.shape?")  # fmt: skip
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(placed_like(state[key], parameter))
