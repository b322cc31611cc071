"""`python -m sweep` is the command `sweep`."""

import os
import sys
from pathlib import Path

# Python puts the working folder before its own library, where any file would take the place of one
# of its modules; the command `sweep` has it nowhere.
if sys.path[0] in ("", os.getcwd()) and Path(__file__).parents[1] != Path.cwd():
    del sys.path[0]

from sweep.cli import main

main()
