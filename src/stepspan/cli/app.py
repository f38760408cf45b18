"""The commands. Each imports what it runs when it is called, so that `--help` and the others stay quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepspan.cli.options import (
    AllRanks,
    AsJson,
    DeadAfter,
    Directory,
    Endpoint,
    JournalPath,
    JournalPaths,
    StateDirectory,
)
from stepspan.journal.liveness import DEAD_AFTER_S

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # else a docstring's line breaks show as they are
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    if requested:
        from stepspan import __version__

        print(f"stepspan {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Training runs as OpenTelemetry: look at journals, and send them."""


@app.command()
def demo(
    directory: Directory,
    ranks: Annotated[int, typer.Option(min=1, max=64, help="Data-parallel processes.")] = 2,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 5,
) -> None:
    """Train a small classifier of digit images in several ranks, and record it.

    Without an endpoint the command prints where the journal is and how to send it. With OTEL_EXPORTER_OTLP_ENDPOINT the
    run is delivered while it trains, and the command prints the ledger of the delivery. Needs the extra `demo`.
    """
    from stepspan.cli.demo import run_demo

    raise typer.Exit(run_demo(ranks, epochs, directory))


@app.command()
def sync(
    paths: JournalPaths,
    endpoint: Endpoint = None,
    protocol: Annotated[str | None, typer.Option(help="http/protobuf, grpc or http/json.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Keep sending what is written, until interrupted.")] = False,
    this_host: Annotated[bool, typer.Option("--this-host", help="Only sessions written on this host.")] = False,
    destination: Annotated[
        str | None,
        typer.Option(
            help="Name of the receiver, which its cursors have: a new name sends everything. "
            "By default STEPSPAN_DESTINATION, else what runs call it, else a hash of its address."
        ),
    ] = None,
    rejected: Annotated[bool, typer.Option("--rejected", help="Send only the rejected records, once more.")] = False,
    all_ranks: AllRanks = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what is pending, and how old it is.")] = False,
    state_directory: StateDirectory = None,
    dead_after: DeadAfter = DEAD_AFTER_S,
) -> None:
    """Send journals to an OTLP receiver: what has not been delivered yet, exactly as a live run would have sent it.

    It can be interrupted at any time and continues where it was. Then it says what was delivered, and what of these
    journals did not go out and why. Exit code 0: nothing waits; 1: something is pending, is held or cannot be read, and
    the last lines say why; 2: wrong arguments.
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
        all_ranks=all_ranks,
    )
    if dry_run:
        raise typer.Exit(command.dry_run())
    raise typer.Exit(command.resend() if rejected else command.run(follow=follow))


@app.command()
def status(path: JournalPath, as_json: AsJson = False, state_directory: StateDirectory = None) -> None:
    """Show the ledgers: for each session, destination and signal, the lines journaled, delivered and pending."""
    from stepspan.cli.status import show_status

    show_status(path, as_json=as_json, state_directory=state_directory)


@app.command()
def tail(
    path: JournalPath,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing new lines, until interrupted.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many lines to start with.")] = 20,
    rank: Annotated[int | None, typer.Option(min=0, help="Only lines of this rank.")] = None,
    tag: Annotated[
        list[str] | None,
        typer.Option(help="Only events of this kind: metrics, step_end, error, event, log, artifact … Repeatable."),
    ] = None,
) -> None:
    """Show the newest lines of a journal: time, rank, step, and what happened, merged over ranks by time.

    It only reads, so it works on a run that is going on, has crashed, or was never sent anywhere. Times are local.
    `stepspan tail --follow --tag metrics` watches a loss; `--tag error --tag event` shows what went wrong.
    """
    from stepspan.cli.tail import show_tail

    show_tail(path, count=lines, follow=follow, rank=rank, tags=tag or ())


@app.command()
def report(path: JournalPath, as_json: AsJson = False, state_directory: StateDirectory = None) -> None:
    """Summarise each run on one page, from its journal alone: nothing is sent and no server is asked.

    The page has the ranks and attempts and how each ended, the steps and their times, the straggler where time in
    collectives was recorded, the last, smallest and largest value of each metric, errors, checkpoints, lost lines, and
    what has been delivered.
    """
    from stepspan.cli.report import show_report

    show_report(path, as_json=as_json, state_directory=state_directory)


@app.command()
def export(
    paths: JournalPaths,
    to: Annotated[str, typer.Option(help="otlp-json: one OTLP request a line, the Collector's file format.")] = (
        "otlp-json"
    ),
    output: Annotated[
        str | None,
        typer.Option(help="A file, or DIRECTORY/ for one per signal (traces.jsonl …); by default standard output."),
    ] = None,
    signal: Annotated[list[str] | None, typer.Option(help="metrics, traces or logs. Repeatable; by default all.")] = (
        None
    ),
    all_ranks: AllRanks = False,
    dead_after: DeadAfter = DEAD_AFTER_S,
) -> None:
    """Write journals as files: exactly what `stepspan sync` would send, whether it has been sent or not.

    Nothing is sent and the journals are not changed. A line is one request for OTLP over HTTP/JSON, under 1 MiB: the
    file format of the Collector, whose `otlp_json_file` receiver reads it (set `start_at: beginning`, and
    `include_file_name: false`, or every record gets one more attribute).

    A session that is still being written is exported as far as it goes. Exit code 0: all is written; 1: something could
    not be read or written, and the last lines say why; 2: wrong arguments.
    """
    from stepspan.cli.export import export_journals

    raise typer.Exit(export_journals(paths, to, output, signal or (), dead_after, all_ranks=all_ranks))


@app.command("import")
def import_(
    paths: Annotated[list[Path], typer.Argument(help="Files and directories of another system.")],
    directory: Directory,
    system: Annotated[str, typer.Option("--from", help="auto, stormlog, evsys, qmlhc or cloudmesh.")] = "auto",
    job_id: Annotated[str | None, typer.Option(help="The job they belong to, if the files do not name it.")] = None,
) -> None:
    """Turn the files of stormlog, evsys, qmlhc or cloudmesh into journals, with their original times.

    Prints what each path was recognised as, and refuses a path that could be several things. Importing twice changes
    nothing. `stepspan sync` then sends the result like any other journal.
    """
    from stepspan.cli.importing import import_paths

    raise typer.Exit(import_paths(paths, system, job_id, directory))


@app.command()
def doctor(
    directory: Annotated[Path | None, typer.Option(help="Where a run would write its journal.")] = None,
    endpoint: Endpoint = None,
) -> None:
    """Check whether a run would work here: identity, journal, endpoints, GPU libraries, versions.

    Exit code 0: it would; 1: the lines marked FAIL say what is wrong.
    """
    from stepspan.cli.doctor import examine

    raise typer.Exit(examine(directory, endpoint))
