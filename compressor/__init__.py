"""Make pretrained CNNs small, fast and deployable on Intel edge CPUs.

    from compressor import compress
    report = compress("recipes/xception_slim.yaml")

Invariant: `import compressor` loads nothing heavy; the two public names are imported at first use (PEP 562).
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.pipeline import compress
    from compressor.report import Report

# OpenVINO and NNCF send usage data and write an id into the home folder unless this module is missing (openvino 2026.4,
# nncf 3.4). `None` makes its import fail, which both handle. It must happen before either is imported.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
# onnxruntime uploads usage data with an id and a database in the home folder unless told not to (onnxruntime 1.32).
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
__all__ = ["Report", "__version__", "compress"]


_HOMES = {"compress": "compressor.pipeline", "Report": "compressor.report"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
