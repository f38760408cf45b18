"""What both benchmarks share: a receiver that takes everything, the state of the machine, and the figures of rounds.

A ratio of two figures means something only if both were taken side by side. So contenders take turns, round after
round, each in a process of its own, and a ratio is taken within each round. What is reported is the median of the
rounds and, in brackets, the quartiles.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

PACKAGES = ("opentelemetry-sdk", "protobuf", "orjson", "requests", "grpcio")
SOURCE = str(Path(__file__).parents[1] / "src")
STEP = 100_000_000  # ns of event time
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b"


class Receiver:
    """A server on the loopback, in a process of its own, that reads each request and answers 200."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        http, grpc = json.loads(self._process.stdout.readline())
        self.endpoint = f"http://127.0.0.1:{http}"
        self.grpc_endpoint = f"http://127.0.0.1:{grpc}"

    def counts(self) -> dict[str, float]:
        """Requests and their bytes since the last time it was asked, and the CPU seconds it has used."""
        with urllib.request.urlopen(f"{self.endpoint}/counts") as answer:
            counts: dict[str, float] = json.load(answer)
            return counts

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve() -> None:
    """Be the receiver: print the ports, then serve until terminated."""
    counts: Counter[str] = Counter()
    listener = socket.create_server(("127.0.0.1", 0))
    print(json.dumps([listener.getsockname()[1], _serve_grpc(counts)]), flush=True)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer, args=(connection, counts), daemon=True).start()


def _answer(connection: socket.socket, counts: Counter[str]) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    room = memoryview(bytearray(1 << 20))
    with connection, contextlib.suppress(ConnectionError):
        while True:
            head = b""
            while (end := head.find(b"\r\n\r\n")) < 0:
                piece = connection.recv(1 << 16)
                if not piece:
                    return
                head += piece
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
            missing = length - (len(head) - end - 4)
            while missing > 0:
                got = connection.recv_into(room[:missing])
                if not got:
                    return
                missing -= got
            body = b""
            if head.startswith(b"GET"):
                body = json.dumps({**counts, "cpu": time.process_time()}).encode()
                counts.clear()
            else:
                counts["requests"] += 1
                counts["bytes"] += length
            connection.sendall(ANSWER % (len(body), body))


def _serve_grpc(counts: Counter[str]) -> int:
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    def take(request: bytes, _: object) -> bytes:
        counts["requests"] += 1
        counts["bytes"] += len(request)
        return b""

    class Everything(grpc.GenericRpcHandler):  # type: ignore[type-arg] # it takes none at run time
        def service(self, _: object) -> grpc.RpcMethodHandler[bytes, bytes]:
            return grpc.unary_unary_rpc_method_handler(take)

    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((Everything(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    _answer.server = server  # type: ignore[attr-defined]  # a server that nobody holds stops
    return port


class Worker:
    """A contender in a process of its own: `script --worker TASK` reads orders and prints results, as JSON lines."""

    def __init__(self, script: str, task: Mapping[str, object], *, python: str | None = None) -> None:
        self._process = subprocess.Popen(
            [python or sys.executable, script, "--worker", json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": SOURCE} if python else None,
        )

    def __call__(self, **order: object) -> dict[str, float]:
        """Give an order and wait for its results."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self.result()

    def result(self) -> dict[str, float]:
        """What it says next."""
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"a contender ended early: exit code {self._process.wait()}")
        results: dict[str, float] = json.loads(answer)
        return results

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class StepClock:
    """Event time, moved by hand: a journal of an hour is written in a second."""

    def __init__(self, started: int) -> None:
        self.now = started

    def __call__(self) -> int:
        self.now += 1000
        return self.now


def write_journal(directory: Path, steps: int, *, rank: int = 0, world_size: int = 1, job_id: str = "journal") -> None:
    """A run of steps with five metrics each, 10 a second, that has just ended; by the real writer."""
    import stepspan
    from stepspan.exporters.jsonl import JsonlExporter

    clock = StepClock(time.time_ns() - steps * STEP)
    exporters = [JsonlExporter(directory, clock=clock)]
    with stepspan.start_run(job_id=job_id, rank=rank, world_size=world_size, exporters=exporters) as run:
        for n in range(steps):
            with run.step(n):
                clock.now += STEP - 3000
                run.log_metrics({"loss": n / 3, "lr": 3e-4, "grad_norm": n * 0.1, "accuracy": 0.9, "tokens": n / 7})


def clean_environment() -> None:
    """Nothing that is set where this runs may change what is measured, and no library takes a core for itself."""
    for name in list(os.environ):
        if name.startswith(("OTEL_", "STEPSPAN_")):
            del os.environ[name]
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))


def orders() -> Iterator[dict[str, object]]:
    """In a worker: what it is told to do. Answer each with `answer`."""
    for line in sys.stdin:
        yield json.loads(line)


def answer(**results: object) -> None:
    print(json.dumps(results), flush=True)


def peak_memory() -> float:
    """The most memory this process has held, MiB. `ru_maxrss` may be the parent's, whose memory a child starts with."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1024 if sys.platform == "linux" else 1 << 20)


def middle(figures: Sequence[float], digits: int = 1) -> str:
    """Median and quartiles."""
    low, median, high = quartiles(figures)
    return f"{median:,.{digits}f} [{low:,.{digits}f}-{high:,.{digits}f}]"


def quartiles(figures: Sequence[float]) -> tuple[float, float, float]:
    if len(figures) < 2:
        return figures[0], figures[0], figures[0]
    low, median, high = statistics.quantiles(figures, n=4, method="inclusive")
    return low, median, high


def verdict(ratios: Sequence[float], target: float) -> str:
    """A ratio and whether it is what was promised."""
    return f"{middle(ratios)}x, at least {target:g}x promised: {'yes' if quartiles(ratios)[1] >= target else 'NO'}"


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n{title}\n")
    print("| " + " | ".join(head) + " |")
    print("|---|" + "---:|" * (len(head) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


def machine() -> str:
    """What it is and how busy: before and after, so that the figures can be judged."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    busy = psutil.cpu_percent(interval=1.0)
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"{time.strftime('%Y-%m-%d %H:%M')}: {cores} cores ({platform.machine()}), {platform.system()}, Python "
        f"{platform.python_version()}, {versions}; load {os.getloadavg()[0]:.1f}, {busy:.0f}% busy with other things"
    )


if __name__ == "__main__":
    serve()
