"""The examples run as their first lines say."""

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
