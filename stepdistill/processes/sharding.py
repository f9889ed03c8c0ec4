"""Networks that are divided among processes by FSDP2, and what has to be known of them elsewhere.

A role with full weights has a network of its own, of which every process keeps a part: parameters, gradients, states
of the optimiser and moving averages. Adapters, heads and the frozen teacher are small or shared, and stay whole.
Checkpoints and results hold whole tensors, so that nothing on disk depends on the number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True)
class Sharding:
    """How networks are divided: over all processes, gathered block by block while they compute."""

    mesh: DeviceMesh

    @classmethod
    def over_all(cls, device: torch.device, num_processes: int) -> Sharding:
        """Over all processes of the run."""
        return cls(init_device_mesh(device.type, (num_processes,)))

    def shard(self, network: nn.Module) -> ShardedWeights:
        """Divides a network in place: each block of its lists is gathered by itself, the rest together.

        Parameters are let go again after the forward pass as well, so that whatever is written to a role between two
        passes is what the next one computes with.
        """
        for block in blocks_of(network):
            fully_shard(block, mesh=self.mesh, reshard_after_forward=True)
        fully_shard(network, mesh=self.mesh, reshard_after_forward=True)
        return ShardedWeights(network)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The parts of a network that are gathered by themselves."""
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
    return [block for blocks in lists for block in blocks if any(True for _ in block.parameters())]


def gathered_bytes(network: nn.Module) -> int:
    """What a process holds for a while of the others' parts of a network that is at work, at the most.

    Whatever is in no block; the block at work, with its gradients; and the next block, which is gathered meanwhile.
    """
    blocks = sorted(_bytes(block) for block in blocks_of(network))
    return _bytes(network) - sum(blocks) + sum(blocks[-2:]) + sum(blocks[-1:])


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


class ShardedWeights:
    """A divided network of a role's own."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.requires_grad_(False)
        self._parameters = dict(network.named_parameters())  # the parts; while the network computes it has others

    def active(self) -> AbstractContextManager[None]:
        return nullcontext()

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._parameters)

    def plain_state(self) -> dict[str, Tensor]:
        return {key: whole(value.detach()).clone() for key, value in self.network.state_dict().items()}

    @contextmanager
    def trainable(self) -> Iterator[None]:
        """Inside, the parameters require gradients."""
        self._require(True)
        try:
            yield
        finally:
            self._require(False)

    def _require(self, wanted: bool) -> None:
        # The gathered parameters are objects of their own, and remember what the parts said when they were first made.
        blocks = [module for module in self.network.modules() if isinstance(module, FSDPModule)]
        for block in blocks:
            block.unshard()
        self.network.requires_grad_(wanted)
        for block in blocks:
            block.reshard()
        for parameter in self._parameters.values():
            parameter.requires_grad_(wanted)


@contextmanager
def carried(network: nn.Module, found: dict[str, Tensor]) -> Iterator[None]:
    """Inside, what a pass notes down in `found` leaves the network as a part of its output.

    FSDP2 gathers parameters for the backward pass when a gradient reaches the network's output. A loss that looks at
    inner features alone never comes by it; so for FSDP2's hook, and for nobody else, the features are output too.
    """

    def add(module: nn.Module, inputs: Any, output: Any) -> Any:
        return output, dict(found)

    def take(module: nn.Module, inputs: Any, output: Any) -> Any:
        own, features = output
        found.update(features)
        return own

    first, last = network.register_forward_hook(add, prepend=True), network.register_forward_hook(take)
    try:
        yield
    finally:
        first.remove()
        last.remove()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a divided tensor; all processes have to ask for it. Any other tensor is returned as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    # What waits in the host's memory is gathered on the device: the processes may be joined there alone.
    there: Any = tensor.to(tensor.device_mesh.device_type)
    found: Tensor = there.full_tensor()
    return found


def gathered(tree: Any) -> Any:
    """Nested dicts, lists and tuples with every divided tensor made whole, on the CPU."""
    if isinstance(tree, DTensor):
        return whole(tree).detach().cpu()
    if isinstance(tree, Mapping):
        return {key: gathered(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gathered(value) for value in tree)
    return tree


def placed_like(value: Tensor, example: Tensor) -> Tensor:
    """A whole tensor divided as the example is, if that is."""
    if not isinstance(example, DTensor) or isinstance(value, DTensor) or value.shape != example.shape:
        return value
    return distribute_tensor(value.to(example.device), example.device_mesh, example.placements)


def optimizer_state_like(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """An optimiser's whole state with moments divided as the parameters are, which are numbered in order."""

    def placed(number: Any, value: Any) -> Any:
        return placed_like(value, parameters[int(number)]) if isinstance(value, Tensor) else value

    moments = {n: {key: placed(n, value) for key, value in own.items()} for n, own in state["state"].items()}
    return {**state, "state": moments}


def wanted() -> bool:
    """Whether `accelerate launch` was asked for FSDP; accelerate itself heeds the request on accelerators alone."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
