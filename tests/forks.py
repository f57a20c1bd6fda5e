"""Runs a script as a process, or as several that torchrun would have started, forked from one that has imported torch
already: the import takes six seconds, a run of a tiny model less than one."""

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import socket
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["forks", "train", "evaluate", "torch._dynamo"])  # the last: optimizers import it, late


def run_script(line: list[str], env: dict[str, str], output: str) -> None:
    """What a forked process does: `python` with this command line, stdout and stderr going to one file."""
    os.environ.update(env)
    fd = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.argv = line
    runpy.run_path(line[0], run_name="__main__")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Job:
    """A command that has been started. line: the script and its flags; env: of each process, beside torchrun's."""

    def __init__(self, *line, processes: int = 1, env: dict[str, str] | None = None):
        with pytest.MonkeyPatch.context() as patch:  # of the process that is forked, which starts at the first use
            patch.setenv("PYTHONPATH", f"{ROOT / 'tests'}:{ROOT}")
            patch.setenv("OMP_NUM_THREADS", "1")
            multiprocessing.forkserver.ensure_running()
        self.output = tempfile.NamedTemporaryFile()  # noqa: SIM115  as long as the job is looked at
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        meet.update(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
        self.processes = []
        for rank in range(processes):
            place = {**meet, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            args = ([str(x) for x in line], {**place, **(env or {})}, self.output.name)
            self.processes.append(FORKS.Process(target=run_script, args=args, daemon=True))
            self.processes[-1].start()

    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        """SIGKILL, which no process can catch."""
        for process in self.processes:
            process.kill()
        self.wait()

    def wait(self, timeout: float = 120) -> list[int]:
        """The exit status of each process, negative for a signal."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.1, end - time.monotonic()))
        assert not self.running(), f"it has not ended after {timeout} s:\n{self.text}"
        return [process.exitcode for process in self.processes]

    @property
    def text(self) -> str:
        """What the processes have written so far."""
        return Path(self.output.name).read_text(errors="replace")
