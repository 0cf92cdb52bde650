"""Runs nnU-Net's own commands one after the other and shows how far they are."""

import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from nnunet_dyn.errors import JobError

# A line of nnU-Net's output in, what to show beside the running step out; None leaves it as it was.
Progress = Callable[[str], str | None]

HEARTBEAT_SECONDS = 60.0
LAST_LINES = 5


def minutes(seconds: float) -> str:
    """`seconds` as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def find_command(name: str) -> str:
    """Path of the console script `name` of this Python's environment.

    Raises:
        JobError: it is not there.
    """
    # Beside this interpreter first: the search path may belong to another environment, with another nnU-Net.
    found = shutil.which(name, path=os.path.dirname(sys.executable)) or shutil.which(name)
    if found is None:
        raise JobError(
            f"{name} was not found beside {sys.executable} or on the search path. Expected nnU-Net's commands in this "
            "environment; install it with 'pip install nnunetv2'."
        )
    return found


def _end_group(process: subprocess.Popen) -> None:
    """End a command and its workers."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


class Steps:
    """Announces numbered steps, runs their commands and remembers how long each took.

    Args:
        total: number of steps.
        logs: folder for one log file per command.
        environment: of the commands.
        stream: where progress goes; a terminal gets one live line per step, anything else a line per change.
    """

    def __init__(self, total: int, logs: Path, environment: Mapping[str, str], stream: TextIO | None = None):
        self.total = total
        self.logs = logs
        self.environment = dict(environment)
        self.stream = sys.stdout if stream is None else stream
        self.seconds: dict[str, float] = {}
        self._live = self.stream.isatty()
        self._started = time.monotonic()
        self._step_started = self._started
        self._title = ""

    @property
    def elapsed(self) -> float:
        """Seconds since the first step."""
        return time.monotonic() - self._started

    def begin(self, title: str) -> None:
        """Start the next step."""
        self._title = title
        self._step_started = time.monotonic()
        self._show("")

    def end(self, detail: str = "") -> None:
        """Finish the step that was begun."""
        seconds = time.monotonic() - self._step_started
        self.seconds[self._title] = round(seconds, 1)
        self._show(f"done in {minutes(seconds)}{': ' if detail else ''}{detail}", final=True)

    def command(self, name: str, arguments: Sequence[object], progress: Progress | None = None) -> None:
        """Run one of nnU-Net's commands in the step that was begun; its output goes to `logs/<name>.log`.

        Raises:
            JobError: it exits with anything but 0. The message has the step, the log file and the last lines.
        """
        log_file = self.logs / f"{name}.log"
        command = [find_command(name), *map(str, arguments)]
        last: deque[str] = deque(maxlen=LAST_LINES)
        with open(log_file, "w", encoding="utf-8") as log:
            log.write(" ".join(command) + "\n\n")
            process = subprocess.Popen(
                command,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                errors="replace",
                # A group of its own, so that nnU-Net's workers can be ended together with it.
                start_new_session=True,
            )
            try:
                for line in self._lines(process):
                    log.write(line + "\n")
                    log.flush()
                    if line.strip():
                        last.append(line.strip())
                    if progress is not None:
                        self._show_if_new(progress(line))
                status = process.wait()
            except BaseException:
                _end_group(process)
                raise
        if status != 0:
            # A negative status is the number of a signal.
            how = "was killed, perhaps for want of memory." if status == -9 else f"ended with exit status {status}."
            raise JobError(
                f"step '{self._title}' failed: {name} {how} "
                f"Its output is in {log_file}; the last lines are: {' | '.join(last) or 'none'}"
            )

    def _lines(self, process: subprocess.Popen):
        """Lines of the output as they come, keeping the elapsed time on the screen alive in between."""
        lines: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            for line in process.stdout:
                lines.put(line.rstrip("\n"))
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=1.0 if self._live else HEARTBEAT_SECONDS)
            except queue.Empty:
                self._show(self._detail)
                continue
            if line is None:
                return
            yield line

    def _show_if_new(self, detail: str | None) -> None:
        if detail is not None and detail != self._detail:
            self._show(detail)

    def _show(self, detail: str, final: bool = False) -> None:
        self._detail = detail
        text = f"[{len(self.seconds) + (not final)}/{self.total}] {minutes(self.elapsed):>5}  {self._title}"
        if detail:
            text += f": {detail}"
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            text = "\r" + (text if final else text[:width]).ljust(width) + ("\n" if final else "")
        else:
            text += "\n"
        self.stream.write(text)
        self.stream.flush()
