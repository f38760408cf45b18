"""The journal: an append-only log of one process's part in a run, and what may be relied on.

    <directory>/<job>/<host>/rank-00003[.<role>]-<session>/
        000001.jsonl …   segments; lines of `journal.format`, the first of each a header
        lock             flock'ed by the writer while it lives
        closed.json      the end: last seq, its time, status; written once, by the writer or by whoever found it dead
        rests.json       how the run has ended, where the session goes on: what is evaluated follows
        cursors/         a file of two slots for each destination and signal, and the checkpoint of its mapper
        rejected.jsonl   records that a receiver refused, with its words

    <directory>/<job>/.rank-00003       flock'ed while a run of that rank looks for others of its job, and begins

Invariants:

- File order is `seq` order is time order, in a session.
- A line is written by one `write(2)` on an `O_APPEND` descriptor, so an event whose call has returned survives SIGKILL.
- Only the writer appends to segments, and it alone removes them: delivered ones first. A segment is complete once its
  successor exists.
- What `closed.json` says is the end for every reader; a writer that finds one written by others starts a new session.

A crash leaves at most one torn line, at the end, and begin lines without an end, which the mapping turns into ERROR
spans. A full disk leaves a torn line, then a newline, then a `gap` line that counts what was lost.

    journal      the journal of a run: gives events their time and place, keeps a session open, one state machine
    clock        the time of events: the wall clock, compared now and then, which never goes back
    writer       one session being written: segments, lines that wait for the disk, gaps
    format       an event as a line, and back
    reader       whole lines from a position on, in batches that end between two milliseconds
    cursor       how far one destination has taken one signal of one session, and the ledger of it
    checkpoint   the state of a mapper at a cursor, so that a restart need not read from the beginning
    numbers      which number a forked worker goes by
    liveness     alive, dead or unknown: how everyone agrees on a session's end
    layout       names and places of files, and how they are opened
    location     where journals go: the directory, or shared memory
    disk         the system calls that fail under load, and how much they may fill
"""
