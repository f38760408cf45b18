"""stormlog's event schema: its records are checked, converted, projected and read from files as stormlog does it.

`schema` is the table of its fields, all versions in one, and checks a record against it; `events` holds the types of
events; `convert` makes events of records, legacy ones included; `identity` finds rank and job; `projection` turns
events into neutral records; `sink` and `load` read files.

Promises, held by stormlog's own answers in tests/conformance: what stormlog 0.3.8 accepts comes out equal here, what it
refuses is refused in the same order for the same fields, and records of schema 4 (stormlog 0.3.10 and later) are read
too. What is wrong with a record or file is a `RecordError`, which is a ValueError, and nothing else. These are pure
functions and readers: no network, no clock, no environment unless it is handed over. Sink directories may belong to a
run that is still writing; nothing here writes into them.
"""
