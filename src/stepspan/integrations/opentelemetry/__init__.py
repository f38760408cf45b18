"""The OpenTelemetry SDK's own signals on the journal, whatever the user's code or libraries emit.

```python
from stepspan.integrations.opentelemetry import configure
configure()
```

They share the journal's guarantees: no network in this process, nothing lost while a receiver is away, the run's
Resource and, inside a step, its trace. `configure()` loses nothing that has ended, even by SIGKILL; the standard
exporters (`OTEL_TRACES_EXPORTER=stepspan_jsonl`, likewise metrics and logs) lose what the SDK's batch processor holds.

Importing this imports the OpenTelemetry SDK.
"""

from __future__ import annotations

from stepspan.integrations.opentelemetry.variables import readable_variables

with readable_variables():  # the SDK raises for some as it is imported
    from stepspan.integrations.opentelemetry.exporters import (
        JsonlLogRecordExporter,
        JsonlMetricExporter,
        JsonlSpanExporter,
    )
    from stepspan.integrations.opentelemetry.processors import (
        JournalLogRecordProcessor,
        JournalMetricExporter,
        JournalSpanProcessor,
    )
    from stepspan.integrations.opentelemetry.providers import Configured, configure

__all__ = [
    "Configured",
    "JournalLogRecordProcessor",
    "JournalMetricExporter",
    "JournalSpanProcessor",
    "JsonlLogRecordExporter",
    "JsonlMetricExporter",
    "JsonlSpanExporter",
    "configure",
]
