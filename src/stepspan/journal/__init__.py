"""The journal: an append-only log of one process's part in a run, and what may be relied on.

    <directory>/<job>/<host>/rank-00003[.<role>]-<session>/
        000001.jsonl …   segments; lines of `stepspan.events`, the first of each a header
        lock             flock'ed by the writer while it lives
        closed.json      the end: last seq, its time, status; written once, by the writer or by whoever found it dead
        cursors/         a file of two slots a (destination, signal), and its checkpoint
        rejected.jsonl   records that a receiver refused, with its words

Invariants. File order is seq order is time order. A line is written by one `write(2)` on an `O_APPEND` descriptor, so
an event whose call has returned survives SIGKILL. Only the writer appends to segments; it alone removes them (delivered
ones first). A segment is complete once its successor exists. What `closed.json` says is the end for every reader, and a
writer that finds one starts a new session.

A crash leaves: at most one torn line at the end; begin lines without an end, which the mapping turns into ERROR spans.
A full disk leaves: a torn line, then a newline, then a `gap` line that counts what was lost.
"""
