"""Real images are a protocol's own and all of them; what cannot be measured is missing alone, with what it wanted."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image
from torch import Tensor

from stepdistill.bench import benchmark, protocols
from stepdistill.bench.benchmark import Options, run_benchmark
from stepdistill.bench.generate import ModelUnderTest
from stepdistill.bench.metrics.base import MissingError
from stepdistill.bench.metrics.kit import dinov2_network
from stepdistill.bench.metrics.weights import INCEPTION_FILE, Weights
from stepdistill.bench.own_copies import own_images
from stepdistill.bench.protocols import STANDARDS, PromptProtocol, Standard, prepare
from stepdistill.errors import UserError


OFFLINE = Weights(offline=True)
FEATURES = f"{__name__}:features_of"
ALL = Standard(2, 8, False, "", "all three", 3, 10, "nowhere")
OWN = Standard(2, 8, False, "", "those of the prompts", 2, 10, "nowhere", own_images=True)


def features_of(images: Tensor, prompts: object) -> Tensor:
    return images.mean((2, 3))


def pictures(folder: Path, names: Sequence[str], side: int = 12) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side), (60 * i, 255 - 40 * i, 90)).save(folder / name)
    return folder


def text(file: Path, *lines: object) -> Path:
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return file


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a small protocol of three images and two prompts."""
    monkeypatch.setattr(protocols, "STANDARDS", {"small": ALL})
    real = pictures(tmp_path / "real", ["a.png", "b.png", "deeper/c.png"])
    prepare("small", real, text(tmp_path / "p.txt", "one", "two"), tmp_path / "small", weights=OFFLINE,
            features=FEATURES)  # fmt: skip
    return tmp_path / "small"


def test_the_protocols_want_as_many_real_images_as_their_papers() -> None:
    assert {name: (s.count, s.real, s.own_images) for name, s in STANDARDS.items()} == {
        "coco30k": (30_000, 40_504, False), "coco10k-sdxl": (10_000, 10_000, True), "mjhq30k": (30_000, 30_000, True),
    }  # fmt: skip


@pytest.mark.parametrize("names", [["a.png", "b.png"], ["a.png", "b.png", "c.png", "train/d.png"]])
def test_other_images_than_the_protocols_are_refused_with_the_remedy(tmp_path: Path, names: list[str]) -> None:
    prompts = text(tmp_path / "p.txt", "one", "two")
    with pytest.raises(UserError, match=rf"holds {len(names)} images.*small wants 3, all three; give a folder"):
        own_images(pictures(tmp_path / "real", names), prompts, "small", ALL)


def test_a_protocol_of_the_prompts_own_images_takes_those_that_the_prompts_name(tmp_path: Path) -> None:
    real = pictures(tmp_path / "real", ["x/1.png", "y/2.jpg", "z/3.png"])
    plain = text(tmp_path / "p.txt", "one", "two")
    with pytest.raises(UserError, match=r"holds 3 images.*wants 2.*prompts as \.jsonl with prompt and file_name"):
        own_images(real, plain, "small", OWN)
    named = text(tmp_path / "p.jsonl", {"prompt": "three", "file_name": "3.png"}, {"prompt": " "},
                 {"prompt": "one", "file_name": "z/1.jpg"}, {"prompt": "two", "file_name": "2.jpg"})  # fmt: skip
    assert [file.name for file in own_images(real, named, "small", OWN)] == ["1.png", "3.png"]
    by_id = text(tmp_path / "meta.json", {i: {"category": "x", "prompt": i} for i in ("2", "3", "1")})
    assert [file.name for file in own_images(real, by_id, "small", OWN)] == ["2.jpg", "3.png"]
    (real / "z/3.png").unlink()
    with pytest.raises(UserError, match=r"holds 1 images.*of the 2 names"):
        own_images(real, named, "small", OWN)
    with pytest.raises(UserError, match=r"MJHQ's meta_data\.json"):
        own_images(real, text(tmp_path / "odd.json", {"a": 1}), "small", OWN)


