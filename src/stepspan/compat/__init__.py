"""Four systems whose interfaces and files stepspan takes over: stormlog, evsys, qmlhc and cloudmesh.

Each has a package with its front (what a program calls) and its `reader` (what `stepspan import` uses). They share:

- `rows`: a reader of JSON lines with their positions, and what the values of a row are as an event holds them;
- `row_writer`: an append-only file of JSON lines, for loggers and stores;
- `importing`: `ImportedSession`, which every reader gives, and the journal that is written of it.

A reader's module has `detect(path)`, which says what a path is taken for, and `read_sessions(path, job_id=…)`.
"""
