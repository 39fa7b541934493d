"""What a process must know before torch and DeepSpeed start, and how it ends.

`set_environment` is the one place that sets ranks, ports, threads and folders, whoever started the
process: the deepspeed launcher, torchrun, plain srun, or plain python. Call it before deepspeed is
imported, which reads DS_ACCELERATOR at import. `run_command` turns a user's mistake into one line
and exit code 2, and a defect of one rank into the end of all; once `share_mistakes` was called, a
mistake that one rank alone meets is the end of all as well.

Surprising: every child process inherits the variables set here and would take itself for the same
rank; start one with RANK and its companions (`RANK_VARIABLES`) removed.
"""

import errno
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TextIO

import torch
import torch.distributed
from torch.distributed import Store
from torch.distributed.distributed_c10d import _get_default_store
from transformers.utils.logging import disable_progress_bar

from phi3v.devices import check_visible, has_cuda
from phi3v.errors import ConfigError, Diverged, Phi3VError, Stopped
from phi3v.model.kernels import private_caches
from phi3v.output import fill_closed, keep_printing
from phi3v.printing import print, print_exception, printable, without_passwords
from phi3v.training.extensions import extensions_folder

RANK_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"),
    *("CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # of torch 2.11 on, and before
GRACE_SECONDS = 10.0  # how long ranks other than 0 leave it to rank 0 to report an error
STAGGER_SECONDS = 2.0  # per local rank on top: launchers take up to 1 s to end the other ranks
LINGER_SECONDS = 3.0  # how long rank 0 stays, for the others to fail as well
MISTAKE, HEARD = "phi3v/mistake", "phi3v/heard"  # keys of the store where the ranks have met
LISTEN_SECONDS = 0.25  # between two looks at it, and a millisecond more for each rank
_speaking = threading.Lock()  # held by the thread of rank 0 that prints the line
ADVICE = {  # to errors of the machine, which are no defects of this program
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG),
        "make room or give the right to write there, then",
    ),
    **dict.fromkeys(
        (errno.EIO, errno.ESTALE, errno.ENODEV, errno.EREMOTEIO, errno.EUCLEAN, errno.EBADMSG),
        "look after the disk or the server that it is on, then",
    ),
    **dict.fromkeys(
        (errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n), then"
    ),
    errno.ENOMEM: "free memory, or take fewer workers, then",
    **dict.fromkeys(
        (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP),
        "something of another kind has the name of a file or folder of this command: move it away, "
        "then",
    ),
}
NO_READER = 128 + signal.SIGPIPE  # exit code of a shell for what ends as its reader does
ECHOES = (  # what a collective says when the rank at the other end is gone
    *("closed by peer", "reset by peer", "Broken pipe", "Connection refused", "Socket closed"),
    *("Connection was likely closed", "remote process exited", "ncclRemoteError"),
)


@dataclass(frozen=True)
class Ranks:
    """This process's place in the run: rank of world_size, and local_rank of local_size here."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def set_environment() -> Ranks:
    """Fill in what the launcher left out of the environment; a second call changes nothing.

    RANK is set (deepspeed, torchrun): the launcher's values hold. Inside an srun step: Slurm's.
    Otherwise: one rank. Also sets the threads of a rank, DeepSpeed's
    accelerator, what torch's allocator and compiler read, and where compiled kernels are kept and
    ninja is found.

    Raises: ConfigError where variables are missing or contradict each other, and where there is a
    GPU that torch does not see.
    """
    check_visible()  # before the accelerator is set, by which the CPU is asked for
    _set_defaults()
    cores = len(os.sched_getaffinity(0))
    if "RANK" in os.environ:
        ranks, node, num_nodes = _launcher_ranks()
        cores //= ranks.local_size
    elif "SLURM_STEP_ID" in os.environ:
        ranks, node, num_nodes = _step_ranks()
        cores = min(cores, _integer("SLURM_CPUS_PER_TASK", default=cores // ranks.local_size))
    else:
        ranks, node, num_nodes = Ranks(0, 1, 0, 1), 0, 1
    _set_threads(cores)
    _set_ranks(ranks, node, num_nodes)
    _set_meeting_point(ranks)
    return ranks


def _set_defaults() -> None:
    scripts = str(Path(sys.prefix, "bin"))
    path = os.environ.get("PATH", os.defpath)
    if scripts not in path.split(os.pathsep):
        os.environ["PATH"] = scripts + os.pathsep + path
    private_caches(is_told=_rank() == "0")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_folder()))  # or /tmp for anybody
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # or up to 32 processes a rank
    if not has_cuda():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    elif not any(name in os.environ for name in ALLOCATOR):
        # Every pack has other sizes, and fixed segments would leave holes between them. The
        # allocator reads this with the first tensor on a device.
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
    # torch 2.13 renames two collectives: DeepSpeed's calls of the old names warn 4 times a step
    renamed = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)
    if not sys.stderr.isatty() or _rank() != "0":  # transformers' bars fill a log with \r
        disable_progress_bar()


def _set_threads(cores: int) -> None:
    """Give this rank's libraries the cores that are its own; what the user set holds.

    On the CPU one thread: two on two busy cores fell from 7 to 0.1 steps/s. torchrun sets 1 itself.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, cores) if has_cuda() else 1
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read by libraries that are loaded later
        torch.set_num_threads(threads)


