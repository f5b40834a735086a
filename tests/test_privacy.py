"""Nothing leaves the machine and nothing is written outside the run, cache and temporary folders."""

from pathlib import Path

import pytest
from watched_process import Watched, run_watched


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """An own home, temporary folder and cache: what appears in the first two was written unasked."""
    folders = {"HOME": "home", "TMPDIR": "tmp", "COMPRESSOR_CACHE": "cache"}
    for name in folders.values():
        (tmp_path / name).mkdir()
    return {key: str(tmp_path / name) for key, name in folders.items()}


def watch(code: str, places: dict[str, str]) -> Watched:
    return run_watched(["-c", code], [Path(places[key]) for key in ("TMPDIR", "COMPRESSOR_CACHE")], places)


SIN = """
import os, socket, subprocess, sys, tempfile, urllib.request
here, there = os.environ["TMPDIR"], os.environ["HOME"]
open(os.path.join(here, "a"), "w").close()
open(os.devnull, "w").close()
with tempfile.TemporaryDirectory(): pass
open(os.path.join(there, "plain"), "w").close()
os.close(os.open(os.path.join(there, "low"), os.O_CREAT | os.O_WRONLY))
os.mkdir(os.path.join(there, "folder"))
os.rename(os.path.join(here, "a"), os.path.join(there, "moved"))
try: socket.create_connection(("127.0.0.1", 9), 0.1)
except OSError: pass
try: socket.getaddrinfo("telemetry.invalid", 443)
except OSError: pass
subprocess.run([sys.executable, "-c", f"open({os.path.join(there, 'child')!r}, 'w').close()"], check=True)
"""


def test_the_watch_itself_sees_files_sockets_and_children(places: dict[str, str]) -> None:
    seen = watch(SIN, places)
    assert seen.returncode == 0, seen.stderr
    home = Path(places["HOME"])
    assert set(seen.writes) == {str(home / name) for name in ("plain", "low", "folder", "moved", "child")}
    assert any("127.0.0.1" in text for text in seen.sockets)
    assert any("telemetry.invalid" in text for text in seen.sockets)
