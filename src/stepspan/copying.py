"""Objects that models, datasets and trainers hold, which are deep-copied and pickled with them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self


class SharedByCopies:
    """Base of what holds a lock or a file: a copy is the object itself; what was pickled is made anew, as it was made.

    What it has done since is not pickled: another process begins anew.
    """

    _remake: partial[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make one that remembers its arguments."""
        made = super().__new__(cls)
        made._remake = partial(cls, *args, **kwargs)
        return made

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return self._remake, ()
