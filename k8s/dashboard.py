"""The Grafana dashboard, for Grafana 11: `python -m armillary.k8s.dashboard` writes it. Needs the packages of `dev`."""

from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import common, heatmap, stat, timeseries
from grafana_foundation_sdk.builders.dashboard import Dashboard, DatasourceVariable, QueryVariable, Row
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import StackingMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh

FILE = Path(__file__).parent / "cluster" / "dashboard.json"
RUN = 'namespace=~"$namespace", run="$run"'
SOURCE = DataSourceRef(type_val="prometheus", uid="$datasource")
WINDOW = "$__rate_interval"


@dataclass(frozen=True)
class Panel:
    """kind: "stat", "lines", "stacked" or "heatmap"; queries: PromQL and the legend of each."""

    title: str
    kind: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    width: int = 8
    text: str = ""


def train(name: str, more: str = "") -> str:
    return f"armillary_train_{name}{{{RUN}{more}}}"


def run(name: str, more: str = "") -> str:
    return f"armillary_run_{name}{{{RUN}{more}}}"


def share(name: str) -> str:
    """Of the time of all ranks, in the mean."""
    return f"avg(rate({train(name)}[{WINDOW}]))"


ROWS: dict[str, tuple[Panel, ...]] = {
    "Overview": (
        Panel("Step", "stat", "none", ((f"max({run('step')})", "step"), (f"max({run('steps_planned')})", "of")), 4),
        Panel("Tokens/s", "stat", "short", ((f"sum(rate({train('tokens_total')}[{WINDOW}]))", ""),), 4),
        Panel("MFU", "stat", "percentunit", ((f"avg({train('mfu')})", ""),), 4),
        Panel("Ranks", "stat", "none",
              ((f"max({run('ranks')})", "at work"), (f"max({run('ranks_planned')})", "of")), 4),
        Panel("Restarts", "stat", "none", ((f"max({run('restarts_total')})", ""),), 4),
        Panel("Last checkpoint", "stat", "s",
              ((f"time() - max({run('checkpoint_last_success_timestamp_seconds')})", "ago"),), 4),
        Panel("Loss", "lines", "none", ((f"max({train('loss')})", "loss"),), 12),
        Panel("Gradient norm", "lines", "none", ((f"max({train('grad_norm')})", "norm"),), 6),
        Panel("Learning rate", "lines", "sci", ((f"max({train('learning_rate')})", "rate"),), 6),
        Panel("Tokens/s", "lines", "short", ((f"sum(rate({train('tokens_total')}[{WINDOW}]))", "tokens/s"),), 8),
        Panel("Model TFLOP/s of a rank", "lines", "short",
              ((f"avg(rate({train('model_flops_total')}[{WINDOW}])) / 1e12", "TFLOP/s"),), 8),
        Panel("State of the run", "stacked", "none", ((f"max by (state) ({run('state')})", "{{state}}"),), 8),
        Panel("Verdicts", "stacked", "none",
              ((f"sum by (kind) (increase({run('verdicts_total')}[{WINDOW}]))", "{{kind}}"),), 12,
              "what went wrong: docs/operations.md says what each means"),
        Panel("Bad steps", "stacked", "none",
              ((f"max(increase({run('nonfinite_steps_total')}[{WINDOW}]))", "not finite"),
               (f"max(increase({run('spike_steps_total')}[{WINDOW}]))", "spikes"),
               (f"max(increase({run('skipped_steps_total')}[{WINDOW}]))", "skipped")), 6),
        Panel("Launches", "lines", "none", ((f"max({run('launches_total')})", "launches"),), 6),
    ),
    "Where the time goes": (
        Panel("Share of the time, mean of all ranks", "stacked", "percentunit",
              ((share("compute_seconds_total"), "compute"),
               (share("collective_wait_seconds_total"), "wait for ranks"),
               (share("reduce_seconds_total"), "reduce and update"),
               (share("data_wait_seconds_total"), "wait for data"),
               (share("checkpoint_seconds_total"), "stand still for a save")), 16),
        Panel("Step", "lines", "s",
              tuple((f"histogram_quantile({q}, sum by (le) (rate({train('step_duration_seconds_bucket')}[{WINDOW}])))",
                     f"{q:.0%}") for q in (0.5, 0.99)), 8),
        Panel("Ranks by phase", "stacked", "none", ((f"sum by (phase) ({train('phase')})", "{{phase}}"),), 24),
    ),
    "Ranks": (
        Panel("Probe of each rank: who is slow", "heatmap", "s", ((train("probe_seconds"), "{{rank}}"),), 12,
              "a piece of work in which no rank waits for another"),
        Panel("Wait for other ranks: the slowest rank waits least", "lines", "percentunit",
              ((f"rate({train('collective_wait_seconds_total')}[{WINDOW}])", "rank {{rank}}"),), 12),
        Panel("Silence of each rank", "lines", "s",
              ((f"time() - {train('progress_timestamp_seconds')}", "rank {{rank}}"),), 8),
        Panel("Host memory", "lines", "bytes", ((train("host_memory_bytes"), "rank {{rank}}"),), 8),
        Panel("GPU memory", "lines", "bytes", ((train("gpu_memory_bytes"), "rank {{rank}}"),), 8),
        Panel("Steps/s of each rank", "lines", "short",
              ((f"rate({train('steps_total')}[{WINDOW}])", "rank {{rank}}"),), 24),
    ),
    "Checkpoints": (
        Panel("Step of the last one", "lines", "none",
              ((f"max({run('checkpoint_step')})", "saved"), (f"max({run('step')})", "trained")), 8),
        Panel("Age and interval", "lines", "s",
              ((f"time() - max({run('checkpoint_last_success_timestamp_seconds')})", "age"),
               (f"max({train('checkpoint_interval_seconds')})", "interval")), 8),
        Panel("Duration", "lines", "s",
              ((f"histogram_quantile(0.9, sum by (le) (rate({train('checkpoint_duration_seconds_bucket')}[1h])))",
                "90%"),), 8),
        Panel("Written", "lines", "Bps",
              ((f"sum(rate({train('checkpoint_bytes_total')}[{WINDOW}]))", "bytes/s"),), 8),
        Panel("Committed", "lines", "none", ((f"max({run('checkpoints_total')})", "checkpoints"),), 8),
        Panel("Failed", "lines", "none", ((f"max({train('checkpoint_failures_total')})", "failures"),), 8),
    ),
    "Data": (
        Panel("Loss by source", "lines", "none", ((f"max by (source) ({train('source_loss')})", "{{source}}"),), 8),
        Panel("Samples/s by source", "stacked", "short",
              ((f"sum by (source) (rate({train('samples_total')}[{WINDOW}]))", "{{source}}"),), 8),
        Panel("Cursor", "lines", "none",
              ((f"max({train('data_cursor_block')})", "block"), (f"max({train('data_cursor_row')})", "row")), 8),
        Panel("Positions seen", "lines", "short", ((f"max({run('tokens')})", "positions"),), 24),
    ),
    "GPUs": (
        Panel("Tensor cores in use", "lines", "percentunit",
              (('DCGM_FI_PROF_PIPE_TENSOR_ACTIVE{exported_namespace=~"$namespace"}', "{{Hostname}} {{gpu}}"),), 8),
        Panel("Temperature", "lines", "celsius",
              (('DCGM_FI_DEV_GPU_TEMP{exported_namespace=~"$namespace"}', "{{Hostname}} {{gpu}}"),), 8),
        Panel("Power", "lines", "watt",
              (('DCGM_FI_DEV_POWER_USAGE{exported_namespace=~"$namespace"}', "{{Hostname}} {{gpu}}"),), 8),
        Panel("Faults (XID)", "lines", "none",
              (('DCGM_FI_DEV_XID_ERRORS{exported_namespace=~"$namespace"}', "{{Hostname}} {{gpu}}"),), 24),
    ),
}  # fmt: skip


