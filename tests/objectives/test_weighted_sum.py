"""Sums of objectives: what their parts share, what they may not, and how a recipe writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.condition import Condition
from stepdistill.errors import UserError
from stepdistill.objectives import resolve
from stepdistill.objectives.base import Batch, Frozen, InferenceSpec, Loss, Phase, Role, Step, Trained
from stepdistill.objectives.clip import Clip
from stepdistill.objectives.denoising import Denoising
from stepdistill.objectives.disback import DisBack
from stepdistill.objectives.dmd import DMD
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.objectives.vsd import VSD
from stepdistill.objectives.weighted_sum import Part, WeightedSum
from stepdistill.options import plain_options
from stepdistill.recipe import Recipe, build_objective
from stepdistill.recipe_sections import ObjectiveConfig
from stepdistill.run import train
from tests.oracles.oracle import AT_08, Linear, Roles, four_signs, gaussian, linear_student
from tests.tiny import tiny_recipe


PLACE = "x.yaml: stages.0.objective"
LAST = (2,)  # of the three steps of the oracles' schedule


@dataclass(frozen=True)
class Game:
    """Phases and roles as a test wants them; every phase's loss is a number."""

    turns: tuple[Phase, ...] = ()
    cast_of: Mapping[str, Role] = field(default_factory=lambda: {"student": Trained()})
    ended: list[int] = field(default_factory=list)
    timesteps: tuple[int, ...] = (999,)

    def roles(self) -> Mapping[str, Role]:
        return self.cast_of

    def phases(self, step: int) -> Sequence[Phase]:
        return self.turns

    def after_step(self, cast: Any, step: int) -> None:
        self.ended.append(step)

    def inference(self) -> InferenceSpec:
        return InferenceSpec(self.timesteps)


def phase(*updates: str, value: float = 1.0, **options: Any) -> Phase:
    def loss(cast: Any, batch: Batch, step: Step) -> Loss:
        return Loss({"loss": torch.tensor(value)}, {"seen": torch.tensor(float(step.index))})

    return Phase("and".join(updates), updates, loss, **options)


def sum_of(*games: Any) -> WeightedSum:
    return WeightedSum(tuple(Part(game, label=f"part{number}") for number, game in enumerate(games)))


# ---- one game ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen(Batch):
    """A batch whose noise is its pair_noise, and which counts how often it was asked."""

    def noise(self) -> Tensor:
        assert self.pair_noise is not None
        return self.pair_noise


def oracles(network: Linear) -> Roles:
    def mean(value: float) -> Any:
        return lambda condition: torch.full((len(condition),), value, dtype=torch.float64)

    return Roles({"student": linear_student(network), "teacher": gaussian(mean(0.7), 0.5),
                  "critic": gaussian(mean(network.b.item()), network.a.item())})  # fmt: skip


def chosen(z: Tensor) -> Chosen:
    nothing = Condition({"none": torch.zeros(len(z))})
    return Chosen(nothing, nothing, (1,), z.device, pair_noise=z)


def test_the_gradient_is_the_weighted_sum_of_the_parts_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    z, eps = four_signs()
    monkeypatch.setattr(torch, "randn_like", lambda x: eps.to(x.dtype))
    at = {"guidance": 1.0, "t_min": AT_08[0], "t_max": AT_08[1], "timesteps": LAST}
    vsd, dmd2 = VSD(**at), DMD2(**at)
    network = Linear(1.3, -0.4)

    def gradient(objective: Any) -> Tensor:
        network.zero_grad()
        (turn,) = (turn for turn in objective.phases(0) if turn.updates == ("student",))
        turn.loss(oracles(network), chosen(z), Step(0)).total.backward()
        return torch.stack([network.a.grad, network.b.grad])

    hybrid = WeightedSum((Part(vsd, 0.3), Part(dmd2, 2.0)))
    expected = 0.3 * gradient(vsd) + 2.0 * gradient(dmd2)
    torch.testing.assert_close(gradient(hybrid), expected, rtol=0, atol=1e-12)
    assert expected.abs().min() > 1e-3


def test_parts_that_call_the_student_alike_share_its_sample() -> None:
    network = Linear(1.3, -0.4)
    roles = oracles(network)
    student, calls = roles.denoiser("student"), []
    call = student._call

    def counting(module: Any, *given: Any) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return call(module, *given)

    student._call = counting
    z = four_signs()[0]
    vsd, dmd2 = VSD(timesteps=LAST), DMD2(timesteps=LAST, critic_updates=1)
    both = WeightedSum((Part(vsd), Part(dmd2)))
    apart = (vsd, dmd2)
    for objective in (*apart, both):
        for turn in objective.phases(0):
            turn.loss(roles, chosen(z), Step(0))
    assert len(calls) == 4 + 2, "a call for each phase of each, and of the sum"
    assert sum(calls) == 3, "one sample with a graph for each student's turn"


