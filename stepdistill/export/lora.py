"""From a student to a LoRA file that `pipe.load_lora_weights(folder)` reads on the teacher's pipeline.

On disk alpha always equals the rank: Diffusers and other programs lose a different alpha on the way, so alpha / rank
is folded into lora_B. All layers have one rank for the same reason; smaller ones are padded with zeros.

Letters: O output channels, I input channels, K x K kernel, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stepdistill.errors import UserError
from stepdistill.export.pipeline import atomic_folder, write_facts
from stepdistill.export.schedulers import family_scheduler
from stepdistill.export.sgm import sgm_names


if TYPE_CHECKING:
    from torch import Tensor, nn

    from stepdistill.families.base import ModelFamily
    from stepdistill.objectives.base import InferenceSpec


LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for
KOHYA_FILE = "kohya_lora.safetensors"

Naming = Literal["diffusers", "kohya", "both"]


@dataclass(frozen=True)
class LoraDifference:
    """What a LoRA of a given rank keeps of the difference between two networks.

    Attributes:
        state: PEFT keys (`layer.lora_A.weight`, `layer.lora_B.weight`), alpha equal to the rank.
        rank: R.
        residual: share of the difference that is lost, |difference - LoRA| / |difference| over all parameters, in
            [0, 1]; 0 if the networks are equal.
        untargeted: the part of `residual` that no rank could keep: parameters that are not a targeted layer's
            weight (biases, norms, other layers), on the same scale; residual**2 = untargeted**2 + truncated**2.
    """

    state: Mapping[str, Tensor]
    rank: int
    residual: float
    untargeted: float


def difference_lora(
    base: nn.Module, tuned: nn.Module, rank: int, targets: Sequence[str] | None = None
) -> LoraDifference:
    """The LoRA closest to a fully trained student: truncated singular value decomposition of each weight difference.

    With `rank` at least as large as the smaller side of a weight the layer is exact.

    Args:
        base: the teacher's network.
        tuned: the student's, same architecture.
        rank: R of every layer.
        targets: names, or last parts of names, of the Linear and Conv2d layers to use, as PEFT reads them; None
            means all such layers.
    """
    import torch

    if rank < 1:
        raise UserError(f"export.lora_rank must be at least 1, got {rank}")
    old, new = dict(base.named_parameters()), dict(tuned.named_parameters())
    if {k: v.shape for k, v in old.items()} != {k: v.shape for k, v in new.items()}:
        raise ValueError("a LoRA of the difference needs two networks with the same parameters")
    state: dict[str, Tensor] = {}
    truncated = total = 0.0
    used: set[str] = set()
    for name in _target_layers(base, targets):
        key = f"{name}.weight"
        used.add(key)
        with torch.no_grad():
            difference = new[key].cpu().double() - old[key].cpu().double()
            lora_a, lora_b = _factorize(difference, rank)
            truncated += float((difference.flatten(1) - lora_b.flatten(1) @ lora_a.flatten(1)).square().sum())
        total += float(difference.square().sum())
        state[f"{name}.lora_A.weight"] = lora_a.float().contiguous()
        state[f"{name}.lora_B.weight"] = lora_b.float().contiguous()
    rest = [k for k in old if k not in used]
    left = sum(float((new[k].detach().cpu().double() - old[k].detach().cpu().double()).square().sum()) for k in rest)
    total += left
    scale = 1 / total if total > 0 else 0.0
    return LoraDifference(state, rank, ((truncated + left) * scale) ** 0.5, (left * scale) ** 0.5)


def add_lora(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Adds adapters with PEFT's keys and alpha equal to the rank to the weights of a network, in place."""
    import torch

    with torch.no_grad():
        for key, lora_a in state.items():
            layer, _, side = key.rpartition(".lora_")
            if side == "A.weight":
                weight = network.get_parameter(f"{layer}.weight")
                change = state[f"{layer}.lora_B.weight"].flatten(1) @ lora_a.flatten(1)
                weight.add_(change.reshape(weight.shape).to(weight))


def _target_layers(network: nn.Module, targets: Sequence[str] | None) -> Iterator[str]:
    """Names of the layers that a LoRA can carry, in the network's order."""
    from torch import nn

    found = False
    for name, module in network.named_modules():
        # The low-rank form of a grouped convolution is not a grouped convolution.
        carries = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        if carries and (targets is None or any(name == t or name.endswith(f".{t}") for t in targets)):
            found = True
            yield name
    if not found:
        raise UserError(f"no Linear or Conv2d layer of the network is named like {', '.join(targets or ())}")


