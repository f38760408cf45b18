"""What the dashboards share: data sources, variables, links, and the kinds of panels with their looks.

Every panel says in its description what it shows and what to do about it. Ids and the letters of queries are given
where a dashboard is put together, so that nobody counts by hand.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any, TypeAlias, TypeVar

from grafana_foundation_sdk.builders import common as look
from grafana_foundation_sdk.builders import dashboard as board
from grafana_foundation_sdk.builders import (
    heatmap,
    logs,
    loki,
    prometheus,
    stat,
    statushistory,
    table,
    tempo,
    timeseries,
    xychart,
)
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import xychart as xy
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.tempo import SearchTableType

from dashboards.rules import FALLBACK

PROMETHEUS = common.DataSourceRef(type_val="prometheus", uid="prometheus")
TEMPO = common.DataSourceRef(type_val="tempo", uid="tempo")
LOKI = common.DataSourceRef(type_val="loki", uid="loki")

JOB = 'job_id="$job"'
SPLIT = 'split=~"$split"'
RANK = 'rank=~"${rank:pipe}"'
"""As it is chosen or typed: Grafana escapes a plain `$rank`, and 12.. would match nothing."""
TRAIN = 'split="train"'
TRAINING = 'split!~"val|valid|validation|eval|test|predict"'
"""All splits that a model is trained on, whatever they are called."""

MOST_LINES = 20
"""Lines that a drill-down draws, however many ranks are chosen."""
COARSE = 200
"""Points of each: a drill-down looks at all chosen ranks for every one."""

Query: TypeAlias = prometheus.Dataquery | loki.Dataquery | tempo.Dataquery
Panel: TypeAlias = (
    timeseries.Panel | stat.Panel | table.Panel | statushistory.Panel | heatmap.Panel | xychart.Panel | logs.Panel
)
Mark: TypeAlias = Builder[model.AnnotationQuery]
Limits: TypeAlias = Sequence[tuple[float, str]]
"""(from this value on, colour), after green."""

P = TypeVar("P", bound=Panel)


# ------------------------------------------------------------------------------------------------------- queries


def lines(expr: str, legend: str, *, exemplars: bool = False) -> prometheus.Dataquery:
    """PromQL over the dashboard's time range; `legend` may hold `{{label}}`."""
    return prometheus.Dataquery().datasource(PROMETHEUS).expr(expr).legend_format(legend).exemplar(exemplars).range()


def buckets(expr: str, legend: str) -> prometheus.Dataquery:
    """PromQL of native histograms, for a heatmap."""
    return lines(expr, legend).format(PromQueryFormat.HEATMAP)


def at_end(expr: str, legend: str) -> prometheus.Dataquery:
    """PromQL at the end of the dashboard's time range, one number for each series."""
    return prometheus.Dataquery().datasource(PROMETHEUS).expr(expr).legend_format(legend).instant()


def rows(expr: str, legend: str) -> prometheus.Dataquery:
    """PromQL at the end of the dashboard's time range, one row of a table for each series."""
    return at_end(expr, legend).format(PromQueryFormat.TABLE)


def log_lines(expr: str) -> loki.Dataquery:
    """LogQL."""
    return loki.Dataquery().datasource(LOKI).expr(expr).query_type("range").max_lines(200)


def traces(query: str) -> tempo.Dataquery:
    """TraceQL that finds spans."""
    found = tempo.Dataquery().datasource(TEMPO).query(query).query_type("traceql")
    return found.limit(50).spss(20).table_type(SearchTableType.SPANS)


def trace_metrics(query: str) -> tempo.Dataquery:
    """TraceQL that gives lines."""
    return tempo.Dataquery().datasource(TEMPO).query(query).query_type("traceql")


def events(which: str) -> str:
    """LogQL of the job's log records; `which` is a label filter such as `event_name="exception"`.

    loki.yaml makes job_id and rank labels; the Collector's configuration makes the event's name an attribute.
    """
    return f"{{{JOB}}} | {which}"


