"""What this machine and this installation are: CPU features, threads, versions, folders.

Invariant: imports nothing heavy, so that the edge-side commands can use it.
"""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = (
    "torch",
    "nncf",
    "torchao",
    "openvino",
    "onnx",
    "onnxsim",
    "onnxruntime",
    "onnxscript",
    "safetensors",
    "numpy",
    "pillow",
    "pydantic",
    "timm",
    "torchvision",
)
# Instruction sets that decide whether INT8 and bf16 are fast, and whether INT8 can overflow (no VNNI: yes).
INT8_FEATURES = ("avx512_vnni", "avx_vnni", "amx_int8")
BF16_FEATURES = ("avx512_bf16", "amx_bf16")


def cache_dir() -> Path:
    """Folder for what can be made or fetched again: `COMPRESSOR_CACHE`, else the platform's user cache."""
    chosen = os.environ.get("COMPRESSOR_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser().absolute() / "compressor"


def weights_dir() -> Path:
    """Folder in which `weights fetch` leaves files and `weights: imagenet` looks for them."""
    return cache_dir() / "weights"


def prepare_process() -> None:
    """Point library caches into `cache_dir()`; must run before NNCF or torch extensions are imported.

    NNCF builds a C++ extension at first use into torch's extension folder, waits 60 s for it by default (nncf 3.4)
    and is left hanging by the lock of a killed build: an own folder and a longer wait. Importing torch's compiler, as
    torchao does, makes a folder in the temporary one (torch 2.13). matplotlib keeps its list of fonts.
    """
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache_dir() / "torch_extensions"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "torch_inductor"))
    os.environ.setdefault("MPLCONFIGDIR", str(cache_dir() / "matplotlib"))
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "180")


def cpu_flags() -> frozenset[str]:
    """CPU feature names as Linux spells them; empty where they cannot be read."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def cpu_model() -> str:
    """Name of the processor, for people to read."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cpus() -> int:
    """Processors this process may run on (containers and affinity respected)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide numbers; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code_digest() -> str:
    """Hash of the toolkit's own sources: with other code the same recipe may give other weights."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def describe() -> dict[str, object]:
    """The environment as the report stores it."""
    flags = cpu_flags()
    return {
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpus": usable_cpus(),
        "isa": sorted(flags & {*INT8_FEATURES, *BF16_FEATURES, "avx2", "avx512f", "fma"}),
        "versions": versions(),
    }
