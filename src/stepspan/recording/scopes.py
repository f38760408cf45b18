"""What begins and ends: the run, its epochs, steps and spans.

The innermost open scope of a thread or asyncio task stands in a context variable of the run. A thread that has none
takes that of the main thread: the one that began the run or, where that one trains nothing, the first that does. A
scope that exits ends what is still open inside it, with its own outcome: that is how a step learns whether its loop was
left by `break` or by an exception, which the loop's iterator never hears of. `open_loops` has the rules of loops,
`steps_in_force` the step that a value belongs to.

What begins, ends and is logged as nearly always goes a short way: `begin_step`, `begin_span`, `write_metrics` and `end`
go by what the call before has found, and write a line from a template (`lines`). What is in any way out of the ordinary
goes the long one, as an event. Both write the same lines (`tests/test_usual_scopes.py`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar, Token
from threading import enumerate as enumerate_threads
from threading import get_ident
from typing import TYPE_CHECKING, Any

from orjson import dumps

from stepspan.errors import Warn
from stepspan.events import SECOND_NS, Event
from stepspan.journal.format import template
from stepspan.mapping import ids
from stepspan.mapping.names import EVALUATION_SPLITS
from stepspan.mapping.trace_context import remote_parent
from stepspan.recording.lines import LINES_OF_ENDS, LastStep, LinesOfMetrics
from stepspan.recording.open_loops import OpenLoops
from stepspan.recording.outcomes import Outcomes, Status
from stepspan.recording.scope import AdjacentStep, Scope, Span, Step, current_task, has_begun_here, is_loop_step
from stepspan.recording.step_loop import EVALUATION, EVALUATION_SPANS, NESTED, StepLoop
from stepspan.recording.steps_in_force import TRAIN, StepsInForce
from stepspan.values import error_text, to_text

if TYPE_CHECKING:
    from stepspan.identity import Identity
    from stepspan.journal.journal import Journal
    from stepspan.journal.writer import Begun, Emit


class Scopes:
    """The open scopes of one run, and the events of their beginning and ending. Nothing here raises.

    Args:
        identity: Which job and rank this process is, for the ids of spans.
        journal: Whose session the scopes lie in.
        emitters: What writes the events of a tag.
        leaves_alone: Whether the processors write an event as it is, whenever it comes.
        warn: Takes what went wrong.
        record_error: Writes the exception that a scope failed with.
        outcomes: Tells which exceptions are failures.
        propagate: Whether a scope becomes the current OpenTelemetry span; None: unless a global TracerProvider is
            installed.

    """

    def __init__(
        self,
        identity: Identity,
        journal: Journal,
        emitters: Mapping[str, Emit],
        *,
        leaves_alone: Callable[[Event], bool],
        warn: Warn,
        record_error: Callable[[BaseException], None],
        outcomes: Outcomes,
        propagate: bool | None,
    ) -> None:
        self.clock: Callable[[], int] = journal.clock
        self.stopwatch: Callable[[], int] = getattr(journal.clock, "since", journal.clock)
        """What durations are measured with, ns: the clock may be set meanwhile."""
        self.identity = identity
        """Of this process; a forked worker has its own from its first event on."""
        self._journal = journal
        self._emitters = emitters
        self._is_straight = all(
            emitters[tag] == journal.append
            for tag in ("metrics", "step_begin", *(f"{tag}_end" for tag in LINES_OF_ENDS))
        )
        """Whether no processor wants metrics, or what begins and ends steps."""
        self._leaves_alone = leaves_alone
        self._warn = warn
        self._record_error = record_error
        self._outcomes = outcomes
        self._propagate = propagate
        self._propagation: Any = None
        """The module `propagation`, once it is needed."""
        self._parent_identities: dict[object, Identity] = {}
        """The session of a process that forked this one, and its identity."""
        self._begin_counting()

    def _begin_counting(self) -> None:
        self.closed = False
        """Whether the run has ended, and takes nothing more."""
        self.usual = False
        """Whether nothing is so that a scope's beginning or end has to be looked at more closely: `_look_around`."""
        self.loops = OpenLoops(self._close)
        self.steps = StepsInForce()
        self._current: ContextVar[Scope | None] = ContextVar("stepspan.scope", default=None)
        """The innermost scope of a thread or task. Each run has a variable, as several may be open in one context."""
        self._before: Token[Scope | None] | None = None
        """What that was where the run began: nothing, so that no context keeps a run that has ended."""
        self._main: Scope | None = None
        """The innermost run, epoch or step of the main thread."""
        self._main_thread = self._run_thread = self._training_thread = 0
        """The idents of that thread, of the one that began the run, and of the first of these once it has begun an
        epoch or a step."""
        self._branches: dict[Scope, None] = {}
        """The open spans of all threads, and steps that are detached, in the order of their beginning."""
        self._last_steps: dict[str, LastStep] = {}
        """Split -> its last step."""
        self._last_step: LastStep | None = None
        """The last step, where one that follows it has the same steps in force, and lies in the same."""
        self._lines_of_metrics = LinesOfMetrics(b"")
        self._lines_over = LinesOfMetrics(b',"over":true')
        """Those within a step, and those outside of any."""
        self._lines_of_spans: dict[str, bytes | None] = {}
        """Name -> the line that begins a span of that name and nothing more; None: it has to be an event."""
        self._next_epoch = 0
        self.total_steps: int | None = None
        """How many training steps there will be, where that is known."""
        self._exits: dict[int, tuple[Status, BaseException | None]] = {}
        """Thread -> how the exit that is leaving it ends the run, and the exit where it is still to be recorded."""
        self._failed_by = 0
        """The id of the last exception that was recorded, as long as nothing has begun since."""

    def run(self, fields: Event) -> Scope:
        """The run, not open yet."""
        return Scope(self, "run", {"ts": 0, "seq": 0, "tag": "run_begin", "parent": 0, **fields})

    def epoch(self, number: int | None) -> Scope:
        """An epoch that is not open yet; None: the one after the last."""
        if number is None:
            number = self._next_epoch
        self._next_epoch = number + 1
        scope = Scope(self, "epoch", {"ts": 0, "seq": 0, "tag": "epoch_begin", "parent": 0, "epoch": number})
        scope.epoch = number
        return scope

    def next_step(self, split: str) -> int:
        """The number of the step after the last of this split."""
        last = self._last_steps.get(split)
        return 0 if last is None else last.number + 1

    def span(self, fields: Event) -> Scope:
        """A phase, not open yet."""
        if len(fields) == 1:
            name = fields["name"]
            line = self._lines_of_spans[name] if name in self._lines_of_spans else self._line_of_span(name)
            if line is not None:
                return Span(self, name, line)
        return Scope(self, "span", {"ts": 0, "seq": 0, "tag": "span_begin", "parent": 0, **fields})

    def _line_of_span(self, name: str) -> bytes | None:
        if len(self._lines_of_spans) >= MAX_SPAN_LINES:
            return None
        line, event = None, {"ts": 0, "seq": 0, "tag": "span_begin", "parent": 0, "name": name}
        with suppress(TypeError):  # a name that JSON can't hold
            named = dumps(name).replace(b"%", b"%%")
            if self._leaves_alone(event):
                line = template("span_begin", b',"parent":%d%b' + b',"name":%b' % named)
        self._lines_of_spans[name] = line
        return line

    def loop(self, split: str) -> StepLoop:
        """A loop over batches that begins now."""
        return StepLoop(split, self.loops.begun)

    def begin_loop_step(
        self, loop: StepLoop, number: int | None, waited: int, begun: int, amounts: dict[str, Any] | None
    ) -> Scope:
        """Open the next step of a loop.

        Args:
            loop: It has no open step.
            number: Of the step; None: the one after the last of this split.
            waited: How long the loop waited for its data, ns.
            begun: How many steps of loops had begun when it asked for them.
            amounts: Its samples and tokens, as far as these are numbers.

        Returns:
            The step.

        """
        inner = self._current.get()
        if inner is None or inner.session is None or (inner.more is not None and inner.abandoned_at):
            inner = self.innermost()
        other = None if inner is None or inner.loop is None else self.loops.find_adjacent(loop, inner, begun)
        if number is None:
            number = self.next_step(loop.split)
        if other is None:
            scope = Step(self, number, loop.split)
        else:
            scope = adjacent = AdjacentStep(self, number, loop.split)
            adjacent.adjacent_to, adjacent.parent = other, other.parent
        scope.loop, scope.waited, scope.more = loop, waited, amounts
        loop.maybe_left_at = loop.followed = 0
        self.loops.begun = begun = self.loops.begun + 1
        self.begin_step(scope)
        loop.step, loop.step_order, loop.ts = scope, begun, scope.ts
        return scope

    def begin_step(self, scope: Step) -> None:
        """Open a step: what `begin` does, in fewer steps where it follows another one, as nearly always."""
        last, here, thread = self._last_step, self._current.get(), get_ident()
        if (
            not self.usual
            or last is None
            or here is not last.parent
            or here.session is not self._journal.session
            or last.number >= scope.step
            or last.split != scope.split
            or thread != self._training_thread
            or (self._propagate is not False and "opentelemetry.trace" in sys.modules)
        ):
            self.begin(scope)
            return
        try:
            scope.thread, scope.task = thread, current_task() if "asyncio" in sys.modules else 0
            scope.parent, scope.epoch, scope.lap = here, last.epoch, last.lap
            last.number = self.steps.step = number = scope.step
            scope.started_in = last.split, number
            self._journal.append_line(last.line, here.seq, number, here.session, scope)  # type: ignore[arg-type] # it is open
            scope.session, self._main = self._journal.session, scope
            self._current.set(scope)
        except Exception as error:
            self._warn("begin", f"a step could not be begun: {error_text(error)}", key="step")

    def begin_span(self, scope: Span) -> None:
        """Open a span: what `begin` does, in fewer steps where the code here is in an open scope of its own."""
        here, session = self._current.get(), self._journal.session
        if (
            not self.usual
            or here is None
            or here.session is not session
            or (here.more is not None and here.is_elsewhere)
            or (here.loop is not None and scope.name in EVALUATION_SPANS)
            or (self._propagate is not False and "opentelemetry.trace" in sys.modules)
        ):
            self.begin(scope)
            return
        try:
            scope.thread, scope.task = get_ident(), current_task() if "asyncio" in sys.modules else 0
            scope.parent, scope.epoch, scope.lap, scope.step, scope.split = (
                here, here.epoch, here.lap, here.step, here.split
            )  # fmt: skip
            scope.started_in, scope.loop = here.started_in, here.loop
            self._journal.append_line(scope.line, here.seq, b"", session, scope)  # type: ignore[arg-type] # one is open
            if scope.loop is not None:
                scope.loop.ts = scope.ts
            scope.session = self._journal.session
            self._branches[scope] = None
            self._current.set(scope)
        except Exception as error:
            self._warn("begin", f"a span could not be begun: {error_text(error)}", key="span")

    def begin(self, scope: Scope) -> None:
        """Open a scope inside the innermost one."""
        try:
            tag, event, session = scope.tag, scope.begin, self._journal.session
            scope.thread, scope.task = get_ident(), current_task() if "asyncio" in sys.modules else 0
            if self.loops.adjacent:
                self.loops.end_abandoned()
            if not scope.detached:
                here = self._current.get()
                if (
                    here is None
                    or here.session is not session
                    or here.loop is not None
                    or (here.more is not None and here.abandoned_at)
                ):
                    self._find_parent(scope, here)
                else:
                    scope.parent, scope.started_in = here, here.started_in
                    if tag == "span":
                        scope.step, scope.split = here.step, here.split
            parent = scope.parent
            if parent is not None and parent.session is session:
                event["parent"] = parent.seq
                if tag != "epoch":
                    scope.epoch = parent.epoch
                if tag == "span":
                    scope.lap = parent.lap
            if tag == "step":
                self._number_lap(scope, event)
                split, around = scope.split or TRAIN, scope.started_in
                self.steps.begin(split, scope.step or 0)
                if around is None or split not in EVALUATION_SPLITS or around[0] in EVALUATION_SPLITS:
                    scope.started_in = split, scope.step or 0
                self._last_step = None
                if (
                    parent is not None
                    and parent.loop is None
                    and not (scope.in_main or scope.detached)
                    and split == self.steps.leading
                ):
                    self._last_step = self._last_steps[split]
                    self._last_step.parent = parent
            self._emitters[event["tag"]](event, scope)
            if self.closed:
                return
            if self._exits or self._failed_by:
                self._exits.pop(get_ident(), None)
                self._failed_by = 0
            scope.session = self._journal.session
            if scope.session is not session:  # the event opened a session of its own: nothing there to lie in
                event["parent"] = 0
            if tag == "span":
                if scope.loop is not None:
                    scope.loop.ts = scope.ts
                self._branches[scope] = None
            elif scope.detached:
                self._branches[scope], self.loops.adjacent[scope] = None, scope  # type: ignore[assignment] # it is one
            elif scope.thread == self._training_thread or self._is_in_main_thread(scope):
                self._main = scope
            self._look_around()
            if scope.detached:
                return
            before = self._current.set(scope)
            if tag == "run":
                self._before = before
            if self._propagate is not False and "opentelemetry.trace" in sys.modules:
                self._attach(scope)
        except Exception as error:
            self._warn("begin", f"a {scope.tag} could not be begun: {error_text(error)}", key=scope.tag)

    def end(self, scope: Scope, error: BaseException | None, status: str | None = None, *, rests: bool = False) -> None:
        """Close a scope and whatever is still open inside it, the short way where nothing is out of the ordinary.

        Args:
            scope: What ends; nothing is done where it is not open.
            error: The exception that leaves it, if any.
            status: Of one that no exception has failed.
            rests: Whether it is a run that takes more afterwards.

        """
        loop, line = scope.loop, LINES_OF_ENDS.get(scope.tag)
        if (
            error is None
            and line is not None
            and self.usual
            and (scope.more is None or not scope.is_special)
            and status is None
            and scope.session is not None
            and scope.session is self._journal.session
            and self._current.get() is scope
            and scope.seq
            and (loop is None or not loop.maybe_left_at or loop.step is not scope)
        ):
            rest = b"" if scope.waited is None else b',"data_wait":%b' % dumps(scope.waited / SECOND_NS)
            if scope.more is not None:
                rest += b"," + dumps({name: float(amount) for name, amount in scope.more.items()})[1:-1]
            is_span = scope.tag == "span"
            try:
                self._journal.append_line(line, scope.seq, rest, scope.session, loop if is_span else None)
            except Exception as failure:
                self._warn("end", f"a {scope.tag} could not be ended: {failure!r}", key=scope.tag)
            finally:
                scope.session = None
                self._current.set(scope.parent)
                if is_span:
                    self._branches.pop(scope, None)
                elif self._main is scope:
                    self._main = scope.parent
                if loop is not None and loop.step is scope:
                    loop.step = None
                    if self.loops.maybe_left:
                        self.loops.maybe_left.pop(scope, None)
        elif scope.session is not None:
            if self._current.get() is not scope:
                self._end_inside(scope, error)
            self._close(scope, error, status, rests)

    def innermost(self) -> Scope | None:
        """The innermost open scope here."""
        scope = started_in = self._current.get()
        if scope is None:
            if get_ident() != self._main_thread:
                return self._innermost_of_main()
            scope = self._main  # the main thread in another context, as the next cell of a notebook may be
        while scope is not None and (scope.abandoned_at or scope.session is None):
            self.end(scope, None)  # its loop was left, and no exception has come by since
            scope = self._innermost_of_main() if scope.in_main else scope.parent
        if started_in is not None and scope is not started_in and not has_begun_here(started_in):
            self._current.set(started_in)  # what is recorded here still belongs to it
        return scope

    def write_metrics(self, metrics: dict[str, float], given: int | None) -> bool:
        """Write the values of a call, in fewer steps than by `attribute`.

        Args:
            metrics: Finite numbers.
            given: The step that the caller gave; None: nothing.

        Returns:
            False where that cannot be done so: nothing is written then.

        """
        scope, steps, session = self._current.get(), self.steps, self._journal.session
        if (
            not self.usual
            or scope is None
            or scope.session is not session
            or steps.differ
            or (scope.more is not None and scope.is_elsewhere)
        ):
            return False
        number, loop, lines = steps.step, scope.loop, self._lines_of_metrics
        if given is None:
            if number is None or ((started_in := scope.started_in) is not None and started_in[1] != number):
                return False
            if scope.step is None:
                lines = self._lines_over
        elif number is None:
            number = steps.step_given(metrics, given, scope.split or TRAIN)
        elif given != number:
            return False
        if loop is not None:
            for key in metrics:
                if loop.split != scope.split or steps.split_of_key.get(key) != "":
                    return False
                break
        line = lines[scope.split]
        try:
            values = dumps(metrics)
        except TypeError:  # a key is no text, or is none that JSON can hold
            return False
        self._journal.append_line(line, number, values, session, loop)  # type: ignore[arg-type] # one is open
        return True

    def attribute(self, event: Event, metrics: Mapping[str, Any], step: int | None, split: str | None) -> Begun | None:
        """Say which split and step the values of a call belong to.

        Args:
            event: Gets `split` and the steps.
            metrics: The values by their keys.
            step: Given by the caller; None: nothing.
            split: Given by the caller; None or "": nothing.

        Returns:
            What the journal is to tell the time of the line.

        """
        loop, scope, steps, started_in = None, self._current.get(), self.steps, None
        if scope is not None and scope.session is not None and not (scope.more is not None and scope.abandoned_at):
            loop = scope.loop
        else:
            scope = self._attributed()
        if scope is not None:
            started_in, split = scope.started_in, split or scope.split
        event["split"] = split = split or TRAIN
        in_force = steps.step
        if in_force is None or step is not None or steps.differ:
            steps.attribute(event, metrics, step, split, started_in)
        else:  # as nearly always
            event["step"] = in_force
            if started_in is not None and started_in[1] != in_force and started_in[0] == steps.leading:
                event["own_step"] = started_in[1]
        if (scope is None or scope.step is None) and step is None and "step" in event:
            event["over"] = True
        if loop is not None:
            known = steps.split_of_key.get
            for key in metrics:
                if (known(key) == "" and split == loop.split) or loop.has(steps.split_of(key) or split):
                    return loop
            self.loops.follow(loop, EVALUATION)
        return None

    def follow(self) -> None:
        """Something is recorded that is the run's, and not a step's: an artifact, hyperparameters, a milestone."""
        loop = self.open_loop()
        if loop is not None:
            self.loops.follow(loop, NESTED)

    def open_loop(self) -> StepLoop | None:
        """The loop in whose open step the code here is."""
        scope = self._current.get()
        return None if scope is None or scope.session is None or scope.abandoned_at else scope.loop

    def training_step(self) -> int | None:
        """The training step that what is recorded here belongs to; an evaluation's where nothing is trained."""
        scope = self._attributed()
        return self.steps.training_step(None if scope is None else scope.started_in)

    def open(self) -> list[Scope]:
        """What is open in this session, whichever thread asks: run, epoch, step, then detached steps and all spans."""
        chain, scope = [], self._main
        while scope is not None:
            chain.append(scope)
            scope = scope.parent
        chain.reverse()
        session = self._journal.session
        chain += [scope for scope in list(self._branches) if scope not in chain]
        return [scope for scope in chain if scope.session is session and not scope.abandoned_at]

    def was_left(self) -> bool:
        """Whether a loop was left that nothing was recorded after."""
        scope = self._main
        while scope is not None and not scope.abandoned_at:
            scope = scope.parent
        return scope is not None and scope.session is self._journal.session

    def has_ended_by(self, error: BaseException) -> bool:
        """Whether an exception that may have been caught has ended the training.

        It was an interruption, or has left a scope or a loop, and none has begun since. Any other may be the program's
        ordinary way: StopIteration, say.
        """
        return self._outcomes.of(error) != "failed" or self._failed_by == id(error) or self.was_left()

    def leave(self, scope: Scope, error: BaseException | None) -> Status:
        """Close what is still open inside the run.

        Args:
            scope: Of the run.
            error: The exception that leaves it, if any.

        Returns:
            How the run has ended by that.

        """
        if scope.session is not None and self._current.get() is not scope:
            self._end_inside(scope, error)
        status = self._outcomes.of(error)
        if error is not None and status == "completed":
            self.note_exit(error)
            return self.exit_here()[0]
        return status

    def note_exit(self, error: BaseException) -> None:
        """Remember an exit that is asked for, or passes a scope: as the program ends nobody sees it any more."""
        thread, self.usual = get_ident(), False
        if not self._outcomes.is_exit(error):
            self._exits.pop(thread, None)
            return
        if thread in self._exits:
            status, _ = self._exits[thread]
        else:
            status = self._outcomes.of(error)
            if status == "completed" and self._is_unfinished(self.open()):
                status = "interrupted"
        self._exits[thread] = status, None if error.__traceback__ else error

    def exit_here(self) -> tuple[Status, BaseException | None]:
        """How the run ends where this thread ends the program, and the exit where it is still to be recorded."""
        thread = get_ident()
        if thread in self._exits:
            return self._exits[thread]
        # The program's code has come to its end, so no loop of this thread goes on, whoever holds it.
        left_open = [scope for scope in self.open() if scope.thread != thread or not is_loop_step(scope)]
        return "interrupted" if self._is_unfinished(left_open) else "completed", None

    def _is_unfinished(self, left_open: list[Scope]) -> bool:
        """Whether a step or epoch is open, or training steps are missing."""
        if any(scope.tag in {"epoch", "step"} for scope in left_open):
            return True
        if self.total_steps is None:
            return False
        trained = [last.number for split, last in self._last_steps.items() if split not in EVALUATION_SPLITS]
        last = max(trained) if trained else self.steps.training_step(None)
        return last is None or last + 1 < self.total_steps

    def parent_seq(self) -> int:
        """The `seq` of the innermost scope's begin line; 0 for none in this session."""
        scope = self.innermost()
        return scope.seq if scope is not None and scope.session is self._journal.session else 0

    def parent_without_closing(self) -> int:
        """The same, but a step whose loop was left stays open: the caller may itself run as an exception passes."""
        scope = self._current.get() or self._main
        while scope is not None and (scope.abandoned_at or scope.session is not self._journal.session):
            scope = scope.parent
        return scope.seq if scope is not None else 0

    def mark_recorded(self, error: BaseException) -> None:
        """Remember that an exception stands in this session: the scopes it passes through need not record it again."""
        self._failed_by, self.usual = id(error), False
        with suppress(Exception):  # one that takes no attribute is recorded by every scope
            error._stepspan_recorded = self._recorded_token  # type: ignore[attr-defined]

    def ids(self, scope: Scope) -> tuple[bytes, bytes]:
        """The trace id (16 bytes) and span id (8 bytes) that the mapping will give a scope."""
        me = self._parent_identities.get(scope.session, self.identity)
        top = scope
        while top.tag == "span" and top.begin["parent"] and top.parent is not None and top.parent.tag in _IN_TRACE:
            top = top.parent
        if top.tag == "step":
            trace_id = ids.step_trace_id(me.run_key, top.split or "", top.epoch, top.lap, top.step or 0)
        elif top.tag == "run" and (caller := remote_parent(top.begin)):
            trace_id = caller.trace_id
        else:
            trace_id = ids.outside_trace_id(me.run_key, me.rank, me.role, top.epoch, top.ts)
        session = getattr(scope.session or self._journal.session, "id", "")
        if scope.tag == "step":
            return trace_id, ids.step_span_id(trace_id, me.rank, ids.unique_role(me.role, session))
        return trace_id, ids.span_id(session, scope.seq)

    def amount(self, field: str, given: Any, batch: Any = None, before: float | None = None) -> float | None:
        """`before` plus how much is in a batch.

        Args:
            field: "samples" or "tokens", for the warning.
            given: A number, or a function of the batch that counts.
            batch: What the function is called with.
            before: The amount so far.

        Returns:
            The sum; `before`, with a warning, where `given` yields no finite number of 0 or more.

        """
        try:
            found = float(given(batch) if callable(given) else given)
            if 0 <= found < math.inf:
                return found + (before or 0.0)
            raise ValueError("below 0 or not finite")
        except Exception as error:  # a user's function may raise anything
            self._warn(field, f"{field}={to_text(given):.80}: {to_text(error)}; throughput is left out")
            return before

    def after_fork(self) -> None:
        """In a forked child, while the journal is still the parent's: what the parent has open is not ours to end."""
        if self._journal.session is not None:
            self._parent_identities[self._journal.session] = self.identity
        self._main = self.total_steps = None
        self._run_thread = self._training_thread = 0
        self.usual = False
        self._branches.clear()
        self.loops.forget()
        self._exits.clear()
        self._current.set(None)

    @property
    def _recorded_token(self) -> str:
        return self.identity.run_key + self.identity.role

    def _fail(self, error: BaseException) -> None:
        with suppress(Exception):
            if error._stepspan_recorded == self._recorded_token:  # type: ignore[attr-defined]
                return
        self._record_error(error)

    def _close(self, scope: Scope, error: BaseException | None, status: str | None = None, rests: bool = False) -> None:
        """Close a scope alone, with the steps that go on side by side within it."""
        ended, error = self.loops.end_of(scope, error)
        try:
            self.loops.close_within(scope, error)
            for call in scope.on_exit:
                call()
            event: Event = {"ts": 0, "seq": 0, "tag": scope.tag + "_end", "begin": 0}
            if scope.waited is not None:
                event["data_wait"] = scope.waited / SECOND_NS
            if ended and ended <= scope.ts:
                scope.samples = scope.tokens = None  # nothing tells how long it took to process them
            if scope.samples is not None and (samples := self.amount("samples", scope.samples)) is not None:
                event["samples"] = samples
            if scope.tokens is not None and (tokens := self.amount("tokens", scope.tokens)) is not None:
                event["tokens"] = tokens
            if ended:
                event["ended"], scope.abandoned_at = ended, 0
            if error is not None:
                if self._outcomes.of(error) == "failed":
                    self._fail(error)
                    status = "failed" if scope.tag == "run" else "error"
                self.note_exit(error)
            elif self._exits:
                self._exits.pop(get_ident(), None)  # one that was caught
            if status is not None:
                event["status"] = status
            if rests:
                event["rests"] = True
            if scope.session is self._journal.session:
                self._emitters[event["tag"]](event, scope)
                if scope.tag == "span" and scope.loop is not None:
                    scope.loop.ts = event["ts"] or scope.loop.ts
        except Exception as failure:
            self._warn("end", f"a {scope.tag} could not be ended: {failure!r}", key=scope.tag)
        finally:
            scope.session = None
            if self._current.get() is scope:
                if scope.tag == "run":
                    self._restore_before(scope)
                else:
                    self._current.set(None if scope.in_main else scope.parent)
            if scope.tag == "span" or scope.detached:
                self._branches.pop(scope, None)
            elif self._main is scope:
                self._main = scope.parent
            self.loops.has_ended(scope)
            if scope.token is not None:
                token, scope.token = scope.token, None
                self._propagation.detach(token)
            self._look_around()

    def _look_around(self) -> None:
        """See whether what begins or ends next is to be looked at more closely."""
        self.usual = not (self.closed or self.loops.adjacent or self._exits or self._failed_by) and self._is_straight

    def _restore_before(self, scope: Scope) -> None:
        """Make current here what was so before the run."""
        before, self._before = self._before, None
        if before is not None:
            with suppress(ValueError):  # it ends in another context than it began in
                self._current.reset(before)
                return
        self._current.set(scope.parent)

    def _end_inside(self, scope: Scope, error: BaseException | None) -> None:
        inside, inner = [], self._current.get()
        while inner is not None and inner is not scope:
            inside.append(inner)
            inner = inner.parent
        if inner is scope:  # otherwise this is another thread or task, whose scopes are its own
            for left_open in inside:
                loop = left_open.loop
                if loop is not None and loop is not scope.loop and error is None and is_loop_step(scope):
                    self.loops.follow(loop, NESTED)  # the loop around it goes on
                if left_open.session is not None:
                    self._close(left_open, error)

    def _find_parent(self, scope: Scope, here: Scope | None) -> None:
        """Find what a scope lies in: the innermost scope here, or what is around a loop's step that was left."""
        parent = scope.parent = self.innermost()
        if parent is None:
            return
        scope.in_main = here is None
        if here is not None and parent.loop is not None:
            if self.loops.ends_before(scope, parent, parent.loop):
                parent = scope.parent = self.innermost()
            if parent is not None and scope.loop is None:
                scope.loop = parent.loop
        if parent is None or parent.session is not self._journal.session:
            return
        started = parent if parent is here else self._attributed() or parent
        scope.started_in = started.started_in
        if scope.tag == "span":
            scope.step, scope.split = started.step, started.split

    def _innermost_of_main(self) -> Scope | None:
        """The innermost open scope of the main thread, which alone ends what was left there."""
        scope = self._main
        while scope is not None and (scope.abandoned_at or scope.session is None):
            scope = scope.parent
        return scope

    def _attributed(self) -> Scope | None:
        """The scope whose split and step what is recorded here has: one that has ended, where its code goes on."""
        scope = self._current.get()
        if scope is None:
            return self._innermost_of_main()
        while scope is not None and (scope.abandoned_at or scope.session is None):
            if not has_begun_here(scope):
                return scope
            self.end(scope, None)
            scope = self._innermost_of_main() if scope.in_main else scope.parent
        return scope

    def _is_in_main_thread(self, scope: Scope) -> bool:
        """Whether a run, epoch or step began in the main thread; that may be where this one begins."""
        thread = scope.thread
        if scope.tag == "run":
            self._run_thread = self._main_thread = thread
        elif thread == self._run_thread or not self._training_thread or self._main_thread_is_over():
            self._main_thread = self._training_thread = thread
        return thread == self._main_thread

    def _main_thread_is_over(self) -> bool:
        """Whether the first thread that trained has ended, where the run's own trains nothing."""
        main = self._main_thread
        if main in {self._run_thread, get_ident()} or self._main is None or self._main.tag != "run":
            return False
        return all(thread.ident != main for thread in enumerate_threads())

    def _number_lap(self, scope: Scope, event: Event) -> None:
        """Epoch and lap of a step: how often the steps of its split have begun again. (epoch, step) grows in a lap."""
        number, split, lap = scope.step or 0, scope.split or "", 0
        last = self._last_steps.get(split)
        if last is not None:
            lap, (now, before) = last.lap, (-1 if each is None else each for each in (scope.epoch, last.epoch))
            if now < before or (now == before and number <= last.number):
                lap += 1
        if last is None or (last.epoch, last.lap) != (scope.epoch, lap):
            last = self._last_steps[split] = LastStep(split, scope.epoch, lap)
        last.number, scope.lap = number, lap
        if scope.epoch is not None:
            event["epoch"] = scope.epoch
        if lap:
            event["lap"] = lap

    def _attach(self, scope: Scope) -> None:
        if self._propagation is None:
            from stepspan.recording import propagation

            self._propagation = propagation
        if self._propagate or not self._propagation.sampler_would_be_overruled():
            scope.token = self._propagation.attach(lambda: self.ids(scope))


class NullScopes(Scopes):
    """Of a run that records nothing: its scopes are never open."""

    def __init__(self) -> None:
        self.clock = self.stopwatch = lambda: 0
        self._begin_counting()

    def begin(self, scope: Scope) -> None:
        """Leave the scope closed, so that there is nothing to end."""

    def begin_step(self, scope: Step) -> None:
        """Leave it closed, too."""

    def begin_span(self, scope: Span) -> None:
        """Leave it closed, too."""

    def span(self, fields: Event) -> Scope:
        """A phase that is never open."""
        return Scope(self, "span", {"ts": 0, "seq": 0, "tag": "span_begin", "parent": 0, **fields})

    def mark_recorded(self, error: BaseException) -> None:
        """Leave the exception alone."""

    def amount(self, field: str, given: Any, batch: Any = None, before: float | None = None) -> float | None:
        """Call nothing of the user's."""
        return None


MAX_SPAN_LINES = 1000
_IN_TRACE = frozenset({"span", "step"})
"""A span that lies in one of these is in its trace."""
