"""Adapter guidance distillation: guidance from small modules beside a network that is not changed.

Jensen and Sadat 2025, "Efficient Distillation of Classifier-Free Guidance using Adapters", arXiv 2503.07274.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stepdistill.errors import UserError
from stepdistill.guidance.modules import AdapterSettings, Form
from stepdistill.losses import ProgressiveWeighting, native_weight, weighted_mse
from stepdistill.objectives.base import Batch, Frozen, InferenceSpec, Loss, Phase, Role, Step, Trained
from stepdistill.objectives.guidance import LearnOn, check_steps, even_timesteps, noised_place, visited_of
from stepdistill.objectives.matching import Guidance


if TYPE_CHECKING:
    from stepdistill.cast import Cast


@dataclass(frozen=True)
class AGD:
    """An adapter says in one pass what guidance says in two, on paths of the guided teacher itself.

    It learns on stored paths, where guided sampling leads. Its own paths lead elsewhere wherever it guides too little,
    and there a further stage on noised samples helps.

    Attributes:
        form: "attention": tokens of a layer attend to scale, time and prompt; "offset": one vector is added to all.
        width: of the adapter's own tokens.
        frequency: standard deviation of the frequencies by which a scale is embedded, in turns per unit of scale; the
            paper's offset form has 1000.
        proportional: what is added is multiplied by scale - 1, as the correction of guidance is.
        heads: of attention in every layer; the paper has one.
        learn_on: stored "states" of the teacher's guided paths, as the paper; its own samples, noised ("pairs"); or
            noised "images".
        guidance: scale or range of scales where it learns on noised samples; stored states have their own.
        weighting: of the squared error of the clean sample: "native", which makes it the paper's, that of what the
            network says; "truncated_snr", max(SNR, 1), or "snr_plus_one", which count the steps in most noise more.
        call_guidance: the scale that the adapter has until it is given another.
        steps: of the previews and of the measurement; the student may be called with any number.
    """

    form: Form = "attention"
    width: int = 320
    frequency: float = 1.0
    proportional: bool = False
    heads: int = 1
    learn_on: LearnOn = "states"
    guidance: Guidance | None = None
    weighting: ProgressiveWeighting = "native"
    call_guidance: float = 3.0
    steps: int = 25

    def __post_init__(self) -> None:
        _ = self.adapter  # refuses what is no size
        check_steps(self.steps)
        if self.learn_on == "states" and self.guidance is not None:
            raise UserError("stored states have the scales of their paths; leave guidance out, or set learn_on to "
                            "pairs or to images")  # fmt: skip
        if self.learn_on != "states" and self.guidance is None:
            raise UserError(f"learn_on: {self.learn_on} needs guidance, a scale or a range such as [1, 4]")

    @property
    def adapter(self) -> AdapterSettings:
        """Size and form of the student."""
        return AdapterSettings(self.form, self.width, self.frequency, self.proportional, self.heads)

    def roles(self) -> Mapping[str, Role]:
        return {"teacher": Frozen(), "student": Trained(adapter=self.adapter)}

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("student", ("student",), self.loss, stream=self.learn_on),)

    def after_step(self, cast: Cast, step: int) -> None:
        return None

    def inference(self) -> InferenceSpec:
        return InferenceSpec(
            even_timesteps(self.steps), "own", guidance_scale=self.call_guidance, embeds_guidance=True,
            adapter=self.adapter,
        )  # fmt: skip

    def loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        """|eps_{theta, A}(x_t, t, c, scale) - eps_guided|^2, in the network's own output; only A is trained."""
        place = visited_of(batch) if self.guidance is None else noised_place(cast, batch, self.guidance)
        student = cast.denoiser("student")
        said = student(place.x_t, place.t, batch.condition.with_guidance(place.guidance))
        weight = native_weight(said.levels, said.kind, self.weighting)
        return Loss({"agd": weighted_mse(said.native, place.native, weight)})
