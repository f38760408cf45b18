"""What a receiver refuses again and again, remembered for one signal of one destination by all of its sessions.

A receiver may take none of what has something in common: a series (too long a label, a series limit), a kind of it (a
receiver without exponential histograms), the spans of one trace, the log records of one event. To find each of them by
halving would cost a dozen requests a record. So each record has `traits`, and one of which `CONFIRMATIONS` records were
refused alone, and none taken in between, is **refused**: its records travel apart from then on. One of them, the probe,
is sent alone; while it is refused, the records that follow it are rejected with the receiver's words: none before
`SURE_AFTER` of them were refused in a row, then as many as before. When a probe is taken, the trait is forgotten.

- A series belongs to its session's Resource. Its name and attributes alone, and the kind of a histogram or sum, only
  make it *suspect* in other sessions: its first probe then decides, where it would have taken a dozen requests.
- Of several refused traits in one batch `MAX_PROBES` are probed, those that have waited longest, and whichever was
  probed `OWN_PROBE_S` ago. A probe of the same name and attributes in another session counts for `SHARED_PROBE_S`:
  eight ranks with one bad series are one probe. Where a probe is taken, all that was refused with its words is probed.
- Nothing is remembered for longer than `MEMORY_S`, nor more than `MAX_TRAITS`; nothing of it is on disk.

Belongs to the thread of one scheduler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from stepspan.deliver.backoff import ReceiverHistory
from stepspan.mapping.columns import Column, Points
from stepspan.mapping.records import METRIC_DATA, Attributes, Log, Record, SdkRecord, Span

MAX_TRAITS = 1000
MEMORY_S = 600.0
CONFIRMATIONS = 3
SURE_AFTER = 8
MAX_PROBES = 4
SHARED_PROBE_S = 1.0
OWN_PROBE_S = 30.0
"""A trait's own probe is never older than this where another one's stands for it."""
_SERIES_KEY = "series key"


class Traits(NamedTuple):
    """What a record has in common with others that a receiver may refuse.

    Args:
        own: Each of them may be refused as such.
        shared: By these a record becomes suspect.
        name: For a person.

    """

    own: tuple[Hashable, ...] = ()
    shared: tuple[Hashable, ...] = ()
    name: str = ""


@dataclass(slots=True)
class Group:
    """Records of one batch that have a refused trait in common, in time order."""

    trait: Hashable
    records: list[Record]
    name: str
    """What logs and the cursor's message call the trait."""
    shared_trait: Hashable = None
    """By which they are suspect in every session."""


@dataclass(slots=True)
class _Refusal:
    """What is known of one trait."""

    until: float
    """When it is forgotten, by the clock."""
    why: str = ""
    rejected: int = 0
    """Records of it that were refused, or taken for it, since one was last taken."""
    confirmed: bool = False
    probed_at: float = -math.inf


