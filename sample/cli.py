"""A command's main -> an exit code: what the user can mend is told in one sentence, everything else keeps its traceback."""

import sys
from collections.abc import Callable


def run(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Runs `main(argv)` (None: the process's arguments). 0; 2 after a ValueError or OSError; 130 after Ctrl-C."""
    try:
        main(argv)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    return 0


def sentence(error: ValueError | OSError) -> str:
    """What an exception says, on one line; "PATH: reason" where the system raised it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
