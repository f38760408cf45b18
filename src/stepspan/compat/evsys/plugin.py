"""What evsys finds under the entry point `evsys_sdk.log_stores`: the `stepspan` store, in evsys's own registry too.

evsys loads the entry point and expects the class to have registered itself. This module may have been imported long
before evsys was, so looking the class up registers it, not importing the module.
"""

from __future__ import annotations

import sys
from typing import Any

from stepspan.compat.evsys import stepspan_store


def __getattr__(name: str) -> Any:
    if name != "StepspanLogStore":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    store = stepspan_store.StepspanLogStore
    register = getattr(sys.modules.get("evsys_sdk.registry"), "register_log_store", None)
    return register("stepspan")(store) if register else store
