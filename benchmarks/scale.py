"""A thousand ranks through agent.yaml, gateway.yaml and Prometheus on this machine: what goes through, at what cost.

    make stack                                    # the real Collector and Prometheus
    python benchmarks/scale.py                    # about ten minutes
    python benchmarks/scale.py --quick            # a smoke run: the figures mean nothing
    python benchmarks/scale.py --parts deliverer  # or cluster, or thousand: one of the three

*deliverer*: the deliverer of 8 ranks at 1 step/s, alone: its share of a core.

*cluster*: 64 ranks of 8 hosts, a deliverer each, at 1 and at 10 steps/s through the chain: requests, CPU a point, age.

*thousand*: 1,000 ranks, up to where the two cores are full:

1. *History*: the ranks' last quarter of an hour, written with times of then and delivered to Prometheus directly.
2. *Rates*: one process writes the ranks' journals at a rate of steps, one real deliverer process for each host sends
   them to the agent; the next rate follows while the chain keeps up.
3. *Queries*: every Prometheus query of the dashboards, filled for all ranks, over what is there by then.

What is not in it: training, its GPUs and the network. Traces and logs go as far as the gateway's exporters, to a server
that discards them. Journals are written through `Run`, 1,000 in one process, which a thousand processes would do.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import measuring
import thousand
from measuring import Receiver, Worker
from thousand import JOB, ROOT, raise_limit

PARTS = ("deliverer", "cluster", "thousand")
LEFT_BEHIND = 0.1  # seconds by which delivery may fall behind each second of a phase before it counts as saturated


# --- the parts, and what they use


@dataclass
class Chain:
    """Everything that runs, as processes by name."""

    prometheus: Any
    gateway: Any
    agent: Any
    processes: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))

    def metrics(self, server: Any) -> dict[str, float]:
        """A Collector's own metrics: name, or name{exporter} -> value."""
        found: dict[str, float] = {}
        answer = server._http.get(f"http://{server.metrics_address}/metrics", timeout=10)
        for line in answer.text.splitlines():
            if match := re.match(r"(\w+)(?:\{(.*)\})? ([\d.e+-]+)$", line):
                exporter = re.search(r'exporter="([^"]+)"', match[2] or "")
                name = match[1] + (f"{{{exporter[1]}}}" if exporter else "")
                found[name] = found.get(name, 0.0) + float(match[3])
        return found

    def snapshot(self) -> dict[str, float]:
        """Where everything stands now."""
        import psutil

        agent, gateway = self.metrics(self.agent), self.metrics(self.gateway)
        found = {
            "time": time.time(),
            "points": gateway.get("otelcol_exporter_sent_metric_points_total{otlp_http/prometheus}", 0.0),
            "spans": gateway.get("otelcol_exporter_sent_spans_total{otlp_grpc/tempo}", 0.0),
            "requests": agent.get("otelcol_loadbalancer_backend_outcome_total", 0.0),
            "agent's queue": agent.get("otelcol_exporter_queue_size{load_balancing/metrics}", 0.0),
            "gateway's queue": gateway.get("otelcol_exporter_queue_size{otlp_http/prometheus}", 0.0),
            "age": self.age(),
        }
        for name, processes in self.processes.items():
            for process in processes:
                try:
                    used, memory = process.cpu_times(), process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
                found[f"{name} cpu"] = found.get(f"{name} cpu", 0.0) + used.user + used.system
                found[f"{name} rss"] = found.get(f"{name} rss", 0.0) + memory
        return found

    def age(self) -> float:
        """How far behind Prometheus is with the rank that it is furthest behind with, in seconds."""
        result = self.prometheus.query(f'max(time() - timestamp(training_step_number{{job_id="{JOB}"}}))')
        return float(result[0]["value"][1]) if result else 0.0

    def scrape(self, name: str) -> float:
        """One of Prometheus' own metrics, summed over its labels."""
        text = self.prometheus._http.get(f"{self.prometheus.url}/metrics", timeout=10).text
        return sum(float(value) for value in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE))