class ReceiverMemory:
    """What is known of a receiver, for one signal. `clock`: monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.known_good: tuple[Attributes, Record] | None = None
        """The record that the receiver has taken last, with its session's Resource."""
        self.history = ReceiverHistory()
        """Whether it has ever answered well, and since when it does not."""
        self._clock = clock
        self._refusals: dict[Hashable, _Refusal] = {}
        self._shared: dict[Hashable, _Refusal] = {}
        """Of what is confirmed: the traits by which others are suspect, with when one was probed."""

    def why(self, group: Group) -> str:
        """The receiver's words about a group's trait, in another session if need be; "" of what is only suspect."""
        found = (self._refusals.get(group.trait), self._shared.get(group.shared_trait))
        return next((refusal.why for refusal in found if refusal is not None and refusal.confirmed), "")

    def refusals_like(self, owner: str, record: Record, why: str) -> int:
        """How many records that have a trait of this one were refused with these words, in any session."""
        traits = traits_of(owner, record)
        found = [*map(self._refusals.get, traits.own), *map(self._shared.get, traits.shared)]
        return max((each.rejected for each in found if each is not None and each.why == why), default=0)

    def refuse(self, owner: str, record: Record, why: str) -> str:
        """A record was refused alone.

        Args:
            owner: The Resource that its series belongs to.
            record: Any.
            why: The receiver's words.

        Returns:
            The name of what is refused from now on; "": nothing new.

        """
        traits = traits_of(owner, record)
        new = [trait for trait in traits.own if self._count(trait, 1, why, confirm=CONFIRMATIONS)]
        self._suspect(traits.shared if new else traits.shared[:1], 1, why, confirmed=bool(new))
        return traits.name if new else ""

    def reject(self, owner: str, group: Group, why: str, *, probed: bool) -> list[Record]:
        """The probe of a group was refused, or another one's stands for it.

        Args:
            owner: The Resource that its series belongs to.
            group: Loses what is returned.
            why: The receiver's words.
            probed: Whether its own probe was refused.

        Returns:
            Its records that count as refused.

        """
        refusal = self._refusals.get(group.trait)
        traits = traits_of(owner, group.records[0])
        elsewhere = max((self._shared[trait].rejected for trait in traits.shared if trait in self._shared), default=0)
        sure_of = max(refusal.rejected, elsewhere) if refusal is not None else 0
        length = sure_of if sure_of >= SURE_AFTER else 1
        rejected, group.records = group.records[:length], group.records[length:]
        self._count(group.trait, len(rejected), why, confirm=1)
        if probed:
            self._refusals[group.trait].probed_at = self._clock()
            self._suspect(traits.shared, len(rejected), why, confirmed=True)
        return rejected

    def note_taken(self, owner: str, records: Sequence[Record]) -> None:
        """Records were taken: what they have in common is not refused."""
        if not self._refusals and not self._shared:
            return
        for record in _representatives(records):
            traits = traits_of(owner, record)
            for trait in traits.own:
                refusal = self._refusals.pop(trait, None)
                if refusal is not None and refusal.confirmed:
                    self._doubt(refusal.why)
            for trait in traits.shared:
                self._shared.pop(trait, None)

    def split(self, owner: str, records: Sequence[Record]) -> tuple[list[Group], Sequence[Record]]:
        """The records that travel apart, and all others.

        Args:
            owner: The Resource that their series belong to.
            records: Of one session, in time order.

        """
        self._forget_old()
        if not self._shared and not any(refusal.confirmed for refusal in self._refusals.values()):
            return [], records
        groups: dict[Hashable, Group] = {}

        def is_separate(record: Record) -> bool:
            traits = traits_of(owner, record)
            trait = self._refused_trait(traits)
            if trait is not None:
                shared = next(iter(traits.shared), None)
                groups.setdefault(trait, Group(trait, [], traits.name, shared)).records.append(record)
            return trait is not None

        rest: Sequence[Record]
        if isinstance(records, Points):
            single: list[Any] = [record for record in records.points if not is_separate(record)]
            columns: list[Column] = []
            for series, times, values in records.columns:
                if any(self._refused_trait(traits_of(owner, (series, 0, value))) for value in _kinds(values)):
                    points = zip(times, values, strict=True)
                    single += [p for p in ((series, time, value) for time, value in points) if not is_separate(p)]
                else:
                    columns.append((series, times, values))
            single.sort(key=lambda record: record[1])
            rest = Points(single, columns)
            for group in groups.values():
                group.records.sort(key=lambda record: record[1])  # type: ignore[index]
        else:
            rest = [record for record in records if not is_separate(record)]
        return list(groups.values()), (rest if groups else records)

    def to_probe(self, groups: Iterable[Group]) -> list[Group]:
        """Those of a batch's groups of which one record is sent: the others are refused by what is known."""
        due = [group for group in groups if self._is_due(group)]
        known = sorted((g for g in due if self._is_confirmed(g)), key=lambda g: self._refusals[g.trait].probed_at)
        overdue = [g for g in known[MAX_PROBES:] if self._clock() - self._refusals[g.trait].probed_at >= OWN_PROBE_S]
        return [group for group in due if not self._is_confirmed(group)] + known[:MAX_PROBES] + overdue

    def forget(self) -> None:
        """The receiver refuses everything: nothing is known of what it refuses again and again."""
        self._refusals.clear()
        self._shared.clear()

    def _doubt(self, why: str) -> None:
        """What was refused with these words is taken: what else was is asked for as soon as it comes."""
        for refusal in self._refusals.values():
            if refusal.why == why:
                refusal.probed_at = -math.inf

    def _is_confirmed(self, group: Group) -> bool:
        refusal = self._refusals.get(group.trait)
        return refusal is not None and refusal.confirmed

    def _is_due(self, group: Group) -> bool:
        refusal, now = self._refusals.get(group.trait), self._clock()
        if refusal is None or not refusal.confirmed or now - refusal.probed_at >= OWN_PROBE_S:
            return True
        shared = self._shared.get(group.shared_trait)
        return shared is None or shared.probed_at <= refusal.probed_at or now - shared.probed_at >= SHARED_PROBE_S

    def _refused_trait(self, traits: Traits) -> Hashable | None:
        for trait in traits.own:
            refusal = self._refusals.get(trait)
            if refusal is not None and refusal.confirmed:
                return trait
        return traits.own[0] if any(trait in self._shared for trait in traits.shared) else None

    def _count(self, trait: Hashable, records: int, why: str, *, confirm: int) -> bool:
        """Count refused records of a trait; whether they confirm it."""
        refusal = self._refusals.get(trait)
        if refusal is None:
            while len(self._refusals) >= MAX_TRAITS:
                del self._refusals[next(iter(self._refusals))]
            refusal = self._refusals[trait] = _Refusal(self._clock() + MEMORY_S)
        refusal.why, refusal.rejected = why, refusal.rejected + records
        confirms = not refusal.confirmed and refusal.rejected >= confirm
        refusal.confirmed |= confirms
        return confirms

    def _suspect(self, shared: Sequence[Hashable], records: int, why: str, *, confirmed: bool) -> None:
        now = self._clock()
        for trait in shared:
            while len(self._shared) >= MAX_TRAITS:
                del self._shared[next(iter(self._shared))]
            refusal = self._shared.setdefault(trait, _Refusal(now + MEMORY_S))
            refusal.probed_at, refusal.rejected = now, refusal.rejected + records
            refusal.why, refusal.confirmed = why, refusal.confirmed or confirmed

    def _forget_old(self) -> None:
        now = self._clock()
        for known in (self._refusals, self._shared):
            for trait in [trait for trait, refusal in known.items() if refusal.until <= now]:
                del known[trait]


