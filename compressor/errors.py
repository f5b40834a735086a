"""Every error the toolkit raises on purpose; each carries the exit code of the command line.

    CompressorError            1  a fault of ours
      RecipeError              2  the recipe or the command line is wrong
      UnsupportedModelError    2  a model the asked-for stage cannot handle
      TrainingError            2  training diverged; the remedy is in the recipe
      BudgetError              3  a budget was missed
      ParityError              3  torch, ONNX and IR disagree
      DataError                4  images or folders that cannot be used
      MissingDependencyError   5  a package that is not installed
      ResourceError            5  disk, memory, weights or network not available

A message says where (recipe key, file or layer), what was found, and what would work.
"""

import difflib
from collections.abc import Iterable


class CompressorError(Exception):
    """Root of the tree; `exit_code` is what the command line returns."""

    exit_code = 1


class RecipeError(CompressorError):
    exit_code = 2


class UnsupportedModelError(CompressorError):
    exit_code = 2


class TrainingError(CompressorError):
    exit_code = 2


class BudgetError(CompressorError):
    exit_code = 3


class ParityError(CompressorError):
    exit_code = 3


class DataError(CompressorError):
    exit_code = 4


class MissingDependencyError(CompressorError):
    exit_code = 5


class ResourceError(CompressorError):
    exit_code = 5


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest choice, or an empty string when nothing is near."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""
