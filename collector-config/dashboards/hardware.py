"""Dashboard "Hardware": GPUs, hosts, processes and memory beneath the job."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as board

from dashboards import panels
from dashboards.panels import JOB, RANK, Panel, Query, graph, lines, listing, most, number, rows
from dashboards.rules import recorded

HOT = [(80.0, "yellow"), (90.0, "red")]
UNCORRECTED = 'error_type!="corrected"'
FULL = [(0.85, "yellow"), (0.95, "red")]
GPU = "rank {{rank}}, GPU {{hw_id}}"
HOST = "host of rank {{rank}}"
CACHED = "Used, cached and free. Cached memory is given back when it is needed."
NOT_CLOSED = "Climbing without end: something is never closed; the limit ends the run (ulimit -n)."
MANY_THREADS = "Far above the CPUs: set OMP_NUM_THREADS and the loader's workers."


def spread(metric: str, **names: str) -> list[Query]:
    """Lines of a metric's rules: operation -> its name."""
    return [lines(recorded(f"job:{metric}:{operation}"), name) for operation, name in names.items()]


def of_rank(metric: str, *matchers: str, by: str = "max_over_time") -> str:
    """The series of the chosen ranks; of many, those of the ranks that are highest in the range."""
    selector = f"{metric}{{{','.join((JOB, RANK, *matchers))}}}"
    return most(selector, f"max by (rank) ({by}({selector}[$__range] @ end()))")


def gpus() -> list[Panel]:
    """The job's GPUs."""
    throttled = recorded("job:hw_gpu_throttled:sum")
    return [
        number(
            "Power",
            "Of all GPUs of the job together. It falls first when the job stops working.",
            "watt",
            *spread("hw_power_watts", sum="power"),
            none="no GPU",
        ),
        number(
            "GPU use, median",
            "Share of time in which a kernel ran. High use of a GPU that is throttled or waits in a collective is no "
            "work: see Ranks.",
            "percentunit",
            *spread("hw_gpu_utilization_ratio", p50="use"),
            none="no GPU",
            decimals=0,
        ),
        number(
            "GPU memory, fullest",
            "At 100% the next larger batch, or a fragmented allocator, ends the run: lower the batch, or checkpoint "
            "activations.",
            "percentunit",
            *spread("hw_gpu_memory_utilization_ratio", max="memory"),
            limits=FULL,
            none="no GPU",
            decimals=0,
        ),
        number(
            "Hottest GPU",
            "Above 80 °C most GPUs lower their clocks: look at the host's cooling.",
            "celsius",
            *spread("hw_temperature_celsius", max="temperature"),
            limits=HOT,
            none="no GPU",
        ),
        number(
            "Throttled GPUs",
            "GPUs that run below their clocks now, for any reason. The reason stands below.",
            "none",
            lines(f"max by (job_id) ({throttled})", "throttled"),
            limits=[(1, "yellow"), (8, "red")],
            none="no GPU",
        ),
        number(
            "GPU errors",
            "Uncorrected ECC errors and XIDs since the ranks started. One: take the GPU out, its results are not to be "
            "trusted. Corrected ones stand below.",
            "none",
            lines(f"sum by (job_id) ({recorded('job:hw_errors:sum', UNCORRECTED)})", "errors"),
            limits=[(1, "red")],
            none="no GPU",
        ),
        graph(
            "GPU use",
            "Over all GPUs. A low median: data or communication; a low minimum: one rank waits, or has stopped.",
            "percentunit",
            *spread("hw_gpu_utilization_ratio", min="lowest", p50="median", p99="99th percentile"),
            width=8,
            low=0,
            high=1,
        ),
        graph(
            "GPU memory",
            "Share of each GPU's memory in use, by anyone. One GPU fuller than the rest runs out first.",
            "percentunit",
            *spread("hw_gpu_memory_utilization_ratio", p50="median", max="fullest"),
            width=8,
            low=0,
            high=1,
            limits=FULL,
        ),
        graph(
            "GPU power",
            "Of all GPUs together. It falls when the work does: at a stall first of all.",
            "watt",
            *spread("hw_power_watts", sum="all GPUs"),
            width=8,
            low=0,
        ),
        graph(
            "GPU temperature",
            "Median and hottest. One far above the rest: a fan, dust, or a bad place in the rack.",
            "celsius",
            *spread("hw_temperature_celsius", p50="median", max="hottest"),
            width=8,
            limits=HOT,
        ),
        graph(
            "GPU clocks",
            "Lowest and median. A lowest clock far under the median is a slow rank: power cap, heat, or an application "
            "clock left set.",
            "hertz",
            *spread("hw_gpu_clock_hertz", min="{{hw_gpu_clock_domain}}, lowest", p50="{{hw_gpu_clock_domain}}, median"),
            width=8,
            low=0,
        ),
        graph(
            "Throttled GPUs",
            "How many, by reason. Power: raise the cap, or accept it everywhere alike; thermal: cooling.",
            "short",
            lines(throttled, "{{reason}}"),
            width=8,
            low=0,
            limits=[(1, "yellow")],
        ),
        graph(
            "GPU errors",
            "Since the ranks started. Corrected ones that climb announce uncorrected ones: drain the node at the next "
            "checkpoint. XID codes stand in the host's kernel log.",
            "short",
            lines(recorded("job:hw_errors:sum"), "{{error_type}}"),
            low=0,
        ),
        graph(
            "GPU links",
            "Bytes a second over PCIe and NVLink, all GPUs. NVLink near nothing in a job of one node: the collectives "
            "go over PCIe.",
            "Bps",
            lines(recorded("job:hw_gpu_io_bytes:sum"), "{{hw_gpu_link}} {{network_io_direction}}"),
            low=0,
        ),
    ]  # fmt: skip