def say(text: str) -> None:
    """How far we are."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


# --- 1. history


def history(options: argparse.Namespace, chain: Chain, generator: Worker, place: Path) -> None:
    """A quarter of an hour of all ranks into Prometheus, at full speed and without Collectors."""
    say(f"history: {options.ranks:,} ranks write {options.history} s of 1 step a second")
    began = time.perf_counter()
    steps = int(generator(history=options.history)["steps"])
    written = time.perf_counter() - began
    size = sum(path.stat().st_size for path in (place / "history").rglob("*.jsonl"))
    say(f"history: {size / 1e6:,.0f} MB of journals in {written:.0f} s; delivering")
    before, began = chain.scrape("prometheus_tsdb_head_samples_appended_total"), time.perf_counter()
    command = [sys.executable, "-m", "stepspan", "sync", str(place / "history")]
    done = subprocess.run(
        [*command, "--endpoint", chain.prometheus.otlp_endpoint],
        env={**os.environ, "OTEL_TRACES_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    took = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"the history was not delivered: {done.stdout}")
    samples_in = chain.scrape("prometheus_tsdb_head_samples_appended_total") - before
    series = chain.scrape("prometheus_tsdb_head_series")
    chunks = sum(path.stat().st_size for path in (chain.prometheus.directory / "data" / "chunks_head").iterdir())
    cells = [
        f"{steps:,}",
        f"{size / 1e6:,.0f} MB ({size / steps:,.0f} B a step)",
        f"{samples_in:,.0f}",
        f"{samples_in / took:,.0f}",
        f"{series:,.0f}",
        f"{chunks / 1e6:,.0f} MB",
    ]
    head = ["", "steps", "journals", "samples", "samples/s into Prometheus", "series", "chunks on its disk"]
    measuring.table("**history: one deliverer, no Collector**", head, [[f"{options.history} s", *cells]])


# --- 2. rates


def one_deliverer(options: argparse.Namespace, place: Path, discards: Receiver) -> None:
    """What a host's deliverer costs while its ranks train: eight at one step a second, nothing else to do."""
    import psutil

    say(f"{thousand.LOCAL} ranks at 1 step/s, one deliverer, for {options.seconds} s")
    place.mkdir()
    generator = Worker(thousand.__file__, {"ranks": thousand.LOCAL, "hosts": 1, "place": str(place)})
    generator.result()
    generator(history=1)
    thread = threading.Thread(target=lambda: generator(live=1.0, seconds=options.seconds + 8))
    thread.start()
    wait_for_sessions(place, thousand.LOCAL)
    process = psutil.Process(start_deliverer(place, 0, discards.endpoint).pid)
    time.sleep(5)  # until it has started, and caught up
    discards.counts()
    before, began = process.cpu_times(), time.perf_counter()
    time.sleep(options.seconds)
    after, took, counts = process.cpu_times(), time.perf_counter() - began, discards.counts()
    used = after.user + after.system - before.user - before.system
    cells = [f"{used / took:.2%}", f"{counts.get('requests', 0) / took:.1f}", f"{counts.get('bytes', 0) / took:,.0f}"]
    cells += [f"{process.memory_info().rss / 2**20:,.0f} MiB"]
    head = ["", "of a core", "requests/s", "bytes/s", "memory"]
    measuring.table("**one deliverer, 8 ranks at 1 step/s**", head, [[f"{took:.0f} s", *cells]])
    thread.join()
    generator(end=True)
    generator.close()
    process.terminate()
    process.wait(20)


def rates(options: argparse.Namespace, chain: Chain, generator: Worker, place: Path) -> None:
    """Phase after phase, each at a higher rate, until the chain falls behind."""
    for rate in options.rates:
        say(f"{rate:g} steps/s a rank for {options.seconds} s")
        orders = {"live": rate, "seconds": options.seconds}
        results: dict[str, float] = {}
        thread = threading.Thread(target=lambda into=results, orders=orders: into.update(generator(**orders)))
        thread.start()
        if not chain.processes["deliverers"]:
            deliverers(options, chain, place)
        time.sleep(options.seconds / 2)  # until it has settled
        before = chain.snapshot()
        time.sleep(options.seconds / 2 - 1)
        after = chain.snapshot()
        thread.join()
        window = after["time"] - before["time"]
        behind = (after["age"] - before["age"]) / window > LEFT_BEHIND or results["late"] > 1
        report(rate, options.ranks, before, after, "falls behind" if behind else "keeps up")
        if behind:
            break
    generator(end=True)
    drain(options, chain)


