"""The public names are two, and importing the package costs next to nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

import compressor

REPOSITORY = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "numpy", "openvino", "nncf", "onnx", "pydantic", "rich", "yaml", "PIL", "psutil")


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_public_names_are_pinned() -> None:
    assert compressor.__all__ == ["Report", "__version__", "compress"]
    assert set(compressor.__all__) <= set(dir(compressor))


def test_public_names_are_the_real_ones() -> None:
    from compressor.pipeline import compress
    from compressor.report import Report

    assert compressor.compress is compress
    assert compressor.Report is Report
    assert compressor.__version__.count(".") == 2


def test_other_names_are_refused_as_by_any_module() -> None:
    with pytest.raises(AttributeError, match="module 'compressor' has no attribute 'compres'"):
        compressor.compres  # noqa: B018


def test_importing_the_package_loads_nothing_heavy_and_silences_telemetry() -> None:
    code = f"import sys, compressor; print([m for m in {HEAVY} if m in sys.modules], sys.modules['openvino_telemetry'])"
    assert fresh(code) == "[] None"


def test_a_name_asked_for_is_imported_then() -> None:
    assert fresh("from compressor import Report; import sys; print(Report.__module__, 'torch' in sys.modules)") == (
        "compressor.report False"
    )


def test_the_version_is_the_distributions() -> None:
    assert f'version = "{compressor.__version__}"' in (REPOSITORY / "pyproject.toml").read_text()
