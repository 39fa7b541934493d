"""Requests to stop: signals, Ctrl-C, a file `stop` in the run folder, a time budget.

The handlers only count. The loop asks for `reason` after each step, lets all ranks agree, saves and
raises Stopped; a signal that comes while torch or NCCL is at work changes nothing but the count. A
second Ctrl-C ends the process at once, whatever it is at: whole checkpoints stay whole.

SIGHUP, which comes when the terminal is closed, is a request as SIGTERM is, unless the process was
started with it ignored, as `nohup` does: then nobody hears it.

Ctrl-C in a terminal goes to the launcher and to all ranks. deepspeed's then sends SIGTERM besides;
torchrun's ranks hear of it through torchrun alone, which passes a second one on as SIGTERM.
"""

import os
import signal
import time
from pathlib import Path
from types import FrameType

import psutil

from phi3v.errors import ConfigError
from phi3v.output import say, shout

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
STOP_FILE = "stop"
INTERRUPTED = 130  # exit code of a shell for what Ctrl-C has ended


class StopRequests:
    """Who has asked this rank to stop, from the moment it listens."""

    def __init__(self) -> None:
        self._received: list[int] = []
        self._file: Path | None = None
        self._seconds = 0.0
        self._deadline = float("inf")  # of time.monotonic()

    def listen(self) -> None:
        """Count these signals from now on; call it early, in the main thread.

        Children that are forked without a new program get the default actions back, or nobody
        could end a data worker. System calls of libraries go on after a signal (SA_RESTART).
        """
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            signal.signal(number, self._count)
            signal.siginterrupt(number, False)
        os.register_at_fork(after_in_child=self._unlisten)

    def watch(self, folder: Path, seconds: float | None) -> None:
        """Heed the stop file of a run folder, and a budget of seconds since the process started.

        Only the rank that decides for all needs to, the first.

        Raises: ConfigError if `stop` is a folder that holds something: it could not be removed.
        """
        self._file = folder / STOP_FILE
        if self._file.is_dir() and any(self._file.iterdir()):
            raise ConfigError(
                f"{self._file} is a folder with something in it, where a file asks a run to stop; "
                "remove it, or the run would stop at each start"
            )
        if seconds is not None:
            age = time.time() - psutil.Process().create_time()
            self._seconds, self._deadline = seconds, time.monotonic() - age + seconds

    def reason(self) -> str | None:
        """Why this rank should stop, None if it should go on; costs one look for the file."""
        if self._received:
            return signal.Signals(self._received[0]).name
        if time.monotonic() >= self._deadline:
            return f"train.stop_after {self._seconds:g} s"
        if self._file is not None and self._file.exists():
            return f"the file {self._file}"
        return None

    def clear_file(self) -> None:
        """Remove the stop file, once the run has saved: or the next start would stop at once.

        A folder, which `mkdir` made for `touch`, is one as well.
        """
        if self._file is None:
            return
        try:
            if self._file.is_dir() and not self._file.is_symlink():
                self._file.rmdir()
            else:
                self._file.unlink(missing_ok=True)
        except OSError as error:
            say(
                f"{self._file} could not be removed ({error.strerror}); do so, or the next start "
                "stops at once"
            )

    def _count(self, number: int, frame: FrameType | None) -> None:
        if self._is_second(number):
            os._exit(INTERRUPTED)
        self._received.append(number)
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            shout("\nCtrl-C: the run ends after this step, saved; again: at once")

    def _is_second(self, number: int) -> bool:
        """Whether this is a second Ctrl-C; it is SIGTERM from torchrun, never from deepspeed."""
        is_passed_on = number == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ
        return signal.SIGINT in self._received and (number == signal.SIGINT or is_passed_on)

    def _unlisten(self) -> None:
        """In a forked child: what still is our handler becomes the default again."""
        for number in SIGNALS:
            if signal.getsignal(number) == self._count:
                signal.signal(number, signal.SIG_DFL)