def deliverers(options: argparse.Namespace, chain: Chain, place: Path) -> None:
    """The process that a run starts on its host, once for each host."""
    import psutil

    wait_for_sessions(place, options.ranks)
    for number in range(options.hosts):
        started = start_deliverer(place, number, chain.agent.http_endpoint)
        chain.processes["deliverers"].append(psutil.Process(started.pid))


def wait_for_sessions(place: Path, count: int) -> None:
    (place / "live").mkdir(exist_ok=True)
    while len(list((place / "live").glob("*/*/rank-*"))) < count:
        time.sleep(0.05)


def start_deliverer(place: Path, host: int, endpoint: str) -> subprocess.Popen[bytes]:
    from stepspan.deliver.spawn import spawn
    from stepspan.exporters.otlp import OtlpExporter

    exporter = OtlpExporter(endpoint, destination=thousand.DESTINATION)
    return spawn(place / "live", f"host-{host}", [exporter], {}, health=True, env=os.environ)


def report(rate: float, ranks: int, before: Mapping[str, float], after: Mapping[str, float], verdict: str) -> None:
    gone = {name: after[name] - before.get(name, 0.0) for name in after}
    window = gone["time"]
    chain_cpu = sum(gone.get(f"{name} cpu", 0.0) for name in ("agent", "gateway", "prometheus"))
    rows = [
        ["steps logged a second", f"{rate * ranks:,.0f}"],
        ["points/s accepted by Prometheus", f"{gone['points'] / window:,.0f}"],
        ["spans/s through the gateway", f"{gone['spans'] / window:,.0f}"],
        ["requests/s from agent to gateway", f"{gone['requests'] / window:,.0f}"],
        ["points a request, traces' requests included", f"{gone['points'] / max(1.0, gone['requests']):.0f}"],
        ["CPU a point, agent, gateway and Prometheus together", f"{chain_cpu / max(1.0, gone['points']) * 1e6:.1f} µs"],
        ["Prometheus behind, at the beginning and end", f"{before['age']:.1f} s, {after['age']:.1f} s"],
        ["queues of agent and gateway at the end", f"{after[A] / 1e6:.1f} MB, {after[G] / 1e6:.1f} MB"],
    ]
    for name in ("generator", "deliverers", "agent", "gateway", "prometheus"):
        cores, memory = gone.get(f"{name} cpu", 0.0) / window, after.get(f"{name} rss", 0.0) / 2**20
        rows.append([f"{name}: cores, memory", f"{cores:.2f}, {memory:,.0f} MiB"])
    measuring.table(f"**{rate:g} steps/s a rank: {verdict}**", ["", f"{window:.0f} s"], rows)


A, G = "agent's queue", "gateway's queue"


def drain(options: argparse.Namespace, chain: Chain) -> None:
    """What waits is delivered with nobody writing: the rate at which the chain is saturated."""
    before = chain.snapshot()
    say(f"nobody writes any more: {before[A] / 1e6:.1f} MB at the agent, {before[G] / 1e6:.1f} MB at the gateway wait")
    deadline, last = time.monotonic() + options.patience, before
    while time.monotonic() < deadline:
        time.sleep(1)
        now = chain.snapshot()
        if now["points"] == last["points"] and not now[A] and not now[G]:
            break
        last = now
    window = last["time"] - before["time"]
    if window > 2:
        rate = (last["points"] - before["points"]) / window
        print(f"\nDrained in {window:.0f} s: {rate:,.0f} points/s, {last['points']:,.0f} in all.", flush=True)


# --- 3. queries


