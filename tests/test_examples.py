"""The examples run as their first lines say."""

import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

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
