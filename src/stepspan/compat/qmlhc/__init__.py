"""qmlhc callbacks: the hooks and loggers with the rows of qmlhc (`callbacks`), and the reader of those rows (`reader`).

A row of `telemetry.jsonl` is `{"ts": Unix seconds, "tag": …}` and then, by tag:

    step_begin   step
    step_end     step, context
    epoch_begin  epoch
    epoch_end    epoch, context
    error        type, message
"""