def hosts() -> list[Panel]:
    """The hosts, each sampled by its local rank 0."""
    return [
        graph(
            "CPU",
            "Of each host, or its container's limit. Near 100%: data loading starves the GPUs.",
            "percentunit",
            *spread("system_cpu_utilization_ratio", p50="median host", max="busiest host"),
            width=6,
            low=0,
            high=1,
            limits=FULL,
        ),
        graph(
            "Memory",
            "Of each host, or its container's limit. At 100% the kernel kills a rank: exit code 137, no exception.",
            "percentunit",
            *spread("system_memory_utilization_ratio", p50="median host", max="fullest host"),
            width=6,
            low=0,
            high=1,
            limits=FULL,
        ),
        graph(
            "Disk",
            "Bytes a second, all hosts. Reads that stay high: the data set does not fit the page cache.",
            "Bps",
            lines(recorded("job:system_disk_io_bytes:sum"), "{{disk_io_direction}}"),
            width=6,
            low=0,
        ),
        graph(
            "Network",
            "Bytes a second, all hosts, without RDMA, which the kernel does not count.",
            "Bps",
            lines(recorded("job:system_network_io_bytes:sum"), "{{network_io_direction}}"),
            width=6,
            low=0,
        ),
    ]


def processes() -> list[Panel]:
    """The training processes."""
    return [
        graph(
            "CPU of a rank",
            "In CPUs' full time. 1.0 and no more, with a slow step: one thread (the interpreter, the loader) holds it "
            "up.",
            "percentunit",
            *spread("process_cpu_utilization_ratio", p50="median rank", max="busiest rank"),
            width=8,
            low=0,
        ),
        graph(
            "Memory of a rank",
            "Resident memory. A line that only climbs is a leak; the host's memory above says how long it can go on.",
            "bytes",
            *spread("process_memory_usage_bytes", p50="median rank", max="largest rank"),
            width=8,
            low=0,
        ),
        graph(
            "PyTorch allocator",
            "Allocated: held by tensors. Reserved: taken from the GPU. A widening gap is fragmentation: try "
            "expandable_segments.",
            "bytes",
            *spread("training_memory_allocated_bytes", p50="allocated, median", max="allocated, most"),
            *spread("training_memory_reserved_bytes", p50="reserved, median", max="reserved, most"),
            width=8,
            low=0,
        ),
    ]


