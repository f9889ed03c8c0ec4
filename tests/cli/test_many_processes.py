"""`stepdistill train --num-processes` starts itself through accelerate; a process that dies ends the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from stepdistill.checkpoint import load_tree
from stepdistill.cli import app
from stepdistill.errors import UserError
from stepdistill.processes.launch import open_accelerator
from stepdistill.recipe import Recipe
from stepdistill.run import train
from tests.tiny import tiny_recipe


ROOT = Path(__file__).resolve().parents[2]
SGD = {"optimizer": {"name": "SGD", "lr": 0.05}, "ema": 0.9}


def write_recipe(folder: Path, teacher: str, *, steps: int, student: Any, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    content = tiny_recipe(teacher, folder / "run", **changes)
    players = {"default": SGD, "student": {"weights": student}}
    content["stages"][0] |= {"steps": steps, "players": players}
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(content))  # JSON is YAML
    return file


def start(recipe: Path, *words: str, command: tuple[str, ...] = ("-m", "stepdistill")) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [sys.executable, *command, "train", str(recipe), "--quiet", *words],
        cwd=recipe.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    roles = load_tree(run / "checkpoints" / "stage-0" / "roles")
    return {f"{role}/{name}": tensor for role, entry in roles.items() for name, tensor in entry["tensors"].items()}


def assert_same_run(one: Path, other: Path) -> None:
    a, b = final_weights(one), final_weights(other)
    assert a.keys() == b.keys()
    worst = max((float((a[name] - b[name]).abs().max()), name) for name in a)
    assert worst[0] <= 1e-6, worst
    logs = [
        [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)
    ]
    assert logs[0] == logs[1], "only one process writes"


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("way", ["adapters", "divided", "accelerate"])
def test_a_recipe_played_by_two_processes_is_the_run_of_one(sd_folder: str, tmp_path: Path, way: str) -> None:
    student: Any = "full" if way == "divided" else {"lora": {"rank": 2}}
    extra = {"previews": {"every": 1, "prompts": 2}, "health": {"every": 1, "grace": 100}} if way == "divided" else {}
    export = {"export": {"pipeline": way == "divided", "lora": False}}
    files = [write_recipe(tmp_path / who, sd_folder, steps=2, student=student, **extra, **export) for who in "ab"]
    train(Recipe.load(files[0]))
    if way == "accelerate":
        launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port",
                    "0", "-m", "stepdistill")  # fmt: skip
        process = start(files[1], command=launcher)
    else:
        process = start(files[1], "--num-processes", "2", *(["--shard"] if way == "divided" else []))
    _, errors = process.communicate(timeout=140)
    assert process.returncode == 0, errors
    assert_same_run(tmp_path / "a" / "run", tmp_path / "b" / "run")
    if way == "divided":
        pictures = [sorted(p.name for p in (tmp_path / who / "run" / "previews").iterdir()) for who in "ab"]
        assert pictures[0] == pictures[1]
        assert (tmp_path / "b" / "run" / "pipeline" / "model_index.json").is_file()


def worker(parent: int, rank: int) -> int:
    """The process of a rank, among all descendants of one."""
    for folder in Path("/proc").iterdir():
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            line = (folder / "stat").read_text()
        except OSError:
            continue
        own = folder.name.isdigit() and int(line.rpartition(")")[2].split()[1]) == parent
        if own and f"RANK={rank}".encode() in variables:
            return int(folder.name)
    raise AssertionError("no such process")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes through /proc")
def test_a_process_that_dies_ends_the_others_with_an_error(sd_folder: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "a", sd_folder, steps=100_000, student={"lora": {"rank": 2}})
    process = start(recipe, "--num-processes", "2")
    log = tmp_path / "a" / "run" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not log.is_file() or not log.read_text():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        other = worker(process.pid, 0)
        os.kill(worker(process.pid, 1), signal.SIGKILL)
        _, errors = process.communicate(timeout=40)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "error: process 1 was killed by signal 9, and the other processes were ended" in errors
    assert not Path(f"/proc/{other}").exists(), "nobody is left waiting"


# ---- what is refused before anything is started --------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "a", "no-such-teacher", steps=2, student="full")


def refusal(*words: str) -> str:
    """What the command refuses with."""
    found = CliRunner().invoke(app, ["train", *words])
    assert isinstance(found.exception, UserError), found.output
    return str(found.exception)


def test_a_batch_that_cannot_be_divided_is_refused_before_processes_are_started(recipe: Path) -> None:
    told = refusal(str(recipe), "stages.0.batch_size=3", "stages.0.accumulate=1", "--num-processes", "2")
    assert "stages.0: batch_size 3 with accumulate 1 cannot be divided among 2 processes" in told


def test_dividing_networks_needs_several_processes_and_no_fp16(recipe: Path) -> None:
    assert "add --num-processes" in refusal(str(recipe), "--shard")
    assert "use bf16 or fp32" in refusal(str(recipe), "precision=fp16", "--shard", "--num-processes", "2")


@pytest.mark.parametrize("option", ["channels_last", "compile"])
def test_dividing_networks_leaves_their_layout_and_code_alone(recipe: Path, option: str) -> None:
    told = refusal(str(recipe), f"memory.{option}=true", "--shard", "--num-processes", "2")
    assert f"memory.{option}: " in told
    assert f"use {option}: false" in told


def test_processes_that_accelerate_has_started_start_no_others(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "accelerate has started several processes already" in refusal(str(recipe), "--num-processes", "2")


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "one DeepSpeed engine.*use --use_fsdp with --fsdp_version 2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM holds language models only"),
        ({"ACCELERATE_USE_FSDP": "true"}, "add --fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
    ],
)
def test_what_accelerate_cannot_do_for_several_networks_is_refused(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], told: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told):
        open_accelerator(Recipe.load(recipe))


def test_a_second_run_of_a_process_has_a_precision_of_its_own(recipe: Path) -> None:
    for precision, known in (("fp32", "no"), ("bf16", "bf16"), ("fp32", "no")):
        assert open_accelerator(Recipe.load(recipe, [f"precision={precision}"])).mixed_precision == known


def test_more_processes_than_gpus_are_refused(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    told = refusal(str(recipe), "device=auto", "--num-processes", "2")
    assert "torch sees 1 GPU(s), and every process needs one of its own; use --num-processes 1" in told