def test_every_call_of_the_loss_makes_a_new_sample() -> None:
    torch.manual_seed(0)
    nothing = Condition({"none": torch.zeros(4)})
    batch = Batch(nothing, nothing, (1,), torch.device("cpu"))
    (turn, _) = WeightedSum((Part(VSD(timesteps=LAST)),)).phases(0)
    values = [turn.loss(oracles(Linear(1.3, -0.4)), batch, Step(0)).total.item() for _ in range(2)]
    assert values[0] != values[1]
    assert batch.samples is None


def test_terms_and_logged_values_stand_under_the_names_of_the_parts() -> None:
    parts = (
        Part(Game((phase("student", value=2.0),)), 0.5, "a"),
        Part(Game((phase("student", value=3.0),)), label="b"),
    )
    (turn,) = WeightedSum(parts).phases(0)
    loss = turn.loss(oracles(Linear(1, 0)), chosen(torch.zeros(1, 1)), Step(7))
    assert {name: value.item() for name, value in loss.terms.items()} == {"a/loss": 1.0, "b/loss": 3.0}
    assert {name: value.item() for name, value in loss.logged.items()} == {"a/seen": 7.0, "b/seen": 7.0}
    assert loss.total.item() == 4.0


def test_phases_that_train_a_common_role_are_one_and_the_others_follow_in_order() -> None:
    first = Game((phase("student"), phase("critic", repeats=2)), {"student": Trained(), "critic": Trained()})
    second = Game((phase("critic", repeats=5), phase("student", stream="images"), phase("guide")),
                  {"student": Trained(), "critic": Trained(), "guide": Trained()})  # fmt: skip
    turns = sum_of(first, second).phases(0)
    assert [(t.updates, t.stream, t.repeats) for t in turns] == [
        (("student",), "images", 1), (("critic",), "prompts", 5), (("guide",), "prompts", 1),
    ]  # fmt: skip


def test_a_parts_own_phases_stay_apart() -> None:
    twice = Game((phase("student", stream="images"), phase("student", stream="pairs")))
    turns = sum_of(twice, Game((phase("student"),))).phases(0)
    assert [turn.stream for turn in turns] == ["images", "pairs"]


def test_a_role_that_only_one_part_knows_may_be_trained_beside() -> None:
    turns = WeightedSum((Part(VSD()), Part(DMD2(gan_weight=1e-3)))).phases(0)
    assert [(turn.updates, turn.stream, turn.repeats) for turn in turns] == [
        (("student",), "prompts", 1), (("critic", "discriminator"), "images", 5),
    ]  # fmt: skip


def test_after_step_reaches_every_part() -> None:
    games = Game(), Game()
    sum_of(*games).after_step(oracles(Linear(1, 0)), 3)
    assert [game.ended for game in games] == [[3], [3]]


def test_a_part_whose_phases_end_leaves_the_others_alone() -> None:
    hybrid = WeightedSum((Part(VSD()), Part(Clip(weight_steps=3))))
    assert set(hybrid.roles()) == {"teacher", "critic", "student"}
    assert all(len(hybrid.phases(step)) == 2 for step in range(4))
    told = [turn.loss.args[0] for turn in (hybrid.phases(0)[0], hybrid.phases(2)[0])]
    assert [[part.name for part, _ in turn] for turn in told] == [["vsd", "clip"], ["vsd"]]


