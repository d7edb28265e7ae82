"""Names that code, alerts, dashboard and documentation agree on."""

import json
import re

import promql_parser
import pytest
import yaml

from armillary.k8s import alerts, dashboard
from armillary.launcher import metric_docs
from tests.conftest import ROOT

NAME = re.compile(r"\b(?:armillary_(?:run|train)_\w+)")
MACROS = {"$__rate_interval": "5m", "$namespace": "n", "$run": "r"}
SHOWN_BY_QUANTILES = {"armillary_train_step_duration_seconds_sum", "armillary_train_step_duration_seconds_count",
                      "armillary_train_checkpoint_duration_seconds_sum",
                      "armillary_train_checkpoint_duration_seconds_count"}  # fmt: skip


def expressions() -> list[str]:
    rules = [alert.expr for alert in alerts.ALERTS] + list(alerts.RECORDS.values())
    return rules + dashboard.queries()


def plain(expression: str) -> str:
    for macro, value in MACROS.items():
        expression = expression.replace(macro, value)
    return expression


@pytest.mark.parametrize("made", [alerts.text, dashboard.text, metric_docs.text])
def test_what_is_generated_is_what_is_there(made):
    module = {alerts.text: alerts.RULE_FILE, dashboard.text: dashboard.FILE, metric_docs.text: metric_docs.FILE}
    assert module[made].read_text() == made(), f"run python -m {made.__module__}"


def test_every_name_in_rules_and_dashboard_is_emitted_and_every_emitted_one_is_shown():
    used = {name for expression in expressions() for name in NAME.findall(expression)}
    assert used - metric_docs.names() == set()
    assert metric_docs.names() - used == SHOWN_BY_QUANTILES


def test_every_expression_is_promql():
    assert len(expressions()) > 60
    for expression in expressions():
        promql_parser.parse(plain(expression))
    with pytest.raises(ValueError, match="unclosed"):
        promql_parser.parse("rate(x[5m]")


def test_the_dashboard_is_grafanas():
    """What it says is what its own model reads back."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    text = dashboard.FILE.read_text()
    again = JSONEncoder(sort_keys=True, indent=1).encode(Dashboard.from_json(json.loads(text))) + "\n"
    assert again == text
    panels = [panel for panel in json.loads(text)["panels"] if panel["type"] != "row"]
    assert len(panels) == sum(map(len, dashboard.ROWS.values()))
    assert {"stat", "timeseries", "heatmap"} == {panel["type"] for panel in panels}


def test_every_alert_has_an_entry_in_the_runbook():
    text = (ROOT / "docs" / "operations.md").read_text()
    for rule in yaml.safe_load(alerts.text())["spec"]["groups"][0]["rules"]:
        if "alert" in rule:
            assert f"### {rule['alert']}\n" in text
            assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
