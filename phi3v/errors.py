"""What can go wrong for a user, and how a command ends when it does.

    Phi3VError
      ConfigError      a YAML key, an override or the DeepSpeed JSON is wrong
      ShardError       a shard is missing, corrupt, or was made by another recipe
      SampleError      one conversation or image cannot be used (carries its id)
      CheckpointError  incomplete, or does not fit this run
      MachineError     what is there could not be read: a disk, a file server, memory
      Disagreement     a step that was taken again gave other numbers than its run wrote down
      Diverged         a run did all its steps, and its loss rose far above where it began
      Stopped          no mistake: the run was asked to stop, and has saved

A message is one sentence: what, the value seen, where, and what to do. Commands turn these errors
into their exit code (2; 1 for Disagreement, 75 for Stopped) and that one line on stderr; anything
else is a defect and keeps its traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Phi3VError(Exception):
    """Something the user can fix; its message says how."""

    exit_code = 2


class ConfigError(Phi3VError):
    """A recipe key, an override, a path in a recipe or the DeepSpeed JSON is wrong."""


class ShardError(Phi3VError):
    """A shard or dataset folder is missing, damaged, or was made by another recipe."""


class SampleError(Phi3VError):
    """One conversation or one of its images cannot be used.

    The message is "what: the particulars"; `prepare` counts rejected rows by what stands before the
    colon.
    """


class CheckpointError(Phi3VError):
    """A checkpoint is incomplete or does not fit the run."""


class MachineError(Phi3VError):
    """The machine failed at what it was to read: its disk or file server, its memory, its limits.

    It says nothing about what was to be read. All that was finished stays, and the same command
    goes on once the machine is well.
    """


class Disagreement(Phi3VError):
    """A step that was taken again gave other numbers than its run wrote down.

    What was asked is answered, and the answer is no: as of a comparison, the exit code is 1.
    """

    exit_code = 1


class Diverged(Phi3VError):
    """A run did all its steps, and its loss ended far above where it began.

    All is written, and yet the exit code is not 0: what comes next in a script, to evaluate, export
    or publish the model, would take it for one that has learnt.
    """


class Stopped(Phi3VError):
    """The run was asked to stop and has saved; the same command goes on with it.

    Raise it on all ranks, after a barrier: the launcher ends the others once one has left.
    """

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an error of reading or writing name the file, which the system's own does not."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise
