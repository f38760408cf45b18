"""Recording: what a run needs, in the training process, to turn calls into events of its journal.

    recorder        what records a run: the contract, the one behind a journal, and the one that does nothing
    scopes          what is open: run, epoch, step, span, and what is written of their beginning and ending
    scope           one of these, as code sees it; open_loops has the rules of loops, lines what is written most often
    steps           the loop over batches that makes steps; step_loop has what is known of one that somebody holds
    steps_in_force  which step a value belongs to
    deferred        values that a device still computes; device_copies and cuda_spans get them without waiting
    stall           says when training has stopped writing
    propagation     a scope as the current span of OpenTelemetry
    warnings        each cause of trouble is logged once and counted from then on; values that were dropped
    nested          metrics within mappings, by flat keys; spelling has attributes that were meant for parameters
    log_store       an open run behind the LogStore contract

Nothing here raises into training, and nothing touches the network.
"""
