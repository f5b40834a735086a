"""The examples run as their first lines say."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

from compressor.data.synthetic_pcb import CLASSES

REPOSITORY = Path(__file__).resolve().parent.parent


def test_contact_sheet_shows_every_class(tmp_path: Path) -> None:
    target = tmp_path / "sheet.png"
    command = [sys.executable, str(REPOSITORY / "examples" / "contact_sheet.py"), str(target)]
    subprocess.run([*command, "--columns", "2", "--zoom", "2"], cwd=tmp_path, check=True)
    with Image.open(target) as sheet:
        rows, remainder = divmod(sheet.height, len(CLASSES))
        assert remainder == 0
        for row in range(len(CLASSES)):
            crop = sheet.crop((sheet.width // 2, row * rows, sheet.width - 8, row * rows + rows - 8))
            assert len(crop.getcolors(4096) or range(4096)) > 1, "a tile holds a picture, not one colour"
