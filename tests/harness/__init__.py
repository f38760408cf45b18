"""What tests are made with. The fixtures of a module are asked for by name, `start = runs.start`.

- Sessions: `runs` starts real runs and reads what they left; `journals` writes a session line by line, under a clock of
  the test; `events_of` has a session's events without a file, for the mapping; `delivery` has trainings to deliver.
- Receivers: `receiver` answers by a script, `received` compares what came; `stack` has the real Collector, Prometheus,
  Loki and Tempo, `remote_read` reads all that Prometheus holds, `shown` a training before them, `grafana` the
  dashboards' queries.
- Checks: `events_schema` holds events against their classes.
- What a machine has: `processes` (ranks, and waiting for them), `scripted_nvml`, `scripted_torch` (GPUs).
"""
