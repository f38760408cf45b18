"""What happens to events on their way: shared processors before the journal, an exporter's own ones after it.

`Redact` keeps secrets out, `Attributes` adds, `Rename` renames, `Drop` and `SampleSteps` leave out. `Processor` is what
one of your own has to be.
"""

from __future__ import annotations

from stepspan.processors.basic import Attributes, Drop, Rename, SampleSteps
from stepspan.processors.redact import Redact
from stepspan.processors.registry import Processor, apply, build, specs

__all__ = ["Attributes", "Drop", "Processor", "Redact", "Rename", "SampleSteps", "apply", "build", "specs"]