def queries(options: argparse.Namespace, chain: Chain, generator: Worker, place: Path) -> None:
    """Every query of the dashboards, as Grafana asks it for all ranks."""
    from harness import grafana

    say("asking the dashboards' queries")

    span = min(900, options.history + 120)
    values = {"job": JOB, "rank": ".*", "split": ".*", "slower": "0s", "range": str(span)}
    raw = grafana.value_of_raw(chain.prometheus.query, **values)
    for choice in dict.fromkeys((raw, ".*")):
        ask(options, chain, {**values, "raw": choice}, span)
    groups = chain.prometheus._http.get(f"{chain.prometheus.url}/api/v1/rules").json()["data"]["groups"]
    cells = [[g["name"], f"{g['interval']:g} s", f"{g['evaluationTime']:.2f} s"] for g in groups]
    measuring.table("**rules**", ["group", "every", "its last evaluation took"], cells)


def ask(options: argparse.Namespace, chain: Chain, values: dict[str, str], span: int) -> None:
    from harness import grafana

    rows: list[tuple[float, float, str]] = []
    for name in grafana.NAMES:
        board = grafana.dashboard(name)
        points = {panel["title"]: panel.get("maxDataPoints") or 1000 for panel in grafana.panels(board)}
        for query in grafana.queries(name):
            if query.source != "prometheus":
                continue
            title = query.of.partition(": ")[2].rpartition(" (")[0]
            text = query.filled(**values)
            took = [timed(chain, text, span, points[title], instant=query.instant) for _ in range(options.repeats)]
            rows.append((sorted(took)[len(took) // 2], max(took), query.of))
            if max(took) > 0.5:
                say(f"{max(took):.2f} s: {query.of}")
    rows.sort(reverse=True)
    total = sum(took for took, _, _ in rows)
    over = sum(worst >= 1 for _, worst, _ in rows)
    print(f"\n{len(rows)} queries over {span} s, $raw={values['raw']}, each {options.repeats} times: ", end="")
    print(f"{total:.1f} s together, {over} of them 1 s or more at the worst.")
    table = [[of, f"{took:.3f} s", f"{worst:.3f} s"] for took, worst, of in rows[:10]]
    measuring.table(f"**the slowest queries, $raw={values['raw']}**", ["", "median", "worst"], table)


def timed(chain: Chain, text: str, span: int, points: int, *, instant: bool) -> float:
    """Seconds until Prometheus has answered."""
    now = time.time()
    if instant:
        path, data = "query", {"query": text, "time": repr(now)}
    else:
        step = max(1, ceil(span / points))
        path, data = "query_range", {"query": text, "start": repr(now - span), "end": repr(now), "step": str(step)}
    began = time.perf_counter()
    answer = chain.prometheus._http.post(f"{chain.prometheus.url}/api/v1/{path}", data=data, timeout=120)
    took = time.perf_counter() - began
    if not answer.ok:
        raise SystemExit(f"{text}: {answer.text}")
    return took


# --- what a request weighs


def sizes(place: Path) -> None:
    """One rank's history as requests: live, a step at a time, and as an offline run is sent."""
    from stepspan.journal.layout import find_sessions
    from stepspan.otlp.protobuf import encode

    session = next(find_sessions(place / "history"))
    rows = []
    for name, size in (("a step", 1), ("10 steps", 10), ("512 KiB of journal", 0)):
        count = points = wire = 0
        for resource_of, records in batches(session, size):
            count, points = count + 1, points + len(records)
            wire += len(encode("metrics", resource_of, records))
        if count:  # not with a history of a few steps
            rows.append([name, f"{points / count:,.0f}", f"{wire / count:,.0f}", f"{wire / points:.0f}"])
    measuring.table(
        "**requests of metrics over http/protobuf, uncompressed**",
        ["holding", "points", "bytes", "bytes a point"],
        rows,
    )


def batches(session: Any, steps: int) -> Iterator[tuple[Any, Sequence[Any]]]:
    """The points of a session, `steps` steps at a time; 0: as many as a deliverer that catches up puts together."""
    from stepspan.deliver.options import BATCH_BYTES
    from stepspan.mapping.mapper import mapper
    from stepspan.reading.sessions import SessionReader

    with SessionReader(session) as reader:
        fold = mapper("metrics", reader.header)
        waiting: list[Any] = []
        for batch in reader.batches(size=BATCH_BYTES):
            if not steps:
                yield reader.header["resource"], fold.map(batch.events)
                continue
            for event in batch.events:
                waiting.append(event)
                if event["tag"] == "step_end" and sum(e["tag"] == "step_end" for e in waiting) == steps:
                    yield reader.header["resource"], fold.map(waiting)
                    waiting = []


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="a smoke run: the figures mean nothing")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options.add_argument("--ranks", type=int, default=1000, help="of the part `thousand`, as all that follows")
    options.add_argument("--hosts", type=int, default=4, help="deliverer processes")
    options.add_argument("--history", type=int, default=780, help="seconds of one step a second, before it begins")
    options.add_argument("--rates", type=float, nargs="+", default=[0.5, 1, 2, 4, 8], help="steps/s a rank")
    options.add_argument("--seconds", type=int, default=30, help="of each rate, in all parts")
    options.add_argument("--repeats", type=int, default=3, help="of each query")
    options.add_argument("--patience", type=int, default=90, help="seconds until what waits counts as stuck")
    options.add_argument("--directory", help="where journals and stores go")
    given = options.parse_args()
    stack = os.environ.get("STEPSPAN_STACK")
    measuring.clean_environment()
    cluster = argparse.Namespace(**{**vars(given), "ranks": 64, "hosts": 8, "history": 5, "rates": [1.0, 10.0]})
    if given.quick:
        cluster.ranks, cluster.hosts, cluster.rates = 16, 2, [1.0]
        given.ranks, given.history, given.rates, given.repeats = 16, 5, [1.0], 1
        cluster.seconds = given.seconds = 6
    if stack:
        os.environ["STEPSPAN_STACK"] = stack
    if not Path(stack or ROOT / ".stack", "otelcol").exists():
        raise SystemExit("the real Collector and Prometheus are missing: `make stack` builds them")
    raise_limit()
    os.environ["STEPSPAN_SAMPLERS"] = "none"
    print(f"# The cost of delivery\n\n{measuring.machine()}", flush=True)
    with tempfile.TemporaryDirectory(dir=given.directory) as directory, Receiver() as discards:
        if "deliverer" in given.parts:
            one_deliverer(given, Path(directory, "deliverer"), discards)
        if "cluster" in given.parts:
            print(f"\n## {cluster.ranks:,} ranks of {cluster.hosts} hosts", flush=True)
            measure(cluster, Path(directory, "cluster"), discards, parts=(rates,))
        if "thousand" in given.parts:
            print(f"\n## {given.ranks:,} ranks", flush=True)
            measure(given, Path(directory, "thousand"), discards, parts=(rates, queries))
    print(f"\n{measuring.machine()}")


def measure(options: argparse.Namespace, place: Path, discards: Receiver, parts: Sequence[Any]) -> None:
    """Send the ranks' history, then do some parts of it through a chain of its own."""
    import psutil
    from harness.stack import StackCollector, StackPrometheus

    place.mkdir()
    prometheus = StackPrometheus(place / "prometheus")
    gateway = StackCollector(
        place / "gateway",
        "gateway.yaml",
        record=False,
        PROMETHEUS_OTLP=prometheus.otlp_endpoint,
        TEMPO_OTLP=discards.grpc_endpoint.removeprefix("http://"),
        LOKI_OTLP=discards.endpoint,
    )
    agent = StackCollector(place / "agent", "agent.yaml", record=False, COLLECTOR_GATEWAYS=f"[{gateway.grpc_target}]")
    prometheus.scrapes += [gateway.metrics_address, agent.metrics_address]
    task = {"ranks": options.ranks, "hosts": options.hosts, "place": str(place)}
    chain = Chain(prometheus, gateway, agent)
    with prometheus, gateway, agent:
        generator = Worker(thousand.__file__, task)
        generator.result()
        servers: dict[str, Any] = {"prometheus": prometheus, "gateway": gateway, "agent": agent, "generator": generator}
        for name, server in servers.items():
            chain.processes[name].append(psutil.Process(server._process.pid))
        try:
            history(options, chain, generator, place)
            if queries in parts:
                sizes(place)
            for part in parts:
                part(options, chain, generator, place)
        finally:
            generator.close()
            for process in chain.processes["deliverers"]:
                if process.is_running():
                    process.terminate()
            psutil.wait_procs(chain.processes["deliverers"], timeout=20)


if __name__ == "__main__":
    main()