def test_statistics_of_other_weights_are_no_reference(prepared: Path) -> None:
    study = PromptProtocol.standard("small", prepared).study("cpu", ["fid"], OFFLINE)
    assert study.missing == {} and len(study.metrics) == 1
    facts = json.loads((prepared / "protocol.json").read_text())
    facts["weights"][FEATURES] = "0123456789abcdef"
    (prepared / "protocol.json").write_text(json.dumps(facts))
    study = PromptProtocol.standard("small", prepared).study("cpu", ["fid", "kid"], OFFLINE)
    assert set(study.missing) == {"fid", "kid"} and study.metrics == ()
    assert "other weights" in study.missing["fid"] and "0123456789ab" in study.missing["fid"]
    assert "prepare it again" in study.missing["fid"]


def test_networks_that_cannot_be_loaded_are_missing_and_the_rest_is_measured(tmp_path: Path) -> None:
    for name in ("clip", "dinov2", "pickscore"):
        (tmp_path / name).mkdir()
    (tmp_path / "dinov2/config.json").write_text('{"model_type": "dinov2"}')
    (tmp_path / "dinov2/pytorch_model.bin").touch()
    (tmp_path / "vgg.safetensors").write_bytes(b"torn")
    given = {name: str(tmp_path / name) for name in ("clip", "dinov2", "pickscore")}
    weights = Weights({**given, "vgg16": str(tmp_path / "vgg.safetensors")}, offline=True)
    protocol = PromptProtocol.of_file(str(text(tmp_path / "p.txt", "one")))
    study = protocol.study("cpu", ["clip_score", "lpips", "pickscore", FEATURES], weights)
    assert [metric.column for metric in study.metrics] == [FEATURES]
    assert set(study.missing) == {"clip_score", "lpips", "pickscore"}
    for metric, name in (("clip_score", "clip"), ("lpips", "vgg16"), ("pickscore", "pickscore")):
        assert f"--weights {name}=PATH" in study.missing[metric]
    with pytest.raises(MissingError, match=r"cannot be loaded.*--weights dinov2=PATH"):
        dinov2_network(weights, "cpu", lambda images: images)


def test_models_of_different_sizes_have_a_report_without_their_distance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, name in ((benchmark.plots, "pareto"), (benchmark.plots, "sample_grid"), (benchmark.page, "save_page")):
        monkeypatch.setattr(place, name, lambda *args: None)
    monkeypatch.setattr(
        "stepdistill.lpips.load_lpips", lambda path, device: lambda a, b: (a - b).abs().mean((1, 2, 3))
    )
    (tmp_path / "vgg.safetensors").touch()
    models = [ModelUnderTest(name, str(pictures(tmp_path / name, ["1.png", "2.png"], side)), 1, 1.0)
              for name, side in (("first", 12), ("same", 12), ("other", 16))]  # fmt: skip
    options = Options(("lpips", FEATURES), Weights({"vgg16": str(tmp_path / "vgg.safetensors")}, offline=True))
    protocol = PromptProtocol.of_file(str(text(tmp_path / "p.txt", "one", "two")))
    found = run_benchmark(models, protocol=protocol, output=tmp_path / "report", options=options)
    assert [row.lpips for row in found.rows] == [None, 0, None]
    assert set(found.protocol["missing"]) == {"lpips of other"}
    assert "16 x 16 pixels, the first model's 12 x 12" in found.to_markdown()
    assert all(FEATURES in row.others for row in found.rows)


def test_inception_is_downloaded_once_and_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    place, calls = tmp_path / INCEPTION_FILE, []

    def torn(folder: str) -> None:
        (Path(folder) / INCEPTION_FILE).write_bytes(b"half")
        raise OSError("connection lost")

    monkeypatch.setattr("cleanfid.downloads_helper.check_download_inception", torn)
    with pytest.raises(MissingError, match=r"connection lost.*--weights inception=PATH"):
        Weights().find("inception")
    assert not place.exists()

    def download(folder: str) -> None:
        with (Path(folder) / INCEPTION_FILE).open("wb") as file:
            file.write(b"whole"[:2])
            file.flush()
            time.sleep(0.05)
            calls.append(place.exists())
            file.write(b"whole"[2:])

    monkeypatch.setattr("cleanfid.downloads_helper.check_download_inception", download)
    threads = [threading.Thread(target=Weights().find, args=("inception",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [False], "one writes, aside, and the others wait for it"
    assert place.read_bytes() == b"whole"
    assert [file.name for file in tmp_path.iterdir() if not file.name.endswith(".lock")] == [INCEPTION_FILE]
