"""All commands by name; `cli.py` finds the one that is asked for and tells what went wrong.

Invariant: the order is that of `--help`.
"""

from compressor.command_arguments import Command
from compressor.commands_of_recipes import RECIPES
from compressor.commands_of_results import RESULTS
from compressor.commands_to_start import START

COMMANDS: dict[str, Command] = {**RECIPES, **RESULTS, **START}
