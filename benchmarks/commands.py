"""Time and memory of a command with all its processes."""

import resource
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path


def tree(root: int) -> list[int]:
    """``root`` and its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # gone in the meantime
            continue
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def memory(processes: list[int]) -> int:
    """Bytes of memory that ``processes`` hold together; what they share counts once."""
    total = 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def measure(command: Sequence[object]) -> tuple[float, float, int]:
    """Seconds, CPU seconds and peak bytes of ``command`` with its children.

    The peak is the largest sum of the proportional set sizes, sampled once a second, so that this takes hardly any time
    from the command; Linux only.
    """
    peak = 0
    done = threading.Event()

    def watch(root: int) -> None:
        nonlocal peak
        while not done.wait(1.0):
            peak = max(peak, memory(tree(root)))

    start, cpu = time.perf_counter(), cpu_seconds()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*map(str, command)], stdout=log, stderr=subprocess.STDOUT)
        watcher = threading.Thread(target=watch, args=(process.pid,))
        watcher.start()
        status = process.wait()
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
        if status:
            log.seek(0)
            raise SystemExit(f"{command} ended with {status}:\n{log.read()[-3000:]}")
    return seconds, cpu_seconds() - cpu, peak


def cpu_seconds() -> float:
    """Of all children that have ended, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
