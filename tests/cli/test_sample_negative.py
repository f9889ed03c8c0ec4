"""`stepdistill sample`: what its options mean, negative prompts above all, and which contradict each other."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from stepdistill import cli


def sample(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["stepdistill", "sample", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--negative-prompt", "red"], "does nothing at guidance scale 1; say how strongly it is to act"),
        (["--nasa", "0.3"], "add --negative-prompt TEXT"),
        (["--negative-prompt", "red", "--nasa", "0.3", "--nag", "2"], "two ways to do the same"),
        (["--negative-prompt", "red", "--nag", "2", "--base", "x/y"], "leave them out, and the negative prompt"),
        (["--negative-prompt", "red", "--base", "x/y", "--base-guidance", "1"], "give the base some, with"),
        (["--base-replaces", "1"], "base_replaces does nothing without a base; add --base MODEL"),
        (["--base-steps", "2"], "base_steps does nothing without a base; add --base MODEL"),
        (["--base-guidance", "3"], "base_guidance does nothing without a base; add --base MODEL"),
    ],
)
def test_options_that_would_have_no_effect_or_two_are_refused(
    words: list[str], message: str, sd_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "out"
    assert sample(monkeypatch, sd_folder, "a", "--guidance-scale", 1, "--output", output, *words) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_every_way_of_a_negative_prompt_changes_the_image(
    sd_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    student = tmp_path / "student"
    shutil.copytree(sd_folder, student)
    (student / "distillation_config.json").write_text(json.dumps({"steps": 1, "guidance_scale": 1.0}))
    negative = ("--negative-prompt", "z")
    ways = {
        "plain": (), "nothing": (*negative, "--nasa", 0), "nasa": (*negative, "--nasa", 0.9),
        "nag": (*negative, "--nag", 8), "guided": ("--guidance-scale", 6),
        "negative": ("--guidance-scale", 6, *negative),
    }  # fmt: skip
    images = {}
    for name, words in ways.items():
        assert sample(monkeypatch, student, "a", *words, "--output", tmp_path / name) == 0
        images[name] = Image.open(capsys.readouterr().out.strip()).tobytes()
    assert images["nothing"] == images["plain"]
    assert len({images[name] for name in ways if name != "nothing"}) == 5


def test_pictures_have_the_size_that_is_asked_for(
    sd_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (sd_folder, "a", "--steps", 1, "--output", tmp_path / "out", "--height", 24, "--width")
    assert sample(monkeypatch, *words, 40) == 0
    assert Image.open(capsys.readouterr().out.strip()).size == (40, 24)
    assert sample(monkeypatch, *words, 41) == 2
    assert "width is 41" in capsys.readouterr().err


def test_a_negative_prompt_that_flux_would_not_hear_is_refused(
    flux_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--guidance-scale", 3, "--negative-prompt", "red", "--output", tmp_path / "out")
    assert sample(monkeypatch, flux_folder, "a", *words) == 2
    assert "a negative prompt does nothing to FLUX" in capsys.readouterr().err