def _factorize(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(O, I) => (R, I) and (O, R); (O, I, K, K) => (R, I, K, K) and (O, R, 1, 1); best in least squares."""
    import torch

    matrix = difference.flatten(1)
    kept = min(rank, *matrix.shape)
    # Eigenvectors of the smaller Gram matrix, in float64: the same subspace as the singular vectors', at a fraction of
    # the cost; projecting onto it needs no division by singular values, which may be 0.
    if matrix.shape[0] <= matrix.shape[1]:
        left = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -kept:]
        right = left.T @ matrix
    else:
        right = torch.linalg.eigh(matrix.T @ matrix).eigenvectors[:, -kept:].T
        left = matrix @ right.T
    lora_a, lora_b = torch.zeros(rank, matrix.shape[1]).double(), torch.zeros(matrix.shape[0], rank).double()
    lora_a[:kept], lora_b[:, :kept] = right, left
    if difference.ndim == 4:
        return lora_a.reshape(rank, *difference.shape[1:]), lora_b[:, :, None, None]
    return lora_a, lora_b


def fold_alpha(lora_state: Mapping[str, Tensor], *, rank: int, alpha: float) -> dict[str, Tensor]:
    """The same adapters with alpha equal to the rank: lora_B times alpha / rank.

    Raises:
        ValueError: keys that are not PEFT's `layer.lora_A.weight` and `layer.lora_B.weight`, or another rank.
    """
    folded = {}
    for key, tensor in lora_state.items():
        side = key.rpartition(".lora_")[2]
        if side not in ("A.weight", "B.weight"):
            raise ValueError(
                f"{key!r} is no PEFT LoRA key; expected '<layer>.lora_A.weight' or '<layer>.lora_B.weight'"
            )
        found = tensor.shape[0 if side == "A.weight" else 1]
        if found != rank:
            raise ValueError(f"{key} has rank {found}, expected {rank}: one rank for all layers")
        folded[key] = (tensor.detach() * (1.0 if side == "A.weight" else alpha / rank)).contiguous().cpu()
    layers = {key.rpartition(".lora_")[0] for key in folded}
    if not layers or len(folded) != 2 * len(layers):
        raise ValueError(f"expected a lora_A and a lora_B for each layer, got {len(folded)} tensors")
    return folded


def export_lora(
    family: ModelFamily,
    lora_state: Mapping[str, Tensor],
    *,
    rank: int,
    alpha: float,
    folder: Path,
    spec: InferenceSpec | None = None,
    facts: Mapping[str, Any] | None = None,
    naming: Naming = "diffusers",
) -> Path:
    """Writes the LoRA by the pipeline's own `save_lora_weights`, and beside it the scheduler that it needs.

    `pipe.load_lora_weights(folder)`; `pipe.scheduler = <class>.from_pretrained(folder, subfolder="scheduler")`.
    Diffusers reads a file of either naming.

    Args:
        family: the loaded teacher.
        lora_state: PEFT keys of the network, without adapter names, one rank in all layers.
        rank: R.
        alpha: as trained; on disk it becomes R.
        folder: appears at once or not at all; an earlier LoRA in it is replaced.
        spec: how the student is called; None writes no scheduler.
        facts: more entries for distillation_config.json.
        naming: of the layers, "both" writes two files.

    Raises:
        UserError: Diffusers has no LoRA loader for this pipeline or cannot rename its layers, or the disk is full.
    """
    pipeline = family.pipeline
    if not family.supports_lora_loading:
        raise UserError(
            f"{type(pipeline).__name__} cannot load LoRA files in Diffusers; set export.lora=false, "
            "the exported pipeline holds the merged weights"
        )
    check_format(family, naming)
    layers = fold_alpha(lora_state, rank=rank, alpha=alpha)
    scheduler = pipeline.scheduler if spec is None else family_scheduler(family, spec)
    earlier = KOHYA_FILE if (folder / KOHYA_FILE).is_file() else LORA_FILE
    with atomic_folder(folder, marker=earlier) as new:
        if naming in ("diffusers", "both"):
            type(pipeline).save_lora_weights(
                new, weight_name=LORA_FILE, safe_serialization=True,
                **{f"{family.network_component}_lora_layers": layers},
            )  # fmt: skip
        if naming in ("kohya", "both"):
            renamed = sgm_names(layers, family.network_config.layers_per_block) if family.sgm_blocks else layers
            _save_kohya(renamed, rank, new / KOHYA_FILE)
        if spec is not None:
            scheduler.save_pretrained(new / "scheduler")
        write_facts(new, spec, type(pipeline), scheduler, {"rank": rank, **(facts or {})}, even=family.even_sigmas)
    return folder


def check_format(family: ModelFamily, naming: Naming) -> None:
    """Raises UserError if the layers of this architecture cannot be named so."""
    if naming != "diffusers" and not family.kohya_naming:
        raise UserError(f"export.lora_format: {naming} is for UNets; nothing in Diffusers renames the layers of a "
                        f"{family.pipeline_class}; set export.lora_format=diffusers")  # fmt: skip


def _save_kohya(layers: Mapping[str, Tensor], rank: int, file: Path) -> None:
    """A UNet's adapters with PEFT's keys, alpha equal to the rank => `lora_unet_<layer>.lora_down` and so on."""
    from diffusers.utils import convert_state_dict_to_kohya
    from safetensors.torch import save_file

    renamed = convert_state_dict_to_kohya({f"unet.{key}": tensor for key, tensor in layers.items()})
    # What these programs show of a file, and what they know a LoRA by.
    facts = {"format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": str(rank),
             "ss_network_alpha": str(rank)}  # fmt: skip
    save_file({key: tensor.float().contiguous() for key, tensor in renamed.items()}, file, metadata=facts)
