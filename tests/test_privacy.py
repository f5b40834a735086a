"""Nothing leaves the machine and nothing is written outside the run, cache and temporary folders."""

from pathlib import Path

import pytest
from watched_process import Watched, run_watched

REPOSITORY = Path(__file__).resolve().parent.parent


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
import os, socket, subprocess, sys, tempfile
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


JOB = """
import os, sys
from pathlib import Path
import compressor
sys.path.insert(0, sys.argv[1])
out = Path(sys.argv[2])
from compressor import environment
environment.prepare_process()
import nncf, openvino
from separable_network import LABELS, SPEC, SeparableNetwork, normalised, pictures
from compressor.benchmark import bench_target
from compressor.export import publish_float, publish_int8
from compressor.folding import fold_batchnorm
from compressor.quantization import quantize
network = SeparableNetwork().eval()
images = normalised(pictures(8))
publish_float(network, SPEC, LABELS, out / "float")
fold_batchnorm(network, images[:1])
quantized, _ = quantize(network, [images])
published = publish_int8(quantized, SPEC, LABELS, out / "int8")
import onnxruntime
onnxruntime.InferenceSession(published.onnx).run(None, {"image": images.numpy()[:1]})
bench_target(published.xml, calls=2, seconds=0.05)
from compressor.cli import main
recipe = "recipes/xception_slim.yaml"
assert main(["validate", recipe, "-q"]) == 0
assert main(["plan", recipe, "-q", "--set", "input.size=48"]) == 0
assert main(["eval", str(published.xml), str(out / "absent")]) == 4
"""


def test_compressing_exporting_and_measuring_stay_on_the_machine(places: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    allowed = [out, *(Path(places[key]) for key in ("TMPDIR", "COMPRESSOR_CACHE"))]
    seen = run_watched(["-c", JOB, str(REPOSITORY / "tests"), str(out)], allowed, places, cwd=REPOSITORY)
    assert seen.returncode == 0, seen.stderr
    assert seen.sockets == ()
    assert seen.writes == ()
    assert {path.name for path in out.iterdir()} == {
        f"{name}.{suffix}" for name in ("float", "int8") for suffix in ("onnx", "xml", "bin")
    }
    assert list(Path(places["HOME"]).rglob("*")) == []  # no telemetry id, which OpenVINO's native code may write too
    assert list(Path(places["TMPDIR"]).rglob("*")) == []


def test_telemetry_is_off_once_the_package_is_imported(places: dict[str, str]) -> None:
    code = "import compressor, sys; assert sys.modules['openvino_telemetry'] is None; import openvino, nncf"
    seen = watch(code, places)
    assert (seen.returncode, seen.sockets, seen.writes) == (0, (), ()), seen.stderr
    assert list(Path(places["HOME"]).rglob("*")) == []
