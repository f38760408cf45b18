"""Reading journals: what `report`, `tail` and tests have of a run, from its files alone.

sessions          one session: its header, its events batch by batch, how it ended
session_summary   all that one session says of its run
runs              the sessions of each job as one run

Nothing here writes to a journal, asks a server, or waits for a run: what is on disk is what there is. What a step took,
what it waited for and whether it failed is folded by `mapping.steps`, as for metrics and traces.
"""
