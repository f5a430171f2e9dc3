"""How a command ends: its exit code, and one sentence instead of a traceback where a user can mend the cause.

0 done     2 a mistake that the message names     130 stopped by ctrl-C, and resumable     141 nobody reads the output (| head)
"""

import os
import select
import sys
from collections.abc import Callable

from loragraft.disk import DiskFullError, full_disk_reason

MENDED, INTERRUPTED, UNREAD = 2, 130, 141
STDOUT = 1


def guarded(run: Callable[[], int]) -> int:
    """The exit code of `run()`. `LORAGRAFT_TRACEBACK=1` shows the traceback of what would be a sentence.

    Sentences are made of ValueError (recipes, data, checkpoints, adapters), of a full disk, of every OSError that
    names its file (missing, no permission, ...) and of ctrl-C. A reader of the output who has gone (`| head`) ends the command
    in silence. Anything else is a defect and keeps its traceback.
    """
    try:
        code = run()
        sys.stdout.flush()  # a reader who has gone is noticed here, not while Python ends
        return code
    except BrokenPipeError:
        if not _reader_has_gone():  # another pipe, or a connection
            raise
        return UNREAD
    except KeyboardInterrupt:
        if os.environ.get("LORAGRAFT_TRACEBACK"):
            raise
        print(
            "\nstopped. Files appear whole or not at all, so nothing is damaged: give the same command again to go on.",
            file=sys.stderr,
        )
        return INTERRUPTED
    except (ValueError, OSError) as error:
        sentence = _sentence(error)
        if sentence is None or os.environ.get("LORAGRAFT_TRACEBACK"):
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return MENDED


def _reader_has_gone() -> bool:
    """Whether standard output leads nowhere; what is left for it is then dropped."""
    output = select.poll()
    output.register(STDOUT, 0)
    if not any(events & select.POLLERR for _, events in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
    return True


def _sentence(error: ValueError | OSError) -> str | None:
    if isinstance(error, ValueError | DiskFullError):
        return str(error)
    reason = full_disk_reason(error)
    if reason is not None:
        return f"{error.filename or 'a file'} is not written: {reason}. Make room and give the same command again"
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) if isinstance(error, FileNotFoundError | FileExistsError) else None
