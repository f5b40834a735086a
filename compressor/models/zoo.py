"""The one place that imports timm and torchvision, both optional (`pip install compressor[zoo]`).

Invariant: nothing is imported before `import_timm` is called, and nothing is patched unless torchvision's import fails
with the one message that is known to be harmless.
"""

import importlib
import logging
import sys
from types import ModuleType

import torch

from compressor.errors import MissingDependencyError

log = logging.getLogger(__name__)

# torchvision's wheel is built for CUDA: beside a CPU build of torch its operators are not loaded and its own
# registration code fails (torchvision 0.29). Classifiers never call these two, so their signatures are enough.
_MISSING_OPERATOR = "operator torchvision::nms does not exist"
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# Kept for the life of the process: torch drops the operators with the object that defined them.
_defined: list[torch.library.Library] = []


def import_timm() -> tuple[ModuleType, str | None]:
    """Import timm, with torchvision made importable beside a CPU build of torch.

    Returns:
        The module, and a note for the report where operators had to be defined, else None.

    Raises:
        MissingDependencyError: timm or torchvision is not installed or does not fit the installed torch.
    """
    try:
        note = _import_torchvision()
        return importlib.import_module("timm"), note
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"models of timm need the package '{error.name}', which is not installed; pip install 'compressor[zoo]'"
        ) from error


def _import_torchvision() -> str | None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if str(error) != _MISSING_OPERATOR:
            raise MissingDependencyError(
                f"torchvision does not fit torch {torch.__version__}: {error}; install the version made for it"
            ) from error
        _define_operators()
        importlib.import_module("torchvision")
    if not _defined:
        return None
    return "torchvision was built for another torch: its operators nms and qnms are defined but cannot run"


def _define_operators() -> None:
    log.warning("torchvision has no operators for this torch; defining %d of them, unable to run", len(_OPERATORS))
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for signature in _OPERATORS:
        library.define(signature)  # type: ignore[no-untyped-call]
    _defined.append(library)
    # The failed import leaves submodules behind, which a second import would take for complete.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