def traits_of(owner: str, record: Record) -> Traits:
    """What a record has in common with others.

    Args:
        owner: The Resource that its series belongs to.
        record: Any.

    """
    if isinstance(record, SdkRecord):
        return _sdk_traits(owner, record)
    if isinstance(record, Span):
        feature = (record.name, bool(record.events), bool(record.links), record.error is not None)
        return Traits((("trace", record.trace_id.hex()), ("span", *feature)), (), f"span {record.name}")
    if isinstance(record, Log):
        return Traits((("log", record.event_name, record.severity),), (), f"log {record.event_name or record.severity}")
    series, _, value = record
    if _SERIES_KEY not in series.encoded:
        series.encoded[_SERIES_KEY] = (series.name, series.kind, repr(sorted(series.attributes.items())))
    key = (series.encoded[_SERIES_KEY], _value_kind(value))
    named = ", ".join(f"{name}={text}" for name, text in series.attributes.items())
    kind = () if series.kind == "gauge" else (("kind", series.kind),)
    return Traits(((owner, key),), (key, *kind), f"series {series.name}" + (f" ({named})" if named else ""))


def _sdk_traits(owner: str, record: SdkRecord) -> Traits:
    """As `traits_of`, of OTLP JSON."""
    content, metric = record.record, record.source.metric
    if metric is not None:
        data = next((field for field in METRIC_DATA if field in metric), "gauge")
        name = str(metric.get("name", ""))
        key = (name, data, repr(content.get("attributes")), _value_kind(content.get("asDouble")))
        return Traits(((owner, key),), (key,) if data == "gauge" else (key, ("kind", data)), f"series {name}")
    if "spanId" in content and "name" in content:
        name = str(content["name"])
        failed = (content.get("status") or {}).get("code", 0)
        feature = (name, bool(content.get("events")), bool(content.get("links")), failed)
        return Traits((("trace", str(content.get("traceId"))), ("sdk span", *map(str, feature))), (), f"span {name}")
    event, severity = str(content.get("eventName") or ""), str(content.get("severityNumber", 0))
    return Traits((("sdk log", event, severity),), (), f"log {event or severity}")


def _value_kind(value: object) -> str:
    """Numbers that a receiver may refuse in a series whose others it takes are a kind of their own."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return str(value) if isinstance(value, str) else ""


def _kinds(values: Sequence[Any]) -> list[Any]:
    """One value of each kind."""
    return list({_value_kind(value): value for value in values}.values())


def _representatives(records: Sequence[Record]) -> Iterable[Record]:
    """Records of which each trait of the others is one."""
    if not isinstance(records, Points):
        return records
    return [
        *records.points,
        *((series, 0, value) for series, _, values in records.columns for value in _kinds(values)),
    ]
