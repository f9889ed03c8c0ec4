"""The roles of a game by name: which weights each one computes with, and which parameters belong to whom."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy as shallow_copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepdistill.adapters import HALF, LoraSettings, SharedNetwork, copy_into
from stepdistill.condition import Condition
from stepdistill.denoiser import AdapterWeights, Denoiser, OwnWeights, Weights, only_trainable
from stepdistill.errors import UserError
from stepdistill.families.base import ModelFamily
from stepdistill.families.smaller import Plan
from stepdistill.guidance.attached import AttachedAdapter, BesideWeights
from stepdistill.guidance.files import build_adapter
from stepdistill.guidance.modules import AdapterSettings
from stepdistill.network_shape import NetworkShape
from stepdistill.objectives.base import Head, Recorded, Role, Trained
from stepdistill.processes.sharding import ShardedWeights, Sharding, whole
from stepdistill.seeds import seed_of


@dataclass(frozen=True)
class DenoiserHead:
    """A module and the layers of a denoiser whose features it takes.

    Attributes:
        module: list of features => whatever its objective made it for.
        layers: names of the denoiser's modules.
    """

    module: nn.Module
    layers: tuple[str, ...]

    def __call__(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The head on a denoiser's features of x_t, (B, C, H, W), at t, (B,)."""
        features = denoiser.features(x_t, t, condition, self.layers)
        output: Tensor = self.module([feature.float() for feature in features])
        return output


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

    Frozen roles and adapter roles share the teacher's network; a role with full weights gets a copy of its own, or a
    smaller network that begins with those of the teacher's weights that fit. Heads are small modules beside them; a
    recorded role has weights of the same kind as the role it is like.

    Args:
        family: the loaded teacher.
        roles: from the objective.
        lora: settings of every role that is trained as an adapter; trained roles not named get full copies.
        starts: where trained roles start from; those not named start as the teacher.
        checkpointing: activation checkpointing in all networks that are trained.
        seed: of the adapters' first values, which must agree between processes and after a resume.
        size: pixel size of the images, for which heads are built; None: the teacher's own.
        sharding: how networks of a role's own are divided among processes; None: each process has all of them.
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
        size: int | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        lora = lora or {}
        self.family = family
        kinds = {name: role.like if isinstance(role, Recorded) else name for name, role in roles.items()}
        networks = {name for name, kind in kinds.items() if isinstance(roles[kind], Trained)}
        self.lora = {name: lora[kinds[name]] for name in roles if name in networks and kinds[name] in lora}
        self.recorded = tuple(name for name, role in roles.items() if isinstance(role, Recorded))
        # Copies first: after the first adapter the shared network's layers are wrapped.
        self._embedding = roles_with_guidance(family, roles, lora)
        shapes = shapes_of_roles(family, roles, lora)
        self._shapes = {name: shapes[kind] for name, kind in kinds.items() if kind in shapes}
        self._seed = seed
        beside = adapter_roles(roles, lora)
        apart = networks - beside.keys() - self.lora.keys()
        self._weights: dict[str, Weights] = {name: self._own(name, sharding) for name in roles if name in apart}
        copies = [weights.network for weights in self._weights.values()]
        self.shared = SharedNetwork(family.network())
        for name, role in roles.items():
            if name not in apart and not isinstance(role, Head):
                if name in self.lora:
                    self.shared.add(name, self.lora[name], seed)
                self._weights[name] = AdapterWeights(self.shared, name if name in self.lora else None)
        for name, settings in beside.items():
            self._weights[name] = self._beside(settings, seed_of(seed, kinds[name]))
        heads = {name: role for name, role in roles.items() if isinstance(role, Head)}
        self._heads = {name: self._head(role, seed_of(seed, name), size) for name, role in heads.items()}
        self._names: dict[str, str] = {}
        self.trained = tuple(name for name, role in roles.items() if self._learns(name, role))
        noting = [name for name, head in self._heads.items() if any(True for _ in head.module.buffers())]
        self.kept = tuple(dict.fromkeys((*self.trained, *self.recorded, *noting)))  # whose tensors a checkpoint holds
        self.parked: dict[str, dict[str, Tensor]] = {}
        self._begin(starts or {}, kinds)
        if checkpointing:
            self._enable_checkpointing(copies)

    def denoiser(self, role: str, *, renamed: bool = True) -> Denoiser:
        """The view of one role; if not `renamed`, of the role itself, whoever plays it in this view of the cast."""
        weights, family = self._weights[self._name(role) if renamed else role], self.family
        if isinstance(weights, BesideWeights):
            return Denoiser(weights.told(family.forward), weights, family.schedule, family.kind)
        return family.denoiser(weights)

    def networks(self) -> dict[str, nn.Module]:
        """Every network once, by role; "teacher" is the one that frozen roles and LoRAs share."""
        own = {name: w.network for name, w in self._weights.items() if w.network is not self.shared.network}
        return {"teacher": self.shared.network, **own}

    def heads(self) -> list[DenoiserHead]:
        """All heads."""
        return list(self._heads.values())

    def head(self, role: str) -> DenoiserHead:
        """A head, together with the layers whose features it takes."""
        return self._heads[self._name(role)]

    def plan(self, role: str) -> Plan:
        """A role's network in terms of the teacher's: which of its parts come from which."""
        return self.family.plan(self._shapes.get(self._name(role)))

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Texts that are no prompts of a batch => their condition, at full precision as cached prompts are."""
        with torch.autocast(self.family.device.type, enabled=False):
            return self.family.encode_prompts(prompts).to(self.family.device)

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The trainable parameters of a role, by file name."""
        role = self._name(role)
        if role in self._heads:
            return dict(self._heads[role].module.named_parameters())
        return self._weights[role].parameters()

    def tensors(self, role: str) -> dict[str, Tensor]:
        """Everything that a checkpoint keeps of a role: its parameters, and buffers of modules of its own."""
        weights = self._weights.get(role)
        if role in self._heads:
            return {**self.parameters(role), **dict(self._heads[role].module.named_buffers())}
        return weights.tensors() if isinstance(weights, BesideWeights) else {**self.parameters(role)}

    def buffers(self) -> list[Tensor]:
        """What heads note down while they compute: not trained, and changed by every pass."""
        return [buffer for head in self._heads.values() for buffer in head.module.buffers()]

    def copy(self, source: str, target: str) -> None:
        """Writes one role's weights into a recorded or trained role of the same kind."""
        copy_into(self.parameters(target), self.parameters(source), f"role {source!r}")

    def blend(self, source: str, target: str, decay: float) -> None:
        """Moves a recorded or trained role towards another of its kind: target <- decay target + (1 - decay) source.

        The sum is taken in float32 at least, whatever the weights are kept in.
        """
        new = self.parameters(source)
        with torch.no_grad():
            for name, old in self.parameters(target).items():
                wide = torch.promote_types(old.dtype, torch.float32)
                if old.dtype == wide:
                    old.lerp_(new[name].to(wide), 1 - decay)
                else:
                    old.copy_(old.to(wide).lerp_(new[name].to(wide), 1 - decay))

    def park(self, role: str, key: str) -> None:
        """Keeps a copy of a role's weights in the CPU's memory and in checkpoints, in a file named after the key."""
        assert key and not set(key) & set("/\\:"), f"{key!r} cannot be a part of a file's name"
        self.parked[key] = {name: whole(p.detach()).cpu().clone() for name, p in self.parameters(role).items()}

    def fetch(self, key: str, role: str) -> None:
        """Writes parked weights into a recorded or trained role of the same kind."""
        copy_into(self.parameters(role), self.parked[key], f"what was parked as {key!r}")

    def renamed(self, names: Mapping[str, str]) -> Cast:
        """The same cast, in which a game that asks for role `a` is given role `names[a]`."""
        view = shallow_copy(self)
        view._names = {**self._names, **{a: self._name(b) for a, b in names.items()}}
        return view

    def state(self, role: str) -> RoleState:
        """A copy of a role's trained weights, in the CPU's memory: later stages need the device's for their own."""
        tensors = {name: whole(p.detach()).to("cpu", copy=True) for name, p in self.tensors(role).items()}
        return RoleState(self.lora.get(role), tensors)

    def plain_state(self, role: str) -> dict[str, Tensor]:
        """The state of a plain network that computes what the role computes, adapters folded in."""
        return self._weights[role].plain_state()

    @contextmanager
    def trainable(self, roles: Sequence[str]) -> Iterator[None]:
        """Inside, exactly these roles' parameters require gradients."""
        own = {self._name(role): self._weights.get(self._name(role)) for role in roles}
        divided = [weights for weights in own.values() if isinstance(weights, ShardedWeights)]
        plain = [role for role in own if not isinstance(own[role], ShardedWeights)]
        with ExitStack() as stack:
            for weights in divided:
                stack.enter_context(weights.trainable())
            stack.enter_context(only_trainable([p for role in plain for p in self.parameters(role).values()]))
            yield

    @property
    def divided(self) -> bool:
        """Whether there is a network that computes only where all processes take part."""
        return any(isinstance(weights, ShardedWeights) for weights in self._weights.values())

    def summary(self) -> list[tuple[str, str, int, int]]:
        """(role, kind of weights, trainable parameters, all parameters) for the table printed at start."""
        total = sum(p.numel() for p in self.family.network().parameters())
        adapters = sum(p.numel() for name in self.lora for p in self.parameters(name).values())
        rows = []
        for role in self._weights:
            own = sum(p.numel() for p in self.parameters(role).values()) if role in self.trained else 0
            kind = self._kind(role) if role in self.trained else "recorded" if role in self.recorded else "frozen"
            more = role in self.lora or isinstance(self._weights[role], BesideWeights)
            size = sum(p.numel() for p in self.parameters(role).values()) if role in self._shapes else total - adapters
            rows.append((role, kind, own, size + (own if more else 0)))
        for role in self._heads:
            own = sum(p.numel() for p in self.parameters(role).values())
            rows.append((role, "head", own, own))
        return rows

    def release(self) -> None:
        """Takes the adapters off the teacher's network, so that the next stage finds it as it was loaded."""
        for weights in self._weights.values():
            if isinstance(weights, BesideWeights):
                weights.attached.remove()
        self.shared.remove_all()

    def _name(self, role: str) -> str:
        """The role that is meant by a name in this view of the cast; see `renamed`."""
        return self._names.get(role, role)

    def _learns(self, name: str, role: Role) -> bool:
        """Whether a role has something to train: a head without parameters, such as a mean over channels, has not."""
        return bool(self.parameters(name)) if isinstance(role, Head) else isinstance(role, Trained)

    def _kind(self, role: str) -> str:
        lora, weights = self.lora.get(role), self._weights[role]
        if isinstance(weights, BesideWeights):
            return f"adapter, {weights.share:.1%}"
        full = "smaller" if role in self._shapes else "full copy"
        return full if lora is None else f"LoRA rank {lora.rank}"

    def _beside(self, settings: AdapterSettings, seed: int) -> BesideWeights:
        """An adapter at work beside the shared network, for as long as its role computes."""
        attached = AttachedAdapter(self.shared.network, build_adapter(self.shared.network, settings, seed)).install()
        self.shared.replay_also(attached.capture)
        return BesideWeights(AdapterWeights(self.shared, None), attached)

    def _own(self, role: str, sharding: Sharding | None) -> Weights:
        """A network of a role's own, divided at once: no device holds a second whole one beside the teacher."""
        network = self._copy_of_teacher(role)
        return OwnWeights(network) if sharding is None else sharding.shard(network)

    def _copy_of_teacher(self, role: str | None = None) -> nn.Module:
        """A plain network with the teacher's weights, of the shape and with the inputs that a role asks for."""
        embeds_guidance = role in self._embedding
        shape = None if role is None else self._shapes.get(role)
        with torch.random.fork_rng(devices=[]):  # for the weights that a smaller network has not from the teacher
            torch.manual_seed(seed_of(self._seed, "smaller"))
            network = self.family.plain_network(embeds_guidance=embeds_guidance, shape=shape)
        state = self.family.network().state_dict()
        plain = {k.replace(".base_layer.", "."): v for k, v in state.items() if ".lora_" not in k}
        if embeds_guidance:
            plain = {**self._silent_guidance(network), **plain}
        if shape is None:
            network.load_state_dict(plain)
        else:
            self.family.plan(shape).fill(network, plain)
        if role is not None and next(network.parameters()).dtype in HALF:
            network.float()  # what is trained or averaged needs more digits than what is only computed with
        return network

    def _silent_guidance(self, network: nn.Module) -> dict[str, Tensor]:
        """The weight by which a network takes a guidance scale, such that no scale changes anything."""
        weight = self.family.guidance_weight
        assert weight is not None, "a family without such networks has refused to make one"
        return {weight: torch.zeros_like(network.get_parameter(weight))}

    def _head(self, role: Head, seed: int, size: int | None) -> DenoiserHead:
        """Builds a head for features of the shapes that the teacher gives for one image of `size` pixels."""
        layers = self._layers(role)
        # Quantised layers keep bytes, in which nothing is computed.
        example = next(p for p in self.family.network().parameters() if p.is_floating_point())
        x = torch.zeros(1, *self.family.latent_shape(size), dtype=example.dtype, device=example.device)
        null = self.family.null_condition(1).to(example.device, example.dtype)
        t = torch.full((1,), 0.5, dtype=torch.float64, device=x.device)
        with torch.no_grad():
            features = self.family.denoiser(AdapterWeights(self.shared, None)).features(x, t, null, layers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = role.build([tuple(feature.shape[1:]) for feature in features])
        return DenoiserHead(module.to(x.device, torch.float32).requires_grad_(False), layers)

    def _layers(self, role: Head) -> tuple[str, ...]:
        """What a head looks at; the word "blocks" stands for the family's own choice at several depths."""
        if tuple(role.layers) == ("blocks",):
            return self.family.spread_layers
        return tuple(role.layers) or self.family.feature_layers

    def _begin(self, starts: Mapping[str, RoleState], kinds: Mapping[str, str]) -> None:
        """Gives trained roles what they start from, and recorded ones the weights of the roles that they are like."""
        for name, start in starts.items():
            if name in (*self.trained, *self.recorded):
                self._start(name, start)
        for name in self.recorded:
            if name not in starts:
                self.copy(kinds[name], name)

    def _start(self, role: str, start: RoleState) -> None:
        if role not in self._heads and start.lora != self.lora.get(role):
            before = "full" if start.lora is None else "LoRA"
            raise UserError(f"role {role!r} starts from {before} weights that its stage ({self._kind(role)}) cannot "
                            "hold; give both stages the same weights")  # fmt: skip
        tensors = start.tensors
        if role in self._embedding:
            tensors = {**self._silent_guidance(self._weights[role].network), **tensors}
        copy_into(self.tensors(role), tensors, f"the start of role {role!r}")

    def _enable_checkpointing(self, copies: Iterable[nn.Module]) -> None:
        for network in copies:
            network.enable_gradient_checkpointing()  # type: ignore[operator]
        if self.lora or any(isinstance(weights, BesideWeights) for weights in self._weights.values()):
            self.shared.enable_checkpointing()


def adapter_roles(roles: Mapping[str, Role], lora: Mapping[str, LoraSettings]) -> dict[str, AdapterSettings]:
    """The adapters of the roles that are one beside the teacher's network, recorded ones included.

    Raises:
        UserError: one of them is to be a LoRA as well.
    """
    trained = {name: role.adapter for name, role in roles.items() if isinstance(role, Trained) and role.adapter}
    for name in trained.keys() & lora.keys():
        raise UserError(f"role {name!r} is an adapter beside the network and cannot be a LoRA; leave its weights out "
                        "of the recipe")  # fmt: skip
    recorded = {name: role.like for name, role in roles.items() if isinstance(role, Recorded)}
    return trained | {name: trained[like] for name, like in recorded.items() if like in trained}


def shapes_of_roles(
    family: ModelFamily, roles: Mapping[str, Role], lora: Mapping[str, LoraSettings]
) -> dict[str, NetworkShape]:
    """The roles whose networks are smaller than the teacher's.

    Raises:
        UserError: one of them is to be something beside the teacher's network, or its shape does not fit this one.
    """
    found = {}
    for name, role in roles.items():
        if not isinstance(role, Trained) or role.shape is None:
            continue
        if name in lora:
            raise UserError(f"role {name!r} is smaller than the teacher, so there is no network for a LoRA of it; "
                            "give it weights: full, or leave out student.shape")  # fmt: skip
        if role.adapter is not None:
            raise UserError(f"role {name!r} is an adapter beside the teacher's own network; leave out student.shape")
        family.plan(role.shape)  # refuses
        found[name] = role.shape
    return found


def roles_with_guidance(
    family: ModelFamily, roles: Mapping[str, Role], lora: Mapping[str, LoraSettings]
) -> frozenset[str]:
    """The roles whose networks take a guidance scale as an input.

    Raises:
        UserError: one of them is trained as a LoRA, or networks of this family cannot.
    """
    found = {name for name, role in roles.items() if isinstance(role, Trained) and role.embeds_guidance}
    for name in found & lora.keys():
        raise UserError(f"role {name!r} takes the guidance scale as an input, for which a LoRA has no layer; give it "
                        "weights: full, or set the objective's embed_guidance: false")  # fmt: skip
    if found:
        family.guidance_options()  # refuses
    return frozenset(found | {n for n, role in roles.items() if isinstance(role, Recorded) and role.like in found})
