"""What can go wrong for a user, and how a command ends when it does.

    Phi3VError
      ConfigError      a YAML key, an override or the DeepSpeed JSON is wrong
      ShardError       a shard is missing, corrupt, or was made by another recipe
      SampleError      one conversation or image cannot be used (carries its id)
      CheckpointError  incomplete, or does not fit this run

A message is one sentence: what, the value seen, where, and what to do. Commands turn these errors
into exit code 2 and that one line on stderr; anything else is a defect and keeps its traceback.
"""


class Phi3VError(Exception):
    """Something the user can fix; its message says how."""


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
