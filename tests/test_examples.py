"""The examples run as their first lines say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image
from tiny_networks import make_images

from compressor.data.synthetic_pcb import CLASSES

REPOSITORY = Path(__file__).resolve().parent.parent
LABEL_WIDTH, GAP = 84, 4  # as the example draws them


def is_plain(picture: Image.Image) -> bool:
    return len(picture.getcolors(picture.width * picture.height) or ()) == 1


def test_contact_sheet_shows_every_class(tmp_path: Path) -> None:
    target = tmp_path / "sheet.png"
    command = [sys.executable, str(REPOSITORY / "examples" / "contact_sheet.py"), str(target)]
    columns, size, zoom = 2, 64, 2
    subprocess.run([*command, "--columns", str(columns), "--zoom", str(zoom)], cwd=tmp_path, check=True)
    with Image.open(target) as sheet:
        tile = size * zoom + GAP
        assert sheet.size == (LABEL_WIDTH + columns * tile, len(CLASSES) * tile)
        for row in range(len(CLASSES)):
            for column in range(columns):
                left, top = LABEL_WIDTH + column * tile, row * tile
                assert not is_plain(sheet.crop((left, top, left + size * zoom, top + size * zoom)))
        # So the check above can fail: neither gap nor label is in a tile.
        assert is_plain(sheet.crop((LABEL_WIDTH + size * zoom, 0, LABEL_WIDTH + tile, sheet.height)))


def test_an_own_network_is_pruned_to_a_latency_and_exported(tmp_path: Path) -> None:
    script, run = REPOSITORY / "examples" / "own_model.py", tmp_path / "run"
    assert len(script.read_text().splitlines()) <= 80
    done = subprocess.run(
        [sys.executable, str(script), "--out", str(run)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COMPRESSOR_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((run / "report.json").read_text())
    assert f"IR: {run / 'artifacts'}" in done.stdout
    assert (run / "artifacts" / "result_fp32.xml").is_file()
    assert report["recipe"]["model"]["source"] == "custom"
    pruned = report["stages"][1]["details"]
    found = pruned["targets"]["latency_ms"]
    assert found["measured"] <= found["goal"]
    assert report["result"]["macs"] == pruned["iterations"][-1]["macs"] < report["baseline"]["macs"]
    assert report["result"]["latency_ms"] < report["baseline"]["latency_ms"]


def example(tmp_path: Path, name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "examples" / name), *map(str, arguments)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COMPRESSOR_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )


SMALL = ("data.train_per_class=24", "data.val_per_class=6", "data.test_per_class=8", "stages[0].epochs=1")
SMALL += ("stages[3].epochs=1", "stages[5].steps=2", "budget={}", "benchmark.throughput_s=null", "model.weights=none")
SMALL += ("model.source=timm", "model.name=resnet18")  # which INT8 does not disturb while it knows nothing yet
SMALL += ("stages[1].metric_images=14", "stages[4].subset_size=14", "export.parity_images=16")


def test_the_quickstart_runs_a_recipe_and_its_network(tmp_path: Path) -> None:
    changes = [part for change in SMALL for part in ("--set", change)]
    done = example(tmp_path, "quickstart.py", "--out", tmp_path / "run", *changes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "report.html").is_file()
    assert any(f"a grey square is called '{name}'" in done.stdout for name in CLASSES)


def test_own_data_become_a_bundle(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", per_class=16, test_per_class=6)
    quick = (
        "stages[0].epochs=1",
        "stages[1].iterations=2",
        "stages[1].recovery.steps=1",
        "stages[1].importance_batches=1",
        "stages[2].epochs=1",
    )
    quick += ("stages[3].subset_size=8", "stages[4].steps=1", "benchmark.throughput_s=null", "model.weights=none")
    changes = [part for change in quick for part in ("--set", change)]
    done = example(
        tmp_path, "own_data.py", images, "--model", "timm/resnet18", "--out", tmp_path / "runs" / "a", *changes
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 classes, 64 train, 24 test" in done.stdout
    bundle = tmp_path / "runs" / "a-bundle"
    assert (bundle / "model.xml").is_file()
    predicted = subprocess.run(
        [sys.executable, str(bundle / "predict.py"), str(images / "test" / "red" / "000.png")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert any(name in predicted.stdout for name in ("red", "green", "blue", "grey"))


def steps(page: str) -> list[str]:
    """What is typed on a page, as far as it is the same for every folder of images; numbers of images left out."""
    typed = [line.split()[:5] for line in page.splitlines() if line.startswith("$ ")]
    return [re.sub(r"\d+", "N", " ".join(words)) for words in typed]


def test_the_walk_through_is_walked_and_its_page_is_of_the_same_steps(tmp_path: Path) -> None:
    page = tmp_path / "walkthrough.md"
    # As long as it takes until classes lie so far apart that INT8 confuses none of a few images.
    quick = "input.size=64 stages[0].epochs=5 stages[0].batch_size=8 stages[2].epochs=3 stages[2].batch_size=8 "
    quick += (
        "stages[1].iterations=2 stages[1].recovery.steps=1 stages[1].importance_batches=1 stages[3].subset_size=12 "
    )
    quick += "stages[4].steps=1 benchmark.throughput_s=null"
    changes = [part for change in quick.split() for part in ("--set", change)]
    small = ("--model", "timm/resnet18", "--train", "10", "--test", "4", "--floor", "0")
    done = example(tmp_path, "walkthrough.py", page, *small, *changes)
    assert done.returncode == 0, done.stdout + done.stderr
    shipped = (REPOSITORY / "docs" / "walkthrough.md").read_text()
    template = (REPOSITORY / "examples" / "walkthrough.template.md").read_text()
    assert steps(shipped) == steps(page.read_text())
    assert len(steps(shipped)) == len(steps(template)) > 10
    said = [line for line in template.splitlines() if not line.startswith("$ ")]
    assert [line for line in said if line not in shipped.splitlines()] == [], "the page was made of another template"
    pictures = re.findall(r"\]\((walkthrough/[^)]+)\)", shipped)
    assert len(pictures) == 4
    for picture in pictures:
        assert (REPOSITORY / "docs" / picture).stat().st_size > 1000
        assert (tmp_path / picture).stat().st_size > 1000
