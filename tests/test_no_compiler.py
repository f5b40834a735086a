"""QAT needs no compiler, and the lock that a killed build of NNCF's extension left behind holds nothing up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
# NNCF looks for its extension when a quantizer first computes.
QUANTIZE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from separable_network import SeparableNetwork, normalised, pictures
from compressor import environment
environment.prepare_process()
from nncf.torch.quantization import quantize_functions
from nncf.torch.quantization.extensions import QuantizedFunctionsCPULoader
from compressor.fake_quantize import KERNELS
stock = {name: getattr(quantize_functions, name) for name in KERNELS}
from compressor.folding import fold_batchnorm
from compressor.quantization import quantize
from pathlib import Path
folder = Path(QuantizedFunctionsCPULoader.get_build_dir())
if sys.argv[2] == "locked":
    (folder / "lock").touch()
network = SeparableNetwork().eval()
images = normalised(pictures(8))
fold_batchnorm(network, images[:1])
quantized, _ = quantize(network, [images])
if sys.argv[3] == "stock":
    for name, kernel in stock.items():
        setattr(quantize_functions, name, kernel)
quantized(images).square().mean().backward()
assert any(p.grad is not None and bool(p.grad.isfinite().all()) for p in quantized.parameters())
print([path.name for path in sorted(folder.iterdir())])
"""


def quantize_alone(folder: Path, lock: str, kernels: str, timeout: str = "600") -> subprocess.CompletedProcess[str]:
    """One step of QAT in a process without a compiler and with an empty, or locked, folder for extensions."""
    env = {**os.environ, "CC": "/bin/false", "CXX": "/bin/false", "COMPRESSOR_CACHE": str(folder / "cache")}
    env |= {"TORCH_EXTENSIONS_DIR": str(folder / "extensions"), "NNCF_EXTENSION_LOAD_TIMEOUT": timeout}
    code = [sys.executable, "-c", QUANTIZE, str(TESTS), lock, kernels]
    return subprocess.run(code, env=env, cwd=TESTS.parent, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(("lock", "left"), [("locked", "['lock']"), ("empty", "[]")])
def test_a_step_of_qat_builds_nothing_and_waits_for_nothing(lock: str, left: str, tmp_path: Path) -> None:
    done = quantize_alone(tmp_path, lock, "ours")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == left
    assert "compile" not in (done.stdout + done.stderr).lower()


def test_the_lock_holds_up_nncf_itself(tmp_path: Path) -> None:
    done = quantize_alone(tmp_path, "locked", "stock", timeout="2")
    assert done.returncode != 0
    assert "leftover lock files" in done.stderr
