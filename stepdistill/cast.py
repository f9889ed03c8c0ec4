"""The roles of a game by name: which weights each one computes with, and which parameters belong to whom."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from stepdistill.adapters import LoraSettings, SharedNetwork, copy_into
from stepdistill.denoiser import AdapterWeights, Denoiser, OwnWeights, Weights, only_trainable
from stepdistill.errors import UserError
from stepdistill.families.base import ModelFamily
from stepdistill.objectives.base import Role, Trained


@dataclass(frozen=True)
class RoleState:
    """Trained weights of one role, to start another stage or an export from.

    Attributes:
        lora: the adapter's settings, or None for a full network.
        tensors: the adapter's or the network's parameters by file name.
    """

    lora: LoraSettings | None
    tensors: Mapping[str, Tensor]


class Cast:
    """All networks of one stage.

    Frozen roles and adapter roles share the teacher's network; a role with full weights gets a copy of its own.

    Args:
        family: the loaded teacher.
        roles: from the objective.
        lora: settings of every role that is trained as an adapter; trained roles not named get full copies.
        starts: where trained roles start from; those not named start as the teacher.
        checkpointing: activation checkpointing in all networks that are trained.
        seed: of the adapters' first values, which must agree between processes and after a resume.
    """

    def __init__(
        self,
        family: ModelFamily,
        roles: Mapping[str, Role],
        *,
        lora: Mapping[str, LoraSettings] | None = None,
        starts: Mapping[str, RoleState] | None = None,
        checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        lora = lora or {}
        self.family = family
        self.lora = {name: lora[name] for name, role in roles.items() if isinstance(role, Trained) and name in lora}
        self.trained = tuple(name for name, role in roles.items() if isinstance(role, Trained))
        full = [name for name in self.trained if name not in self.lora]
        # Copies first: after the first adapter the shared network's layers are wrapped.
        copies = {name: self._copy_of_teacher() for name in full}
        self.shared = SharedNetwork(family.network())
        self._weights: dict[str, Weights] = {name: OwnWeights(network) for name, network in copies.items()}
        for name in roles:
            if name not in copies:
                if name in self.lora:
                    self.shared.add(name, self.lora[name], seed)
                self._weights[name] = AdapterWeights(self.shared, name if name in self.lora else None)
        for name, start in (starts or {}).items():
            if name in self.trained:
                self._start(name, start)
        if checkpointing:
            self._enable_checkpointing(copies.values())

    def denoiser(self, role: str) -> Denoiser:
        """The view of one role."""
        return self.family.denoiser(self._weights[role])

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The trainable parameters of a role, by file name."""
        return self._weights[role].parameters()

    def state(self, role: str) -> RoleState:
        """A copy of a role's trained weights."""
        tensors = {name: p.detach().clone() for name, p in self.parameters(role).items()}
        return RoleState(self.lora.get(role), tensors)

    def plain_state(self, role: str) -> dict[str, Tensor]:
        """The state of a plain network that computes what the role computes, adapters folded in."""
        return self._weights[role].plain_state()

    @contextmanager
    def trainable(self, roles: Sequence[str]) -> Iterator[None]:
        """Inside, exactly these roles' parameters require gradients."""
        with only_trainable([p for role in roles for p in self.parameters(role).values()]):
            yield

    def summary(self) -> list[tuple[str, str, int, int]]:
        """(role, kind of weights, trainable parameters, all parameters) for the table printed at start."""
        total = sum(p.numel() for p in self.family.network().parameters())
        adapters = sum(p.numel() for name in self.lora for p in self.parameters(name).values())
        rows = []
        for role in self._weights:
            own = sum(p.numel() for p in self.parameters(role).values()) if role in self.trained else 0
            kind = "frozen" if role not in self.trained else self._kind(role)
            rows.append((role, kind, own, total - adapters + (own if role in self.lora else 0)))
        return rows

    def release(self) -> None:
        """Takes the adapters off the teacher's network, so that the next stage finds it as it was loaded."""
        if self.lora:
            plain = self._copy_of_teacher()
            self.family.pipeline.register_modules(**{self.family.network_component: plain})

    def _kind(self, role: str) -> str:
        lora = self.lora.get(role)
        return "full copy" if lora is None else f"LoRA rank {lora.rank}"

    def _copy_of_teacher(self) -> nn.Module:
        network = self.family.plain_network()
        state = self.family.network().state_dict()
        plain = {k.replace(".base_layer.", "."): v for k, v in state.items() if ".lora_" not in k}
        network.load_state_dict(plain)
        return network

    def _start(self, role: str, start: RoleState) -> None:
        if start.lora != self.lora.get(role):
            before = "full" if start.lora is None else "LoRA"
            raise UserError(f"role {role!r} starts from {before} weights that its stage ({self._kind(role)}) cannot "
                            "hold; give both stages the same weights")  # fmt: skip
        copy_into(self.parameters(role), start.tensors, f"the start of role {role!r}")

    def _enable_checkpointing(self, copies: Iterable[nn.Module]) -> None:
        for network in copies:
            network.enable_gradient_checkpointing()  # type: ignore[operator]
        if self.lora:
            self.shared.enable_checkpointing()