# ---- what does not fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("games", "message"),
    [
        ((), "a sum needs parts"),
        ((Game(cast_of={"critic": Trained()}), Game(cast_of={"critic": Frozen()})),
         "parts 'part0' and 'part1' both have a role 'critic', but not the same"),
        ((Game((phase("student", stream="images"),)), Game((phase("student", stream="pairs"),))),
         "train student together on different data .images and pairs.; play them in stages"),
        ((Game((phase("student", "critic"),), {"student": Trained(), "critic": Trained()}),
          Game((phase("student"), phase("critic")), {"student": Trained(), "critic": Trained()})),
         "in which 'part1' keeps critic fixed; play them in stages"),
        ((VSD(), VSD(timesteps=(999, 499))),
         r"call the student differently \(timesteps: \(999,\) and \(999, 499\)\); give both the same timesteps"),
        ((VSD(), Denoising()),
         r"call the student differently \(at timesteps \[999\], and with the teacher's own scheduler\); .*called_as"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused_before_anything_is_loaded(games: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sum_of(*games)


def test_parts_whose_later_phases_do_not_fit_are_refused_at_once_too() -> None:
    paired = Part(DMD(critic_lead=10))
    adversary = Part(DMD2(critic_lead=10, gan_weight=1e-3, gan_loss="relativistic"))
    with pytest.raises(UserError, match="train student together on different data"):
        WeightedSum((paired, adversary))


def test_two_parts_of_one_name_need_labels() -> None:
    with pytest.raises(UserError, match="two parts are called 'vsd'; give them a label each"):
        WeightedSum((Part(VSD()), Part(VSD(guidance=2.0))))
    hybrid = WeightedSum((Part(VSD()), Part(VSD(guidance=2.0), label="weak")))
    assert [part.name for part in hybrid.parts] == ["vsd", "weak"]


# ---- in a recipe ---------------------------------------------------------------------------------------------------


def build(**options: Any) -> Any:
    return build_objective(ObjectiveConfig(name="sum", **options), PLACE)


def test_a_recipe_writes_parts_as_entries_of_their_own() -> None:
    parts = [{"objective": {"name": "vsd", "guidance": 3}, "weight": 1},
             {"objective": {"name": "stepdistill.objectives.dmd2:DMD2", "guidance": 2}, "label": "b"}]  # fmt: skip
    built = build(parts=parts)
    assert built == WeightedSum((Part(VSD(guidance=3.0)), Part(DMD2(guidance=2.0), label="b")))
    written = plain_options(built)
    assert written["parts"][0]["objective"]["name"] == "vsd"
    assert written["parts"][1]["objective"]["critic_updates"] == 5, "defaults are written out"
    assert build(**json.loads(json.dumps(written))) == built


def test_objectives_nest_to_any_depth() -> None:
    inner = {"name": "sum", "parts": [{"objective": {"name": "dmd2"}}, {"objective": {"name": "clip"}, "weight": 0.5}]}
    built: Any = build_objective(ObjectiveConfig(name="disback", base=inner, nodes=2), PLACE)
    assert built == DisBack(WeightedSum((Part(DMD2()), Part(Clip(), 0.5))), nodes=2)
    assert build_objective(ObjectiveConfig(name="disback", **plain_options(built)), PLACE) == built


@pytest.mark.parametrize(
    ("parts", "lines"),
    [
        ([{"objective": {"name": "vsd", "guidence": 3}}],
         [".parts.0.objective.guidence: unknown key; did you mean 'guidance'?"]),
        ([{"objective": {"name": "vsd"}}, {"objective": {"name": "vsdd"}}],
         [".parts.1.objective.name: unknown objective 'vsdd'; did you mean 'vsd'? (or give 'package.module:Class')"]),
        ([{"objective": {"guidance": 3}}], [".parts.0.objective.name: expected an objective's name, got None"]),
        ([{"objective": "vsd"}], [".parts.0.objective: expected a mapping, got 'vsd'"]),
        ([{"objective": {"name": "vsd"}, "wieght": 2}], [".parts.0.wieght: unknown key; did you mean 'weight'?"]),
        ([{"objective": {"name": "vsd"}, "weight": "much"}], [".parts.0.weight: expected a number, got 'much'"]),
        ([{"weight": 2}], [".parts.0.objective: missing; this key has no default"]),
        (["vsd"], [".parts.0: expected a mapping, got 'vsd'"]),
        ({"a": 1}, [".parts: expected a list, got a mapping"]),
        ([{"objective": {"name": "esd", "entropy": 2}}],
         [".parts.0.objective: entropy is a share of the critic's unconditional score, from 0 to 1, not 2.0"]),
        ([{"objective": {"name": "vsd", "t_min": "a", "t_mox": 1}}, {"objective": {"name": "clip", "modle": "x"}}],
         [".parts.0.objective.t_min: expected a number, got 'a'",
          ".parts.0.objective.t_mox: unknown key; did you mean 't_max'?",
          ".parts.1.objective.modle: unknown key; did you mean 'model'?"]),
        ([{"objective": {"name": "disback", "base": {"name": "dmd2", "t_mox": 1}}}],
         [".parts.0.objective.base.t_mox: unknown key; did you mean 't_max'?"]),
    ],
)  # fmt: skip
def test_a_mistake_in_a_part_is_told_as_exactly_as_one_at_the_top(parts: Any, lines: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build(parts=parts)
    assert str(caught.value).splitlines() == [PLACE + line for line in lines]


def test_a_sum_without_parts_says_what_is_missing() -> None:
    with pytest.raises(UserError, match=r"objective\.parts: missing"):
        build()
    with pytest.raises(UserError, match="a sum needs parts"):
        build(parts=[])


def test_a_run_of_a_sum_logs_its_parts_and_resolves_its_recipe(sd_folder: str, tmp_path: Path) -> None:
    content = tiny_recipe(sd_folder, tmp_path / "run")
    objective = {
        "name": "sum",
        "parts": [{"objective": {"name": "vsd"}}, {"objective": {"name": "esd"}, "weight": 0.5}],
    }
    stage = {**content["stages"][0], "objective": objective, "steps": 1, "accumulate": 1}
    result = train(Recipe.from_mapping({**content, "stages": [stage]}))
    line = json.loads((result.folder / "metrics.jsonl").read_text())
    assert {"vsd/matching", "esd/matching", "vsd/critic", "esd/critic", "student/gradient_norm"} <= set(line)
    saved = Recipe.load(result.folder / "recipe.yaml")
    assert saved.stages[0].objective.options["parts"][1]["objective"]["entropy"] == 0.5
    assert saved.resolved() == saved


def test_the_bundled_names_are_those_of_the_classes() -> None:
    assert resolve("sum") is WeightedSum
    assert resolve("disback") is DisBack
    assert resolve("clip") is Clip
