"""How much smaller than its teacher a student is, in words that fit every architecture."""

from __future__ import annotations

from dataclasses import dataclass

from stepdistill.errors import UserError


@dataclass(frozen=True)
class NetworkShape:
    """What is removed from the teacher's network to get the student's; whatever is not said stays as it is.

    Attributes:
        channels: share of the channels that is kept everywhere, above 0 and at most 1; every attention head gets
            narrower, their number stays.
        layers: how many layers are kept: of a UNet, pairs of residual and attention layer on the way down of each
            stage, one number or one for each stage that is kept (the way up has one more, as in Diffusers); of a
            transformer, blocks, one number (of FLUX two: blocks of two streams and blocks of one). Kept are evenly
            spaced ones, first and last among them.
        depth: how many transformer layers are kept in every attention layer of a UNet; one number or one for each
            stage.
        remove: parts by their names in the teacher's network: of a UNet "mid_block", innermost stages such as
            "down_blocks.3" (their way up goes too), and attention layers such as "down_blocks.0.attentions"; of a
            transformer blocks such as "transformer_blocks.5" or FLUX's "single_transformer_blocks.5".
    """

    channels: float = 1.0
    layers: int | tuple[int, ...] | None = None
    depth: int | tuple[int, ...] | None = None
    remove: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.channels <= 1:
            raise UserError(f"channels is {self.channels:g}; it is the share that is kept, above 0 and at most 1")
        for name, given in (("layers", self.layers), ("depth", self.depth)):
            if given is not None and min((given,) if isinstance(given, int) else given, default=0) < 1:
                raise UserError(f"{name} is {given}; at least 1 has to be kept of each")