def queries() -> list[str]:
    """Every PromQL expression of the dashboard."""
    return [expr for row in ROWS.values() for panel in row for expr, _ in panel.queries]


def dashboard():
    """The whole, as the SDK's builder."""
    made = (
        Dashboard("Armillary")
        .uid("armillary")
        .tags(["armillary"])
        .refresh("30s")
        .time("now-3h", "now")
        .with_variable(DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_chosen("namespace", "label_values(armillary_run_step, namespace)").include_all(True))
        .with_variable(_chosen("run", 'label_values(armillary_run_step{namespace=~"$namespace"}, run)'))
    )
    for title, panels in ROWS.items():
        made = made.with_row(Row(title))
        for panel in panels:
            made = made.with_panel(_panel(panel))
    return made


def _chosen(name: str, query: str) -> QueryVariable:
    return QueryVariable(name).datasource(SOURCE).query(query).refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)


def _panel(panel: Panel):
    match panel.kind:
        case "stat":
            made = stat.Panel()
        case "heatmap":
            made = heatmap.Panel().calculate(True)
        case _:
            made = timeseries.Panel().fill_opacity(60 if panel.kind == "stacked" else 0)
            if panel.kind == "stacked":
                made = made.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    made = made.title(panel.title).datasource(SOURCE).unit(panel.unit).span(panel.width).height(7)
    if panel.kind == "stat":
        made = made.height(4)
    if panel.text:
        made = made.description(panel.text)
    for expr, legend in panel.queries:
        query = Dataquery().expr(expr)
        made = made.with_target(query.legend_format(legend) if legend else query)
    return made


def text() -> str:
    """Of k8s/cluster/dashboard.json."""
    return JSONEncoder(sort_keys=True, indent=1).encode(dashboard().build()) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
