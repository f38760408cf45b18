"""Reading journals: what `report`, `tail`, `export` and tests have of a run, from its files alone.

sessions          one session: its header, its events batch by batch, how it ended
step_times        how long its training steps took and what they waited for, from the mapping's records
metric_values     the last value and the extremes of each metric that was logged
session_summary   all that one session says of its run
runs              the sessions of each job as one run

Nothing here writes to a journal, asks a server, or waits for a run: what is on disk is what there is. Times that the
mapping computes (a step's time, its wait in collectives) are taken from its records and never computed again.
"""
