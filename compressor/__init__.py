"""Make pretrained CNNs small, fast and deployable on Intel edge CPUs."""

import sys

# OpenVINO and NNCF send usage data and write an id into the home folder unless this module is missing (openvino 2026.4,
# nncf 3.4). `None` makes its import fail, which both handle. It must happen before either is imported.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

__version__ = "0.1.0"
