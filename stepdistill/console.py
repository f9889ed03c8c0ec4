"""What a run shows in the terminal: a progress bar with losses, images per second and time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from stepdistill.trainer import Progress


# measures of health that the progress line shows => (label, format); differences with their sign
SHOWN = {
    "critic_ratio": ("critic/teacher", ".2f"),
    "direction": ("direction", ".2f"),
    "mean": ("mean", "+.2f"),
    "contrast": ("contrast", ".2f"),
    "saturation": ("saturation", "+.2f"),
    "diversity": ("diversity", ".2f"),
}


class Display:
    """Shows progress on a rich console; silent without one.

    Args:
        console: rich's, or None.
    """

    def __init__(self, console: Console | None) -> None:
        self._console = console
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def say(self, text: str) -> None:
        """One line."""
        if self._console is not None:
            self._console.print(text, highlight=False)

    def table(self, table: object) -> None:
        """A rich table."""
        if self._console is not None:
            self._console.print(table)

    def roles(self, rows: Sequence[tuple[str, str, int, int]]) -> None:
        """The table of trainable parameters per role."""
        if self._console is None:
            return
        from rich.table import Table

        table = Table("role", "weights", "trainable", "network", title="roles", title_justify="left")
        for role, kind, own, total in rows:
            table.add_row(role, kind, f"{own:,}", f"{total:,}")
        self._console.print(table)

    @contextmanager
    def counting(self, text: str) -> Iterator[Callable[[int, int], None]]:
        """A bar for work that counts: gives a function of (done, total)."""
        if self._console is None:
            yield lambda done, total: None
            return
        from rich.progress import Progress as Bar

        with Bar(console=self._console, transient=True) as bar:
            task = bar.add_task(text, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    @contextmanager
    def training(self, title: str) -> Iterator[None]:
        """The bar of one stage."""
        if self._console is None:
            yield
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
                   TextColumn("{task.fields[news]}", table_column=Column(overflow="fold")))  # fmt: skip
        with Bar(*columns, console=self._console) as bar:
            self._bar, self._task = bar, bar.add_task(title, total=None, news="")
            try:
                yield
            finally:
                self._bar = self._task = None

    def step(self, progress: Progress) -> None:
        """Moves the bar; where there is no terminal, prints a line now and then."""
        if self._console is None:
            return
        losses = " ".join(f"{k} {v:.4f}" for k, v in progress.losses.items() if "/" not in k)
        minutes, seconds = divmod(int(progress.seconds_left), 60)
        news = f"{losses} | {progress.images_per_second:.1f} img/s | {minutes}:{seconds:02d} left"
        health = health_line(progress.health, progress.doubts)
        if self._bar is not None and self._task is not None:  # health has a line of its own below the losses
            self._bar.update(self._task, completed=progress.step, total=progress.steps,
                             news="\n".join(filter(None, (news, health))))  # fmt: skip
        if not self._console.is_terminal and (progress.step % 50 == 0 or progress.step == progress.steps):
            news = " | ".join(filter(None, (news, health)))
            self._console.print(f"step {progress.step}/{progress.steps} {news}", highlight=False, markup=False)


def health_line(measures: Mapping[str, float], doubts: Sequence[str]) -> str:
    """The last measurement of a student's health in short, and what is wrong with it; empty where nothing is known."""
    shown = [f"{label} {measures[name]:{form}}" for name, (label, form) in SHOWN.items() if name in measures]
    return " | ".join([*([" ".join(shown)] if shown else []), *(f"DOUBT: {doubt}" for doubt in doubts)])
