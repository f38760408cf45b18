"""The mapping: a journal's events become neutral records (points, spans, log records) that any encoder can write.

A pure function of the journal: the same lines give the same records, times and ids, whatever the batches, the protocol
or the number of restarts. That is what makes at-least-once delivery end as effectively once. Nothing here knows OTLP's
wire formats, and nothing here reads a file or a clock.

============================  ==============================  ======================  ================================
event                         metrics (`metrics`)             traces (`traces`)       logs (`logs`)
============================  ==============================  ======================  ================================
metrics                       `training.<key>` (`names`),
                              `training.step.number`,
                              `.logged`
step_begin, step_end          `training.step.time`, `.wait`,  `training.step`,
                              `.duration` (`durations`),      thinned (`thinning`)
                              `training.throughput`
span_begin, span_end          `training.phase.time`           a span by its name
device_time                   `training.phase.device_time`,   `wait` of its step
                              `training.step.wait`
                              (`point_buffer`)
epoch_begin, epoch_end        `training.run.epoch`            `training.epoch`
run_begin, run_end            `training.run.info`,            `training.run`
                              `.start_time`
progress, step_end            `training.run.total_steps`,
                              `.eta` (`progress`)
hyperparams                   labels of `training.run.info`   attributes of the run   `training.hyperparams`
artifact                      `training.run.checkpoint_time`  event of the run        `training.artifact`
event                                                         event of the run        by its own name
error                         `training.run.errors`           exception event, ERROR  `exception`
sample                        by semantic conventions
                              (`samples`)
memory                        `training.memory.*`
log                                                                                   by its severity
otel (`sdk_records`)          its points                      its spans               its log records
gap                                                                                   `stepspan.gap`
dropped                       `training.run.dropped_values`                           `stepspan.dropped_value`
clock                         durations (`clock`)             durations, times        `stepspan.clock`
end of the session            each series ends                what is open: ERROR
============================  ==============================  ======================  ================================

`mapper` is the registry and the protocol of the three mappers, `records` what they return. `open_scopes` knows what is
open and its ids (`ids`), `steps` computes once what metrics and traces say of a step: duration, wait, failed or not.
Points are buffered by `point_buffer` and leave as `columns`.
"""