def most(expr: str, by: str, count: int = MOST_LINES) -> str:
    """The series of `expr` whose rank is among the `count` with the most of `by`, one value a rank over the range.

    Chosen once, at the range's end (`@ end()`), and not at every point: a `topk` alone draws a new set at each.
    """
    return f"{expr} and on (rank) topk({count}, {by})"


# -------------------------------------------------------------------------------------------------------- panels


def graph(title: str, about: str, unit: str, *queries: Query, width: int = 12, **how: Any) -> timeseries.Panel:
    """Lines over time. `limits`, `stacked`, `low`, `high`, `log` (scale), `most` (points)."""
    panel = _panel(timeseries.Panel(), title, about, unit, queries, width, 9, how.pop("limits", ()))
    panel = panel.line_width(1).fill_opacity(8).legend(_legend(narrow=width < 8))
    panel = panel.tooltip(
        look.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)
    )
    panel = panel.show_points(common.VisibilityMode.AUTO)
    if "most" in how:
        panel = panel.max_data_points(how.pop("most"))
    if how.pop("stacked", False):
        panel = panel.stacking(look.StackingConfig().mode(common.StackingMode.NORMAL)).fill_opacity(40)
    if how.pop("log", False):
        panel = panel.scale_distribution(look.ScaleDistributionConfig().type(common.ScaleDistribution.LOG).log(10))
    return _bounds(panel, how)


def number(title: str, about: str, unit: str, *queries: Query, width: int = 4, **how: Any) -> stat.Panel:
    """The last value of each query in the range. `limits`, `decimals`, `named` (show the legend), `none` (instead)."""
    panel = _panel(stat.Panel(), title, about, unit, queries, width, 4, how.pop("limits", ()))
    panel = panel.reduce_options(look.ReduceDataOptions().calcs(["lastNotNull"])).graph_mode(
        common.BigValueGraphMode.NONE
    )
    if how.pop("named", False):
        panel = panel.text_mode(common.BigValueTextMode.VALUE_AND_NAME)
    panel = panel.no_value(how.pop("none", "-")).max_data_points(COARSE)
    if "decimals" in how:
        panel = panel.decimals(how.pop("decimals"))
    return _bounds(panel, how)


def listing(
    title: str,
    about: str,
    unit: str,
    *queries: Query,
    columns: dict[str, str],
    hidden: Sequence[str] = (),
    join: str = "",
    sort: tuple[str, bool] | None = None,
    width: int = 12,
    limits: Limits = (),
) -> table.Panel:
    """A table.

    `columns`: field -> its heading. `join`: the label that joins several queries. `sort`: a heading, and whether
    descending.
    """
    panel = _panel(table.Panel(), title, about, unit, queries, width, 9, limits)
    if join:
        panel = panel.with_transformation(transformation("joinByField", {"byField": join, "mode": "outer"}))
    excluded = {"Time": True, **dict.fromkeys(hidden, True)}
    panel = panel.with_transformation(transformation("organize", {"excludeByName": excluded, "renameByName": columns}))
    if limits:
        coloured = model.DynamicConfigValue(id_val="custom.cellOptions", value={"type": "color-text"})
        panel = panel.override_by_field_type("number", [coloured])
    if sort:
        panel = panel.sort_by([look.TableSortByFieldState().display_name(sort[0]).desc(sort[1])])
    return panel


def by_rank(title: str, about: str, unit: str, *queries: Query, limits: Limits, width: int = 12) -> statushistory.Panel:
    """A row for each series and a cell for each time, in the limits' colours.

    A hundred cells a row: more can't be told apart, and each costs a look at every rank.
    """
    panel = _panel(statushistory.Panel(), title, about, unit, queries, width, 12, limits).max_data_points(100)
    panel = panel.color_scheme(board.FieldColor().mode(model.FieldColorModeId.THRESHOLDS))
    return panel.show_value(common.VisibilityMode.NEVER).row_height(0.9).legend(_legend(table=False))


def histogram(title: str, about: str, unit: str, *queries: Query, width: int = 12) -> heatmap.Panel:
    """Native histograms over time."""
    panel = _panel(heatmap.Panel(), title, about, "short", queries, width, 9, ())
    return panel.calculate(False).y_axis(heatmap.YAxisConfig().unit(unit)).show_legend()


