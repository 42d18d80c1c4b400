"""Errors as the command line says them: one line, exit status 2, no traceback.

| error | said |
|---|---|
| raised by a line of this package | its message |
| of the system: no such file, a full disk, no permission | the file, and what the system says |
| memory that runs out, in the words of any library | that, and the options that need less |
| a name that is not UTF-8, a package that is missing | that, and what to do |
| a wrong option | the option, and where its help is |
| Ctrl-C | that what was finished is kept; status 130 |
| any other | that it is a fault of srlib, and a report's path: traceback, versions, arguments; status 1 |

Standard library only, since what the commands import can fail or be interrupted too.
"""

from __future__ import annotations

import dis
import errno
import os
import platform
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

from srlib import files

STOPPED = "stopped; what was finished is kept"
# As Python, numpy, PyTorch, oneDNN, CUDA, C++ and ITK say it; most raise a RuntimeError.
OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|unable to allocate"
    r"|failed to allocate|bad_alloc|could not (create|execute) a primitive|can't start new thread",
    re.IGNORECASE,
)
NEEDS_LESS = {
    "train": "lower --patch or --batch-size, or choose a smaller --model",
    "predict": "free some memory, try SRLIB_DEVICE=cpu, or train with a smaller --patch or --model",
}
NEEDS_LESS["evaluate"] = NEEDS_LESS["predict"]


def line(error: BaseException, arguments: Sequence[str] = ()) -> str:
    """Say an error that is known, in one line for each fault; empty for one that is not.

    Args:
        error: what was raised.
        arguments: of the program.
    """
    if hasattr(error, "format_message"):  # of Click, whichever package holds it
        context = getattr(error, "ctx", None)
        more = f" ({context.command_path} -h says more)" if context else ""
        return f"{error.format_message()}{more}"
    said = str(error).strip()
    if (
        "Traceback (most recent call last)" in said
    ):  # from a process that loads data, as PyTorch hands it on
        said = said.splitlines()[-1]
    if is_out_of_memory(error):
        advice = NEEDS_LESS.get(
            next(iter(arguments), ""), "free some memory, or compute less at once"
        )
        return f"out of memory: {advice} ({type(error).__name__}: {' '.join(said.split())[:200]})"
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object!r}: expected a name in UTF-8; rename it"
    if isinstance(error, OSError) and error.strerror:
        named = [os.fsdecode(name) for name in (error.filename, error.filename2) if name]
        advice = "; free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return ": ".join([*filter(None, [" -> ".join(named)]), error.strerror + advice])
    if said and (isinstance(error, OSError) or _is_raised_here(error)):
        return said
    if said.startswith("Symlink loop"):  # pathlib's, before Python 3.13 no OSError
        return f"{said}: expected a link that leads to a file or folder"
    if isinstance(error, ModuleNotFoundError):
        return f"{said}: expected the packages of requirements.lock; ./run_all.sh installs them"
    return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out, which most libraries say in an error of another kind."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and bool(OUT_OF_MEMORY.search(str(error)))


def _is_raised_here(error: BaseException) -> bool:
    """Tell whether a `raise` of this package made the error; its words are ours then."""
    last = error.__traceback__
    while last and last.tb_next:
        last = last.tb_next
    if last is None:
        return False
    code = last.tb_frame.f_code
    is_ours = Path(code.co_filename).is_relative_to(Path(__file__).parent)
    return is_ours and code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def tell(error: BaseException, arguments: Sequence[str], about: str = "") -> int:
    """Print an error to stderr and return the status that the program ends with.

    Args:
        error: what was raised.
        arguments: of the program.
        about: goes before a message that does not name it.
    """
    if _is_interruption(error):
        message, status = STOPPED, 130
    elif message := line(error, arguments):
        status = 2
    else:
        kind = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        message, status = f"a fault of srlib: {kind}; report: {_report(error, arguments)}", 1
    if about not in message:
        message = f"{about}: {message}"
    print(message, file=sys.stderr)
    return status


def _is_interruption(error: BaseException | None) -> bool:
    """Tell whether Ctrl-C led to an error; an import that it breaks off can raise any."""
    while error and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _report(error: BaseException, arguments: Sequence[str]) -> str:
    """Write what is needed to find a fault; beside the results, or where those cannot be written."""
    versions = {
        name: found
        for name, module in sorted(sys.modules.items())
        if "." not in name and isinstance(found := vars(module).get("__version__"), str)
    }
    lines = [
        f"arguments: {list(arguments)!a}",
        f"Python {platform.python_version()}, {platform.platform()}",
        *(f"{name}={value!a}" for name, value in os.environ.items() if name.startswith("SRLIB_")),
        ", ".join(f"{name} {number}" for name, number in versions.items()),
        "",
        "".join(traceback.format_exception(error)),
    ]
    name = f"error-{datetime.now(UTC):%Y-%m-%d-%H%M%S}-{os.getpid()}.txt"
    for folder in (files.results_root(), Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(
                "\n".join(lines), encoding="utf-8", errors="backslashreplace"
            )
        except OSError:
            continue
        return str(folder / name)
    return "could be written nowhere"


def take_over() -> None:
    """Have this program end as the table says, whatever happens and as early as during its imports.

    The second Ctrl-C ends it at once, also where a library swallowed the first.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt

    def hook(_kind: type[BaseException], error: BaseException, _: TracebackType | None) -> NoReturn:
        raise SystemExit(tell(error, sys.argv[1:]))

    sys.excepthook = hook
    if (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):  # else a shell's job in the background
        signal.signal(signal.SIGINT, interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files can hold any bytes
