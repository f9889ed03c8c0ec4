"""The teacher's solver grid, pairs of neighbours on it, and its segments."""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.schedule import NoiseSchedule, VPSchedule


EDM_RANGE = (0.002, 80.0)  # lowest and highest sigma / alpha of Karras et al. 2022 (arXiv 2206.00364), table 1


class SolverGrid:
    """N + 1 times that rise from clean data, number 0, to the last training time, number N.

    For a VP network the times are timesteps that it has learnt. An even grid then has the index k i - 1 for number i,
    with k = T / N, as in the code of LCM (arXiv 2310.04378), rounded where N does not divide T.

    Args:
        schedule: the teacher's.
        steps: N.
        device: where the times are.
        lowest: time of number 0. Diffusers' LCM ends at the first training time, 1 / T, which it takes for clean.
        rho: None for times that rise evenly; else (sigma / alpha)^(1 / rho) does, over the range that the teacher has
            learnt, as in EDM, whose rho is 7: more of the times lie at little noise.

    Attributes:
        times: (N + 1,), float64.

    Raises:
        UserError: there are more steps than timesteps, or `lowest` is no lower than the time of number 1.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        steps: int,
        device: torch.device,
        *,
        lowest: float = 0.0,
        rho: float | None = None,
    ) -> None:
        total = schedule.num_train_timesteps
        if not 1 <= steps <= total:
            raise UserError(f"a solver grid of {steps} steps is not possible: give 1 to {total}, the number of "
                            "training timesteps")  # fmt: skip
        number = torch.arange(1, steps + 1, dtype=torch.float64)
        times = number / steps if rho is None else _even_in_root(schedule, steps, rho)
        if isinstance(schedule, VPSchedule):
            # The nearest learnt timesteps; where two would be the same, those around them make room.
            index = torch.minimum((times * total).round(), total - steps + number)
            times = (number + (index - number).cummax(0).values) / total
        if not 0 <= lowest < float(times[0]):
            raise UserError(f"a solver grid of {steps} steps cannot begin at time {lowest}: give 0 or more, and less "
                            f"than its first step, {float(times[0]):g}")  # fmt: skip
        # Made on the CPU, where looking at a number does not wait for an accelerator.
        self.times = torch.cat([torch.tensor([lowest], dtype=torch.float64), times]).to(device)

    @property
    def steps(self) -> int:
        """N, the number of solver steps from the last training time to clean data."""
        return len(self.times) - 1

    def pairs(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Neighbours on the grid, drawn evenly => (i, t_i, t_(i-1)), each (count,), with 1 <= i <= N."""
        i = torch.randint(1, self.steps + 1, (count,), device=self.times.device)
        return i, self.times[i], self.times[i - 1]

    def edges(self, segments: int) -> Tensor:
        """Numbers of the edges of M equal segments, (M + 1,), rising: floor(m N / M), 0 and N included.

        Raises:
            UserError: more segments than steps.
        """
        if not 1 <= segments <= self.steps:
            raise UserError(f"{self.steps} solver steps cannot be cut into {segments} segments; give 1 to "
                            f"{self.steps}")  # fmt: skip
        return torch.arange(segments + 1, device=self.times.device) * self.steps // segments

    def segment_start(self, i: Tensor, segments: int) -> Tensor:
        """Number of the edge below each number i >= 1, (B,); an edge itself belongs to the segment below it."""
        edges = self.edges(segments)
        return edges[torch.searchsorted(edges, i) - 1]

    def draw_end(self, i: Tensor, segments: int = 1) -> Tensor:
        """Where a jump from number i may end, (B,): even among the numbers from its segment's start to i - 1."""
        start = self.segment_start(i, segments)
        share = torch.rand(len(i), dtype=torch.float64, device=i.device)  # below 1
        return start + (share * (i - start)).long()


def _even_in_root(schedule: NoiseSchedule, steps: int, rho: float) -> Tensor:
    """Times of numbers 1 to N, (N,): the grid of Karras et al. 2022, eq. 5, with the last training time at its end."""
    ends = torch.tensor([1 / schedule.num_train_timesteps, 1.0], dtype=torch.float64)
    low, high = (-0.5 * schedule.log_snr(ends)).exp().clamp(*EDM_RANGE).pow(1 / rho)
    ratio = (low + torch.linspace(0, 1, steps, dtype=torch.float64) * (high - low)).pow(rho)
    times = schedule.t_from_log_snr(-2 * ratio.log())
    times[-1] = 1.0
    return times