def own_ranks() -> Ranks:
    """The place that `set_environment` has found and written down."""
    return _launcher_ranks()[0]


def _launcher_ranks() -> tuple[Ranks, int, int]:
    """The ranks that deepspeed or torchrun set, this node's index, and the number of nodes."""
    rank, world_size = _integer("RANK"), _integer("WORLD_SIZE")
    local_rank = _integer("LOCAL_RANK")
    local_size = _integer("LOCAL_SIZE", "LOCAL_WORLD_SIZE")  # deepspeed's name, torchrun's name
    ranks = Ranks(rank, world_size, local_rank, local_size)
    _check(ranks)
    node = _integer("CROSS_RANK", "GROUP_RANK", default=rank // local_size)
    num_nodes = _integer("CROSS_SIZE", "GROUP_WORLD_SIZE", default=-(-world_size // local_size))
    return ranks, node, num_nodes


def _step_ranks() -> tuple[Ranks, int, int]:
    """The same from an srun step.

    Only SLURM_STEP_* belong to the step alone: SLURM_PROCID is set in a batch script too, and
    SLURM_NTASKS counts the job's tasks, 4 in the one-task step that salloc opens for its shell.
    """
    rank, world_size = _integer("SLURM_PROCID"), _integer("SLURM_STEP_NUM_TASKS")
    node, num_nodes = _integer("SLURM_NODEID"), _integer("SLURM_STEP_NUM_NODES")
    tasks_per_node: list[int] = []  # "2(x3),1" is [2, 2, 2, 1]
    counts = os.environ["SLURM_STEP_TASKS_PER_NODE"]
    for tasks, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        tasks_per_node += [int(tasks)] * int(repeats or 1)
    ranks = Ranks(rank, world_size, _integer("SLURM_LOCALID"), tasks_per_node[node])
    _check(ranks)
    return ranks, node, num_nodes


def _integer(*names: str, default: int | None = None) -> int:
    """The value of the first of these variables that is set."""
    value = next((os.environ[name] for name in names if name in os.environ), default)
    try:
        return int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ConfigError(
            f"{' or '.join(names)} must be set to an integer, got {value!r} in the environment; "
            "start the ranks with deepspeed, torchrun or srun, or unset RANK to run on one rank"
        ) from None


def _check(ranks: Ranks) -> None:
    is_place = 0 <= ranks.rank < ranks.world_size
    is_local_place = 0 <= ranks.local_rank < ranks.local_size <= ranks.world_size
    if not is_place or not is_local_place:
        raise ConfigError(
            f"rank {ranks.rank} of {ranks.world_size} ranks, local rank {ranks.local_rank} of "
            f"{ranks.local_size} on this node, is no place in a run; unset RANK, WORLD_SIZE, "
            "LOCAL_RANK and LOCAL_SIZE, or start the ranks with deepspeed, torchrun or srun"
        )


def _set_ranks(ranks: Ranks, node: int, num_nodes: int) -> None:
    """Set each variable; one that is there already must say the same."""
    values = {
        "RANK": ranks.rank,
        "WORLD_SIZE": ranks.world_size,
        "LOCAL_RANK": ranks.local_rank,
        "LOCAL_SIZE": ranks.local_size,
        "LOCAL_WORLD_SIZE": ranks.local_size,
        "CROSS_RANK": node,
        "CROSS_SIZE": num_nodes,
    }
    for name, value in values.items():
        present = os.environ.setdefault(name, str(value))
        if present != str(value):
            raise ConfigError(
                f"{name} is {present} in the environment, but this process was started as rank "
                f"{ranks.rank} of {ranks.world_size} and {name} should be {value}; unset {name}"
            )


def _set_meeting_point(ranks: Ranks) -> None:
    """Set MASTER_ADDR and MASTER_PORT where absent: where rank 0 of several listens."""
    if ranks.local_size == ranks.world_size:  # else gloo listens where the host's name leads
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if ranks.world_size == 1:
        return  # nobody is to be met
    if "SLURM_STEP_NODELIST" in os.environ and "SLURM_JOB_ID" in os.environ:
        if "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"] = _first_address(os.environ["SLURM_STEP_NODELIST"])
        os.environ.setdefault("MASTER_PORT", str(20000 + _integer("SLURM_JOB_ID") % 10000))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError(
                f"{name} is not set, and {ranks.world_size} ranks need one place to meet; export "
                "MASTER_ADDR and MASTER_PORT, or start the ranks with deepspeed, torchrun or srun"
            )


def free_port() -> int:
    """A TCP port of this host on which nobody listens now."""
    address = loopback()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def loopback() -> str:
    """The address by which this host reaches itself: 127.0.0.1, or ::1 where that alone is there.

    Raises: ConfigError if there is neither.
    """
    for address, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
        with suppress(OSError), socket.socket(family) as probe:
            probe.bind((address, 0))
            return address
    raise ConfigError(
        f"{socket.gethostname()} has neither 127.0.0.1 nor ::1, by which its ranks are to meet; "
        "bring its loopback up (ip link set lo up)"
    )


def _first_address(nodelist: str) -> str:
    """The address by which Slurm itself reaches the first node of "gpu[07,09-12],head".

    Not what the name resolves to: that may be nothing, or 127.0.1.1 on the node itself.
    """
    node = re.sub(r"\[(\w+)[^]]*\]", r"\1", nodelist).split(",")[0]  # gpu07
    show = ["scontrol", "show", "node", "--oneliner", node]
    try:
        answer = subprocess.run(show, capture_output=True, text=True, check=True).stdout
        return answer.split("NodeAddr=")[1].split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise ConfigError(
            f"MASTER_ADDR is not set, and `{' '.join(show)}` gives no NodeAddr; export MASTER_ADDR "
            f"with the address of {node} before srun, as slurm/train.sh does"
        ) from None


def run_command(main: Callable[[], None], prints_result: bool = True) -> None:
    """Run a command's main and end the process as its user's mistakes ask for.

    prints_result  on stdout, which must get there; where it is read no more (`| head`) the command
                   ends without a word. What is printed besides, and all that a training prints, may
                   get lost

    Phi3VError: one line on stderr and its exit code. Every rank usually meets the same error, so
    rank 0 reports at once. What another rank alone has met, rank 0 reports where `share_mistakes`
    was called; else that rank does, after a grace time. So does a disk that is
    full, fails or may not be written to, with exit code 2. Ctrl-C: exit code 130. Anything else is
    a defect and keeps its traceback. All that is printed on the way out is `printable`.
    """
    fill_closed()
    sys.stderr = keep_printing(sys.stderr)
    if not prints_result:
        sys.stdout = keep_printing(sys.stdout)
    sys.excepthook = print_exception
    try:
        main()
        sys.stdout.flush()
    except Stopped as stopped:
        _leave_stopped(stopped)
    except Phi3VError as error:
        line = f"{type(error).__name__}: {' '.join(str(error).splitlines())}"
        _report(line, is_of_all=isinstance(error, Diverged))  # when the others have left
        _exit(error.exit_code)
    except KeyboardInterrupt:
        _exit(130)
    except Exception as error:
        if prints_result and isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout):
            _exit(NO_READER)
        if isinstance(error, OSError) and error.errno in ADVICE:
            _report(_describe_failure(error))
            _exit(2)
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        _fail(error)
    _exit(0)


def _leave_stopped(stopped: Stopped) -> NoReturn:
    """Leave with all ranks: the launcher sends SIGTERM to the others once one has left."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if _rank() == "0":
        print(stopped, file=sys.stderr)
    _exit(stopped.exit_code)


def share_mistakes() -> None:
    """From now on a user's mistake that one rank alone meets ends all of them with exit code 2.

    Rank 0 prints its line. A shard that one rank reads, say: the others wait in a collective by
    then, and would only see that a rank is gone. Call it once the process group is up.
    """
    if torch.distributed.get_world_size() > 1:
        arguments = (_get_default_store(), torch.distributed.get_world_size())
        threading.Thread(target=_listen, args=arguments, name="mistakes", daemon=True).start()


def _listen(store: Store, world_size: int) -> None:
    """Wait for a mistake of any rank, this one included, and end this process."""
    with suppress(RuntimeError):  # of the store: its server has gone, which others notice
        while not store.check([MISTAKE]):
            time.sleep(LISTEN_SECONDS + world_size / 1000)
        if _rank() != "0":
            store.add(HEARD, 1)
            os._exit(2)
        if _speaking.acquire(blocking=False):  # else rank 0 has a line of its own
            print(store.get(MISTAKE).decode(), file=sys.stderr, flush=True)
            _wait_until_heard(store, world_size)
            os._exit(2)


def _tell_others(line: str) -> Store | None:
    """Let the other ranks know why this one ends; returns where, if they listen."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return None
    where = "" if _rank() == "0" else f" (rank {_rank()} on {socket.gethostname()})"
    with suppress(RuntimeError):  # as in _listen
        store = _get_default_store()
        store.compare_set(MISTAKE, "", line + where)
        return store
    return None


def _wait_until_heard(store: Store, world_size: int) -> None:
    """Keep the store, which ends with rank 0, until all have looked; srun wants the same code."""
    deadline = time.monotonic() + LINGER_SECONDS + 2 * world_size / 1000
    with suppress(RuntimeError):
        while store.add(HEARD, 0) < world_size - 1 and time.monotonic() < deadline:
            time.sleep(LISTEN_SECONDS)


def _report(line: str, is_of_all: bool = False) -> None:
    """Write an error's line, if this rank is the one to do so.

    srun exits with the largest code of its tasks, 143 for one ended by SIGTERM: so from here on
    SIGTERM means 2, and rank 0 of a step stays until the others have failed as well.

    is_of_all  it needs no telling
    """
    line = printable(without_passwords(line))
    _end_on_signal(2)
    store = None if is_of_all else _tell_others(line)
    if _rank() != "0":
        _leave_it_to_others()  # where they listen, _listen ends this rank meanwhile
    elif not _speaking.acquire(blocking=False):
        time.sleep(2 * LINGER_SECONDS)  # _listen ends this rank meanwhile
    print(line, file=sys.stderr)
    sys.stderr.flush()
    if _rank() != "0":
        return
    if store is not None:
        _wait_until_heard(store, torch.distributed.get_world_size())
    elif os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        time.sleep(LINGER_SECONDS)


def _has_no_reader(stream: TextIO) -> bool:
    """Whether a stream is a pipe whose reader has ended."""
    poll = select.poll()
    with suppress(OSError, ValueError):  # a stream without a descriptor
        poll.register(stream.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False


def _describe_failure(error: OSError) -> str:
    where = error.filename or "a file of this command, or its stdout"
    return (
        f"{type(error).__name__}: {where}: {error.strerror}; {ADVICE[error.errno or 0]} start the "
        "same command again: the last checkpoint and all finished files are intact"
    )


def _fail(error: Exception) -> NoReturn:
    """Print the traceback below a line that names the rank, and wait for nobody.

    Where the error is but the echo of another rank's death, the launcher usually ends this rank
    before it speaks: the cause stands alone.
    """
    try:
        headline = f"rank {_rank()} failed:\n"
        if _is_echo(error):
            _end_on_signal(1)
            _leave_it_to_others()
            headline = f"rank {_rank()} ends because another rank is gone, which is the cause:\n"
        with suppress(OSError):
            sys.stdout.flush()
        text = headline + "".join(traceback.format_exception(error))
        print(text, end="", file=sys.stderr, flush=True)
    finally:
        os._exit(1)


def _is_echo(error: BaseException | None) -> bool:
    """Whether a collective failed because another rank had gone (gloo, NCCL, TCPStore)."""
    while error is not None:
        if isinstance(error, RuntimeError) and any(words in str(error) for words in ECHOES):
            return True
        error = error.__cause__ or error.__context__
    return False


def _end_on_signal(code: int) -> None:
    """Let the launcher's SIGTERM end this process silently, with this exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(code))


def _leave_it_to_others() -> None:
    """Wait as long as another rank may need to speak, and the launcher to end this one."""
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    stagger = STAGGER_SECONDS * int(local_rank) if local_rank.isdigit() else 0
    time.sleep(GRACE_SECONDS + stagger)


def _rank() -> str:
    """The rank as text, for the variable may be what is wrong."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))


def _exit(code: int) -> NoReturn:
    """Leave; at once where a process group is up, whose destructor may wait for other ranks.

    Or end the process: of some 40 runs under load two were aborted in their last moment, all done,
    by a thread of gloo's that was still joinable ("terminate called without an active exception").
    """
    sys.stdout = keep_printing(sys.stdout)  # or Python would make 120 of the code
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