def chosen() -> list[Panel]:
    """Drill down."""
    metrics = (
        ("GPU use", "percentunit", "hw_gpu_utilization_ratio", GPU, "A rank below the others waits or has stopped."),
        ("GPU memory", "bytes", "hw_gpu_memory_usage_bytes", GPU, "Uneven: the ranks' shards are."),
        ("GPU power", "watt", "hw_power_watts", GPU, "A rank that draws less does less, or is capped."),
        ("GPU temperature", "celsius", "hw_temperature_celsius", GPU, "The hottest throttle first."),
        ("GPU clocks", "hertz", "hw_gpu_clock_hertz", GPU + ", {{hw_gpu_clock_domain}}", "Lower: throttled."),
        ("Throttling", "none", "hw_gpu_throttled_ratio", GPU + ", {{reason}}", "1 while it lasts."),
        ("Host CPU", "percentunit", "system_cpu_utilization_ratio", HOST, "Busy hosts load data slowly."),
        ("Host memory", "bytes", "system_memory_usage_bytes", HOST + ", {{system_memory_state}}", CACHED),
        ("CPU", "percentunit", "process_cpu_utilization_ratio", "rank {{rank}}", "In CPUs' full time."),
        ("Memory", "bytes", "process_memory_usage_bytes", "rank {{rank}}", "Resident memory: who leaks?"),
        ("Open files", "short", "process_unix_file_descriptor_count", "rank {{rank}}", NOT_CLOSED),
        ("Threads", "short", "process_thread_count", "rank {{rank}}", MANY_THREADS),
        (
            "Allocator",
            "bytes",
            "training_memory_reserved_bytes",
            "rank {{rank}}, {{device_id}}",
            "Reserved by PyTorch.",
        ),
    )
    most_of_them = f"The chosen ranks; of more than {panels.MOST_LINES}, the highest."
    errors = f"hw_errors_total{{{JOB},{RANK}}}"
    return [
        *(
            graph(
                f"{title} by rank",
                f"{about} {most_of_them}",
                unit,
                lines(of_rank(metric), legend),
                width=8,
                most=panels.COARSE,
            )
            for title, unit, metric, legend, about in metrics
        ),
        graph(
            "Allocator retries and failures by rank",
            f"Retries free the cache and ask again: slow. An out-of-memory error ends most runs. {most_of_them}",
            "short",
            lines(of_rank("training_memory_alloc_retries_total"), "rank {{rank}}, retries"),
            lines(of_rank("training_memory_ooms_total"), "rank {{rank}}, out of memory"),
            width=8,
            most=panels.COARSE,
        ),
        listing(
            "GPU errors by GPU",
            "The GPUs with the most errors since their rank started. Uncorrected or xid above 0: take that GPU out.",
            "none",
            rows(
                f"sort_desc(topk(20, max by (rank, hw_id, error_type) (last_over_time({errors}[$__range]))))",
                "{{rank}}",
            ),
            columns={"rank": "Rank", "hw_id": "GPU", "error_type": "Error", "Value": "Count"},
            width=8,
            limits=[(1, "red")],
        ),
    ]  # fmt: skip


def dashboard() -> board.Dashboard:
    """The dashboard."""
    return panels.dashboard(
        "hardware",
        "stepspan / Hardware",
        "GPUs, hosts, processes and memory beneath the job.",
        [
            ("GPUs", gpus()),
            ("Hosts", hosts()),
            ("Processes and memory", processes()),
            ("Ranks $rank", chosen()),
        ],
        variables=("rank",),
    )