def against(
    title: str,
    about: str,
    unit: str,
    x: prometheus.Dataquery,
    *queries: prometheus.Dataquery,
    axis: str,
    by: Sequence[str],
    width: int = 12,
) -> xychart.Panel:
    """Points of the queries over the values of `x`, on an axis named `axis`. Joined by time and the labels `by`."""
    asked = [query.format(PromQueryFormat.TABLE) for query in (x, *queries)]
    panel = _panel(xychart.Panel(), title, about, unit, asked, width, 9, ())
    legends = [query.build().legend_format or "" for query in asked]
    names = [axis, *(re.sub(r"[{}]", "", legend) for legend in legends[1:])]
    # One table of all, and then a frame for each of what the labels tell apart: it is drawn over its own steps.
    panel = panel.with_transformation(transformation("merge", {}))
    hidden = dict.fromkeys(("job_id", "__name__"), True)
    renamed = {f"Value #{letter}": name for letter, name in zip(ascii_uppercase, names, strict=False)}
    panel = panel.with_transformation(transformation("organize", {"excludeByName": hidden, "renameByName": renamed}))
    parts = {"fields": list(by), "naming": {"asLabels": True}}
    panel = panel.with_transformation(transformation("partitionByValues", parts))
    for name, legend in zip(names[1:], legends[1:], strict=True):
        shown = re.sub(r"{{(\w+)}}", r"${__field.labels.\1}", legend)
        panel = panel.override_by_name(name, [model.DynamicConfigValue(id_val="displayName", value=shown)])
    steps = xychart.MatcherConfig().id("byName").options(axis)
    series = xychart.XYSeriesConfig().x(xychart.XychartXYSeriesConfigX().matcher(steps))
    panel = panel.mapping(xy.SeriesMapping.AUTO).series([series]).show(xy.XYShowMode.POINTS)
    return panel.point_size(xychart.XychartFieldConfigPointSize().fixed(4)).legend(_legend(table=False))


def messages(title: str, about: str, expr: str, *, width: int = 12) -> logs.Panel:
    """Log records, the newest first."""
    panel = _panel(logs.Panel(), title, about, "none", [log_lines(expr)], width, 9, ())
    return (
        panel.show_time(True)
        .wrap_log_message(True)
        .enable_log_details(True)
        .sort_order(common.LogsSortOrder.DESCENDING)
    )


def faint(panel: P, named: str) -> P:
    """The series whose name matches `named` (a regular expression between slashes), faintly."""
    looks = {
        "custom.lineWidth": 1,
        "custom.fillOpacity": 0,
        "custom.lineStyle": {"fill": "dash", "dash": [4, 4]},
        "color": {"mode": "fixed", "fixedColor": "rgba(140, 140, 140, 0.45)"},
    }
    panel.override_by_regexp(named, [model.DynamicConfigValue(id_val=key, value=value) for key, value in looks.items()])
    return panel


def mark(name: str, colour: str, query: loki.Dataquery | prometheus.Dataquery, title: str, text: str) -> Mark:
    """What a query finds, as vertical lines on every graph over time."""
    found = query.ref_id("Anno")
    marked = board.AnnotationQuery().name(name).datasource(_source(query)).enable(True).icon_color(colour)
    # Loki's data source reads `expr` beside the target, Prometheus' the target.
    return marked.target(found).expr(found.build().expr).title_format(title).text_format(text)


def transformation(name: str, options: object) -> model.DataTransformerConfig:
    """One of Grafana's transformations."""
    return model.DataTransformerConfig(id_val=name, options=options)


def _panel(
    panel: P, title: str, about: str, unit: str, queries: Sequence[Query], width: int, height: int, limits: Limits
) -> P:
    panel.title(title).description(about).unit(unit).span(width).height(height)
    panel.datasource(_source(queries[0]))
    panel.targets([query.ref_id(letter) for query, letter in zip(queries, ascii_uppercase, strict=False)])
    steps = [model.Threshold(value=None, color="green")]
    steps += [model.Threshold(value=value, color=color) for value, color in limits]
    panel.thresholds(board.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps))
    if limits and isinstance(panel, timeseries.Panel):
        style = look.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED)
        panel.thresholds_style(style)
    return panel


