"""The commands and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT = "what STEPSPAN_DIRECTORY says, else stepspan-runs"


def journals() -> Path:
    """Where runs keep their journals: what `start_run()` would find. Raises `ConfigError`."""
    import os

    from stepspan.config import load

    return load({}, os.environ).directory


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # else a docstring's line breaks show as they are
    context_settings={"help_option_names": ["-h", "--help"]},
)

Paths = Annotated[list[Path], typer.Argument(help="Journal directories: all runs, one job, or one session.")]
Endpoint = Annotated[
    str | None, typer.Option(help="OTLP endpoint; by default what the OTEL_EXPORTER_OTLP_* variables say.")
]
OnePath = Annotated[
    Path,
    typer.Argument(
        default_factory=journals,
        show_default=DEFAULT,
        help="A journal directory: all runs, one job, or one session.",
    ),
]
Directory = Annotated[
    Path, typer.Option(default_factory=journals, show_default=DEFAULT, help="Where the journal goes.")
]


def _version(asked: bool) -> None:
    if asked:
        from stepspan._version import __version__

        print(f"stepspan {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version, and exit.")
    ] = False,
) -> None:
    """Training runs as OpenTelemetry: look at journals, and send them."""


@app.command()
def demo(
    directory: Directory,
    ranks: Annotated[int, typer.Option(min=1, max=64, help="Data-parallel processes.")] = 2,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 5,
) -> None:
    """Train a small classifier on images of digits in several ranks, and record it.

    Without an endpoint the run ends at once and says where its journal lies. With OTEL_EXPORTER_OTLP_ENDPOINT it is
    delivered, and the ledger is printed. Needs the extra `demo`.
    """
    from stepspan.cli.demo import run_demo

    raise typer.Exit(run_demo(ranks, epochs, directory))


@app.command()
def sync(
    paths: Paths,
    endpoint: Endpoint = None,
    protocol: Annotated[str | None, typer.Option(help="http/protobuf, grpc or http/json.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on with what is written from now on, until stopped.")
    ] = False,
    this_host: Annotated[
        bool, typer.Option("--this-host", help="Only sessions that were written on this host.")
    ] = False,
    destination: Annotated[
        str | None, typer.Option(help="A name for the cursors, instead of a hash of the endpoints.")
    ] = None,
    rejected: Annotated[
        bool, typer.Option("--rejected", help="Send again what the receiver refused, and nothing else.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what waits, and how old it is. Nothing is sent.")
    ] = False,
    state_directory: Annotated[
        Path | None, typer.Option(help="Where cursors go for journals that we may not write to.")
    ] = None,
    dead_after: Annotated[
        float,
        typer.Option(min=1.0, help="Seconds of silence after which a session of another host counts as dead."),
    ] = 900.0,
) -> None:
    """Send journals to an OTLP receiver: what no receiver has taken yet, exactly as live delivery would have.

    Interrupt it at any time; it goes on where it was. Exit code 0: all is delivered; 1: something waits, is held or
    cannot be read, and the last lines say why; 2: wrong arguments.
    """
    from stepspan.cli.sync import Sync

    command = Sync(
        paths,
        endpoint=endpoint,
        protocol=protocol,
        this_host=this_host,
        destination=destination,
        state_directory=state_directory,
        dead_after=dead_after,
    )
    if dry_run:
        raise typer.Exit(command.dry_run())
    raise typer.Exit(command.resend() if rejected else command.run(follow=follow))


@app.command()
def status(
    path: OnePath,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
    state_directory: Annotated[
        Path | None, typer.Option(help="Where `sync --state-directory` keeps its cursors.")
    ] = None,
) -> None:
    """Show the ledgers: for each session, destination and signal, what was journaled, delivered, and what waits."""
    from stepspan.cli.status import show_status

    raise typer.Exit(show_status(path, as_json=as_json, state_directory=state_directory))


@app.command()
def tail(
    path: OnePath,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until interrupted.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many to begin with.")] = 20,
    rank: Annotated[int | None, typer.Option(min=0, help="Of this rank only.")] = None,
    tag: Annotated[
        list[str] | None,
        typer.Option(help="Of this kind only: metrics, step_end, error, event, log, artifact … May be given twice."),
    ] = None,
) -> None:
    """Show the newest lines of a journal: time, rank, step, and what happened, merged over ranks by time.

    It only reads, so it works on a run that is going on, has crashed, or was never sent anywhere. Times are local.
    `stepspan tail --follow --tag metrics` watches a loss; `--tag error --tag event` shows what broke.
    """
    from stepspan.cli.tail import show_tail

    raise typer.Exit(show_tail(path, count=lines, follow=follow, rank=rank, tags=tag or ()))


@app.command()
def report(
    path: OnePath,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
    state_directory: Annotated[
        Path | None, typer.Option(help="Where `sync --state-directory` keeps its cursors.")
    ] = None,
) -> None:
    """Tell each run on one page, from its journal alone: nothing is sent and no server is asked.

    Ranks and attempts and how each ended, steps and their times, the straggler where time in collectives was recorded,
    the last and least value of each metric, errors, checkpoints, what is lost, and what has been delivered.
    """
    from stepspan.cli.report import show_report

    raise typer.Exit(show_report(path, as_json=as_json, state_directory=state_directory))


@app.command()
def export(
    paths: Paths,
    to: Annotated[str, typer.Option(help="otlp-json: one OTLP request a line, as the Collector's file format.")] = (
        "otlp-json"
    ),
    output: Annotated[
        str | None,
        typer.Option(help="A file, or DIRECTORY/ for one a signal (traces.jsonl …); by default standard output."),
    ] = None,
    signal: Annotated[
        list[str] | None, typer.Option(help="metrics, traces or logs; may be given more than once. By default all.")
    ] = None,
    dead_after: Annotated[
        float,
        typer.Option(min=1.0, help="Seconds of silence after which a session of another host counts as dead."),
    ] = 900.0,
) -> None:
    """Write journals as files: exactly what `stepspan sync` would send, whether it has been sent or not.

    Nothing is sent and the journals stay as they are. A line is one request for OTLP over HTTP/JSON, under 1 MiB: the
    file format of the Collector, whose `otlp_json_file` receiver reads it (set `start_at: beginning`, and
    `include_file_name: false`, or every record gets one more attribute).

    A session that is still being written is exported as far as it goes. Exit code 0: all is written; 1: something could
    not be read or written, and the last lines say why; 2: wrong arguments.
    """
    from stepspan.cli.export import export_journals

    raise typer.Exit(export_journals(paths, to, output, signal or (), dead_after))


@app.command("import")
def import_(
    paths: Annotated[list[Path], typer.Argument(help="Files and directories of another system.")],
    directory: Directory,
    system: Annotated[str, typer.Option("--from", help="auto, stormlog, evsys, qmlhc or cloudmesh.")] = "auto",
    job_id: Annotated[str | None, typer.Option(help="The job they belong to, where they don't say it.")] = None,
) -> None:
    """Turn the files of stormlog, evsys, qmlhc or cloudmesh into journals, with their original times.

    Says what each path was taken for, and refuses where that is not certain. Importing twice changes nothing. Then
    `stepspan sync` sends the result like any other journal.
    """
    from stepspan.cli.importing import import_paths

    raise typer.Exit(import_paths(paths, system, job_id, directory))


@app.command()
def doctor(
    directory: Annotated[Path | None, typer.Option(help="Where the journal would go.")] = None,
    endpoint: Endpoint = None,
) -> None:
    """Check whether a run would work here: identity, journal, endpoints, GPU libraries, versions.

    Exit code 0: it would; 1: the lines marked FAIL say what is wrong.
    """
    from stepspan.cli.doctor import examine

    raise typer.Exit(examine(directory, endpoint))
