"""What evsys finds under the entry point `evsys_sdk.log_stores`: the `stepspan` store, in evsys's own registry too.

evsys loads the entry point and expects the class to have registered itself. The module may have been loaded long before
evsys was, so it is looking the class up, and not importing the module, that registers it.
"""

from __future__ import annotations

import sys
from typing import Any

from stepspan.compat.evsys import runs


def __getattr__(name: str) -> Any:
    if name != "StepspanLogStore":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register = getattr(sys.modules.get("evsys_sdk.registry"), "register_log_store", None)
    return register("stepspan")(runs.StepspanLogStore) if register else runs.StepspanLogStore