def _source(query: Query) -> common.DataSourceRef:
    source = query.build().datasource
    assert source is not None
    return source


def _bounds(panel: P, how: dict[str, Any]) -> P:
    if "low" in how:
        panel.min(how.pop("low"))
    if "high" in how:
        panel.max(how.pop("high"))
    if how:
        raise TypeError(f"no such way to draw: {', '.join(how)}")
    return panel


def _legend(*, table: bool = True, narrow: bool = False) -> look.VizLegendOptions:
    legend = look.VizLegendOptions().show_legend(True).placement(common.LegendPlacement.BOTTOM)
    if table:
        return legend.display_mode(common.LegendDisplayMode.TABLE).calcs(
            ["min", "mean", "max", "lastNotNull"][2 * narrow :]
        )
    return legend.display_mode(common.LegendDisplayMode.LIST)


# ---------------------------------------------------------------------------------------------------- dashboards

Row: TypeAlias = tuple[str, Sequence[Panel]]
"""A heading and its panels, from left to right."""


def dashboard(
    name: str, title: str, about: str, rows: Sequence[Row], *, variables: Sequence[str] = ("rank", "split")
) -> board.Dashboard:
    """A dashboard with variables `job` and those named, a link to each of the others, and its rows."""
    built = (
        board.Dashboard(title)
        .uid(f"stepspan-{name}")
        .description(about)
        .tags(["stepspan"])
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("10s")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .variables([VARIABLES[variable]() for variable in ("job", *variables, "raw")])
        .link(_links())
    )
    number = 1
    for heading, panels in rows:
        built = built.with_row(board.Row(heading).id(number))
        number += 1
        for panel in panels:
            built = built.with_panel(panel.id(number))
            number += 1
    return built


def _links() -> board.DashboardLink:
    link = board.DashboardLink("stepspan").type(model.DashboardLinkType.DASHBOARDS).tags(["stepspan"])
    return link.include_vars(True).keep_time(True).tooltip("The same job and time in the other dashboards")


def _job() -> board.QueryVariable:
    return _variable("job", "job_id", "The training job", "label_values(training_run_info, job_id)").sort(
        model.VariableSort.ALPHABETICAL_DESC
    )


def _rank() -> board.QueryVariable:
    query = f"label_values(training_run_start_time_seconds{{{JOB}}}, rank)"
    return _all(_variable("rank", "rank", "What the panels by rank are narrowed to", query)).sort(
        model.VariableSort.NUMERICAL_ASC
    )


def _split() -> board.QueryVariable:
    query = f'label_values({{__name__=~"training_.+",{JOB},rank="0"}}, split)'
    return _all(_variable("split", "split", "train, val, eval, test", query))


def _raw() -> board.QueryVariable:
    about = "Whether series are read beside recording rules: `.*`, unless rules have recorded 100 ranks or more"
    hidden = _variable("raw", "raw", about, FALLBACK).regex('/raw="([^"]*)"/')
    return hidden.hide(model.VariableHide.HIDE_VARIABLE)


def _variable(name: str, label: str, about: str, query: str) -> board.QueryVariable:
    variable = board.QueryVariable(name).label(label).description(about).datasource(PROMETHEUS).query(query)
    return variable.refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)


def _all(variable: board.QueryVariable) -> board.QueryVariable:
    everything = model.VariableOption(text="All", value="$__all")
    return variable.multi(True).include_all(True).all_value(".*").current(everything)


def _slower() -> board.TextBoxVariable:
    box = board.TextBoxVariable("slower").label("steps of at least").description("Duration of the steps to find: 1.5s")
    return box.default_value("0s").current(model.VariableOption(text="0s", value="0s"))


VARIABLES = {"job": _job, "rank": _rank, "split": _split, "slower": _slower, "raw": _raw}
