"""`python -m srlib`: the program of `srlib.cli`, apart from files beside somebody's data that have a module's name."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # `python -m` looks for modules in the working directory first: those beside somebody's scans are not to be run.
    # `-P` would have kept it away; what is started from here is told by these variables.
    root, here = str(Path(__file__).resolve().parent.parent), str(Path.cwd())
    sys.path[:] = [root, *(entry for entry in sys.path if entry not in ("", here, root))]
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    named = [root, *(entry for entry in named if Path(entry).is_absolute() and entry != root)]
    os.environ |= {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(named)}

    from srlib import errors

    errors.take_over()  # before the imports that take time

    from srlib.cli import app

    app(prog_name="python -m srlib")
