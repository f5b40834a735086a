"""What this machine and this installation are good for, to read or to paste into a bug report.

Invariant: looks only; nothing is imported but what tells a version, and nothing is written.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from compressor import __version__
from compressor.environment import BF16_FEATURES, INT8_FEATURES, cache_dir, cpu_flags, cpu_model, usable_cpus

# What the tests ran with, the same as in constraints.txt.
TESTED = {
    "torch": "2.13.0",
    "nncf": "3.4.0",
    "torchao": "0.18.0",
    "openvino": "2026.4.1",
    "onnx": "1.23.2",
    "onnxsim": "0.8.1",
    "onnxruntime": "1.32.0",
    "onnxscript": "0.7.2",
    "safetensors": "0.8.0",
    "numpy": "2.4.6",
    "pillow": "13.0.0",
    "pydantic": "2.14.3",
    "matplotlib": "3.11.2",
}
OPTIONAL = {"timm": "1.0.31", "torchvision": "0.28.0"}
LOW_MEMORY, LOW_DISK = 4e9, 5e9  # bytes; Xception at 160 px took 2.9 to 3.4 GB to train (benchmarks/results)


def examine() -> dict[str, Any]:
    """Look at versions, processor, memory, disk and settings.

    Returns:
        JSON-able: `toolkit`, `python`, `platform`, `packages` (name -> `installed`, `tested`), `cpu`, `memory`, `disk`,
        `compiler`, `telemetry`, `cache`; `problems` (what stops runs) and `warnings` (what they suffer from).
    """
    packages = {
        name: {"installed": _version(name), "tested": tested} for name, tested in {**TESTED, **OPTIONAL}.items()
    }
    problems = [
        f"{name} is not installed; pip install compressor brings it"
        for name in TESTED
        if not packages[name]["installed"]
    ]
    warnings = [
        f"{name} {found['installed']}: the tests ran with {found['tested']}"
        for name, found in packages.items()
        if found["installed"] and found["installed"].partition("+")[0] != found["tested"]
    ]
    flags = cpu_flags()
    int8, bf16 = ([name for name in names if name in flags] for names in (INT8_FEATURES, BF16_FEATURES))
    if not int8:
        warnings.append("no VNNI or AMX: INT8 is slower than with them, and may overflow")
    if not bf16:
        warnings.append("no bf16 units: training is in float32")
    memory = _memory()
    if memory["available_bytes"] is not None and memory["available_bytes"] < LOW_MEMORY:
        warnings.append(f"{memory['available_bytes'] / 1e9:.1f} GB of memory are free; training Xception takes 3 to 4")
    disk = {name: _free(path) for name, path in (("here", Path.cwd()), ("cache", cache_dir()))}
    warnings += [
        f"only {free / 1e9:.1f} GB of disk are free ({name})"
        for name, free in disk.items()
        if free is not None and free < LOW_DISK
    ]
    return {
        "toolkit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "cpu": {"model": cpu_model(), "usable": usable_cpus(), "int8": int8, "bf16": bf16},
        "memory": memory,
        "disk": disk,
        # NNCF (3.4) would compile an extension; the toolkit's own kernels stand in its place (`fake_quantize`).
        "compiler": {"found": shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"), "needed": False},
        "telemetry": "off" if sys.modules.get("openvino_telemetry", "") is None else "on",
        "cache": {
            "path": str(cache_dir()),
            "set_by": "COMPRESSOR_CACHE" if os.environ.get("COMPRESSOR_CACHE") else None,
        },
        "problems": problems,
        "warnings": warnings,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> dict[str, int | None]:
    try:
        import psutil
    except ModuleNotFoundError:
        return {"total_bytes": None, "available_bytes": None}
    found = psutil.virtual_memory()
    return {"total_bytes": int(found.total), "available_bytes": int(found.available)}


def _free(path: Path) -> int | None:
    """Bytes free where a path is or would be."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def format_examination(found: dict[str, Any]) -> str:
    """Lay it out for people, without colours, to be pasted."""
    cpu, memory, disk = found["cpu"], found["memory"], found["disk"]
    lines = [
        f"compressor {found['toolkit']}, Python {found['python']}, {found['platform']}",
        f"processor: {cpu['model']}, {cpu['usable']} usable; INT8: {', '.join(cpu['int8']) or 'none'}; "
        f"bf16: {', '.join(cpu['bf16']) or 'none'}",
        f"memory: {_gb(memory['available_bytes'])} of {_gb(memory['total_bytes'])} free; "
        f"disk: {_gb(disk['here'])} free here, {_gb(disk['cache'])} in the cache",
        f"cache: {found['cache']['path']}" + (" (COMPRESSOR_CACHE)" if found["cache"]["set_by"] else ""),
        f"telemetry: {found['telemetry']}; compiler: {found['compiler']['found'] or 'none'} (not needed)",
        "packages (installed, tested):",
    ]
    lines += [
        f"  {name:12} {one['installed'] or 'absent':14} {one['tested']}" for name, one in found["packages"].items()
    ]
    lines += [f"warning: {text}" for text in found["warnings"]]
    lines += [f"problem: {text}" for text in found["problems"]]
    return "\n".join([*lines, "ready" if not found["problems"] else "not ready"])


def _gb(value: int | None) -> str:
    return "unknown" if value is None else f"{value / 1e9:.1f} GB"
