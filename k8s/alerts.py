"""The alerts: one table, from which the PrometheusRule is made. `python -m armillary.k8s.alerts` writes it.

An expression that alerts keeps the labels namespace and run. docs/operations.md has an entry for each name.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

RULE_FILE = Path(__file__).parent / "cluster" / "alerts.yaml"
RUNBOOK = "docs/operations.md#"
BY = "by (namespace, run)"
ON = "on (namespace, run)"
UNDER_WAY = "starting|training|waiting"
IN_CLUSTER = 'namespace!="",'  # elsewhere a driver may go as it likes
ENDED = "stopped|done|failed|cancelled"
TRAINING = f'max {BY} (armillary_run_state{{state="training"}}) == 1'


def last(states: str, where: str = "") -> str:
    """When a driver last said that its run is in one of these states; nothing after half an hour. A run's pods follow
    each other, and what one said before it went is not what holds. where: labels of runs that count."""
    found = f'armillary_run_state{{{where}state=~"{states}"}} == 1'
    return f"max {BY} (max_over_time(timestamp({found})[30m:15s]))"


@dataclass(frozen=True)
class Alert:
    """expr: PromQL; wait: how long it has to hold; severity: "critical" wakes somebody, "warning" waits for the
    morning; summary: for people, with {{ $labels.run }} and the like."""

    name: str
    expr: str
    wait: str
    severity: str
    summary: str


# Figures that several expressions need, once a run.
RECORDS = {
    "run:armillary_tokens:rate5m": f"sum {BY} (rate(armillary_train_tokens_total[5m]))",
}

ALERTS = (
    Alert(
        "ArmillaryStalled",
        f"sum {BY} (increase(armillary_train_steps_total[10m])) == 0 and {ON} {TRAINING}",
        "2m", "critical", "{{ $labels.run }} has made no step for ten minutes",
    ),
    Alert(
        "ArmillaryRankSilent",
        f"time() - min {BY} (armillary_train_progress_timestamp_seconds "
        'unless on (namespace, run, rank) armillary_train_phase{phase="start"} == 1) > 900',
        "1m", "critical", "a rank of {{ $labels.run }} has not moved for a quarter of an hour",
    ),
    Alert(
        "ArmillaryRankUnscraped",
        f"(count {BY} (armillary_train_steps_total) or 0 * max {BY} (armillary_run_ranks)) "
        f"< {ON} max {BY} (armillary_run_ranks) and {ON} {TRAINING}",
        "5m", "warning", "{{ $value }} ranks of {{ $labels.run }} answer, there should be more",
    ),
    Alert(
        "ArmillaryGone",
        f"({last(UNDER_WAY, IN_CLUSTER)} unless {ON} ({last(ENDED)} > {ON} {last(UNDER_WAY)})) "
        f"unless {ON} max {BY} (armillary_run_step)",
        "5m", "critical", "{{ $labels.run }} was under way, and tells nothing any more",
    ),
    Alert(
        "ArmillaryFailed",
        f"{last('failed')} unless {ON} ({last(f'{UNDER_WAY}|stopped|done')} > {ON} {last('failed')})",
        "1m", "critical", "{{ $labels.run }} has failed",
    ),
    Alert(
        "ArmillaryNonFinite",
        f"max {BY} (increase(armillary_run_nonfinite_steps_total[15m])) > 0",
        "0m", "critical", "a loss or gradient norm of {{ $labels.run }} was not finite",
    ),
    Alert(
        "ArmillarySpikes",
        f"max {BY} (increase(armillary_run_spike_steps_total[1h])) > 3",
        "0m", "warning", "{{ $labels.run }} had {{ $value }} spikes within an hour",
    ),
    Alert(
        "ArmillaryRestartLoop",
        f"max {BY} (increase(armillary_run_restarts_total[1h])) >= 3",
        "0m", "critical", "{{ $labels.run }} was started again three times within an hour",
    ),
    Alert(
        "ArmillaryWaiting",
        f'max {BY} (armillary_run_state{{state="waiting"}}) == 1',
        "2m", "critical", "{{ $labels.run }} waits for machines",
    ),
    Alert(
        "ArmillaryFewerRanks",
        f"max {BY} (armillary_run_ranks) < {ON} max {BY} (armillary_run_ranks_planned) and {ON} {TRAINING}",
        "30m", "warning", "{{ $labels.run }} has trained on {{ $value }} ranks for half an hour, fewer than planned",
    ),
    Alert(
        "ArmillarySlower",
        "run:armillary_tokens:rate5m < 0.7 * quantile_over_time(0.5, run:armillary_tokens:rate5m[6h]) "
        f"and {ON} {TRAINING}",
        "15m", "warning", "tokens/s of {{ $labels.run }} is 30 % below its median of six hours",
    ),
    Alert(
        "ArmillaryStraggler",
        f"armillary_train_probe_seconds / {ON} group_left "
        f"quantile {BY} (0.5, armillary_train_probe_seconds) > 1.5",
        "10m", "warning", "rank {{ $labels.rank }} of {{ $labels.run }} computes half as slow again as the median",
    ),
    Alert(
        "ArmillaryDataBound",
        f"avg {BY} (rate(armillary_train_data_wait_seconds_total[10m])) > 0.1",
        "10m", "warning", "{{ $labels.run }} waits for data more than a tenth of its time",
    ),
    Alert(
        "ArmillaryCheckpointStale",
        f"time() - max {BY} (armillary_run_checkpoint_last_success_timestamp_seconds) "
        f"- {ON} 2 * max {BY} (armillary_train_checkpoint_interval_seconds) > 60 "
        f"and {ON} time() - max {BY} (armillary_run_launch_timestamp_seconds) "
        f"- {ON} 2 * max {BY} (armillary_train_checkpoint_interval_seconds) > 60",
        "5m", "critical", "{{ $labels.run }} has saved no checkpoint for more than two intervals",
    ),
    Alert(
        "ArmillaryCheckpointFailing",
        f'sum {BY} (increase(armillary_run_verdicts_total{{kind=~"full storage|failed save"}}[30m])) > 0',
        "0m", "warning", "a checkpoint of {{ $labels.run }} could not be saved",
    ),
    Alert(
        "ArmillaryGpuFault",  # 13, 31, 43 and 45 are faults of programs; the metric stays as it was after a fault
        "max by (Hostname, gpu) (changes(DCGM_FI_DEV_XID_ERRORS[15m])) > 0 "
        "and on (Hostname, gpu) max by (Hostname, gpu) (DCGM_FI_DEV_XID_ERRORS != 13 != 31 != 43 != 45) > 0",
        "0m", "critical", "GPU {{ $labels.gpu }} of {{ $labels.Hostname }} reports a fault",
    ),
)  # fmt: skip


def groups(pace: float = 1.0) -> list[dict]:
    """Rule groups as Prometheus reads them. pace: what all times are multiplied with, so that a test need not wait."""
    recorded = [{"record": name, "expr": paced(expr, pace)} for name, expr in RECORDS.items()]
    alerts = [
        {
            "alert": alert.name,
            "expr": paced(alert.expr, pace),
            "for": paced(f"[{alert.wait}]", pace)[1:-1],
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "runbook": RUNBOOK + alert.name.lower()},
        }
        for alert in ALERTS
    ]
    return [{"name": "armillary", "rules": recorded + alerts}]


def paced(expr: str, pace: float) -> str:
    """An expression with its windows, as [10m] and [30m:15s], multiplied."""
    if pace == 1.0:
        return expr
    seconds = {"s": 1, "m": 60, "h": 3600}

    def shorter(found: re.Match) -> str:
        return f"{round(int(found[1]) * seconds[found[2]] * pace * 1000)}ms"

    return re.sub(r"\[[\dsmh:]+\]", lambda window: re.sub(r"(\d+)([smh])", shorter, window[0]), expr)


def prometheus_rule() -> dict:
    """For the Prometheus operator."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "armillary", "namespace": "monitoring",
                     "labels": {"app.kubernetes.io/part-of": "armillary"}},
        "spec": {"groups": groups()},
    }  # fmt: skip


def text() -> str:
    """Of k8s/cluster/alerts.yaml."""
    made = "# Made by `python -m armillary.k8s.alerts` from the table there.\n"
    return made + yaml.safe_dump(prometheus_rule(), sort_keys=False, width=1000)


if __name__ == "__main__":
    RULE_FILE.write_text(text())
