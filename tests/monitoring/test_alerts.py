"""Each alert, by Prometheus' own rule tests: it fires on what it is for, and is silent on a healthy run."""

import subprocess

import pytest
import yaml

from armillary.k8s.alerts import ALERTS, groups
from armillary.training.health import KINDS
from tests.monitoring.tools import tool

RUN = {"namespace": "n", "run": "r"}
RANKS = [RUN | {"rank": rank} for rank in "01"]
GPU = {"Hostname": "h", "gpu": "0"}
LONG = 600  # minutes
STATES = ("starting", "training", "waiting", "stopped", "done", "failed")


def of(name: str, labels: dict[str, str], **more: str) -> str:
    return name + "{" + ",".join(f'{key}="{value}"' for key, value in (labels | more).items()) + "}"


def states(**values: str) -> dict[str, str]:
    """Each state's series: 0 throughout unless it is given."""
    return {of("armillary_run_state", RUN, state=state): values.get(state, f"0+0x{LONG}") for state in STATES}


def verdicts(**values: str) -> dict[str, str]:
    return {of("armillary_run_verdicts_total", RUN, kind=kind): values.get(kind.replace(" ", "_"), f"0+0x{LONG}")
            for kind in KINDS}  # fmt: skip


def ranks(name: str, *values: str) -> dict[str, str]:
    """A series of each rank; the last value holds for all that follow."""
    return {of(f"armillary_train_{name}", rank): values[min(number, len(values) - 1)]
            for number, rank in enumerate(RANKS)}  # fmt: skip


def run(name: str, value: str) -> dict[str, str]:
    return {of(f"armillary_run_{name}", RUN): value}


def healthy() -> dict[str, str]:
    """Ten steps a minute for ten hours: a value a minute, as promtool writes them, from second 0 on."""
    zero = f"0+0x{LONG}"
    return (
        states(training=f"1+0x{LONG}") | verdicts()
        | ranks("steps_total", f"0+10x{LONG}") | ranks("tokens_total", f"0+1000x{LONG}")
        | ranks("progress_timestamp_seconds", f"0+60x{LONG}") | ranks("probe_seconds", f"0.01+0x{LONG}")
        | ranks("data_wait_seconds_total", f"0+1x{LONG}") | ranks("checkpoint_interval_seconds", f"600+0x{LONG}")
        | run("step", f"0+10x{LONG}") | run("ranks", f"2+0x{LONG}") | run("ranks_planned", f"2+0x{LONG}")
        | run("restarts_total", zero) | run("nonfinite_steps_total", zero) | run("spike_steps_total", zero)
        | run("checkpoint_last_success_timestamp_seconds", f"0+60x{LONG}") | run("launch_timestamp_seconds", zero)
        | {of("armillary_train_phase", rank, phase="start"): zero for rank in RANKS}
        | {of("DCGM_FI_DEV_XID_ERRORS", GPU): zero}
    )  # fmt: skip


# What is otherwise than in a healthy run, the minute at which the alert is there, and whom it names.
CASES = {
    "ArmillaryStalled": (ranks("steps_total", "0+10x60 600+0x60"), 75, RUN),
    "ArmillaryRankSilent": (ranks("progress_timestamp_seconds", f"0+60x{LONG}", "0+60x60 3600+0x60"), 80, RUN),
    "ArmillaryRankUnscraped": (ranks("steps_total", f"0+10x{LONG}", "0+10x60 stale"), 70, RUN),
    "ArmillaryGone": (states(training="1+0x60 stale") | run("step", "0+10x60 stale"), 80, RUN),
    "ArmillaryFailed": (states(training="1+0x60 0", failed="0+0x60 1 stale"), 64, RUN),
    "ArmillaryNonFinite": (run("nonfinite_steps_total", "0+0x60 1+0x60"), 65, RUN),
    "ArmillarySpikes": (run("spike_steps_total", "0+0x60 5+0x60"), 65, RUN),
    "ArmillaryRestartLoop": (run("restarts_total", "0+0x60 1+0x9 2+0x9 4+0x60"), 100, RUN),
    "ArmillaryWaiting": (states(training="1+0x60 0+0x60", waiting="0+0x60 1+0x60"), 80, RUN),
    "ArmillaryFewerRanks": (run("ranks", "2+0x60 1+0x60"), 100, RUN),
    "ArmillarySlower": (ranks("tokens_total", "0+1000x420 420000+500x60"), 460, RUN),
    "ArmillaryStraggler": (ranks("probe_seconds", f"0.01+0x{LONG}", "0.01+0x60 0.04+0x60"), 80, RANKS[1]),
    "ArmillaryDataBound": (ranks("data_wait_seconds_total", "0+1x60 60+20x60"), 95, RUN),
    "ArmillaryCheckpointStale": (run("checkpoint_last_success_timestamp_seconds", "0+60x60 3600+0x60"), 95, RUN),
    "ArmillaryCheckpointFailing": (verdicts(full_storage="0+0x60 1+0x60"), 65, RUN),
    "ArmillaryGpuFault": ({of("DCGM_FI_DEV_XID_ERRORS", GPU): "0+0x60 79+0x60"}, 65, GPU),
}


@pytest.fixture(scope="module")
def promtool(tmp_path_factory):
    """Checks expectations: (series, minute, alert, whom it names; None: it is silent)."""
    program, folder = tool("promtool"), tmp_path_factory.mktemp("rules")
    made = groups()
    for rule in made[0]["rules"]:
        rule.pop("annotations", None)  # whose values would have to be written down too
    (folder / "rules.yml").write_text(yaml.safe_dump({"groups": made}))

    def check(*expected: tuple) -> None:
        severities = {alert.name: alert.severity for alert in ALERTS}
        tests = [
            {
                "interval": "1m",
                "input_series": [{"series": series, "values": values} for series, values in given.items()],
                "alert_rule_test": [
                    {"eval_time": f"{minute}m", "alertname": name,
                     "exp_alerts": [{"exp_labels": {"severity": severities[name]} | whom}] if whom else []}
                ],
            }
            for given, minute, name, whom in expected
        ]  # fmt: skip
        (folder / "test.yml").write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "tests": tests}))
        command = [program, "test", "rules", "test.yml"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    return check


def test_every_alert_has_a_case():
    assert CASES.keys() == {alert.name for alert in ALERTS}
    assert len(CASES) >= 10


@pytest.mark.parametrize("name", CASES)
def test_fires(promtool, name):
    changed, minute, whom = CASES[name]
    promtool((healthy() | changed, minute, name, whom))


def test_all_are_silent_on_a_healthy_run(promtool):
    promtool(*((healthy(), minute, name, None) for name in CASES for minute in (1, 30, 300, 590)))


def test_all_are_silent_when_a_run_has_ended(promtool):
    """Its driver has said so for as long as a scrape may take (launcher.pod.LINGER_SECONDS)."""
    ended = {series: "0+0x60 stale" if "armillary" in series else values for series, values in healthy().items()}
    ended |= states(training="1+0x59 0 stale", done="0+0x59 1 stale")
    ended |= ranks("progress_timestamp_seconds", "0+60x60 stale")
    ended |= run("checkpoint_last_success_timestamp_seconds", "0+60x60 stale")
    promtool(*((ended, minute, name, None) for name in CASES for minute in (62, 70, 80, 120)))


def test_a_run_that_comes_back_after_a_night_is_not_late_with_its_checkpoint(promtool):
    """Nor is a rank silent that has yet to begin, nor a GPU faulty on which a program failed."""
    back = healthy() | run("checkpoint_last_success_timestamp_seconds", "0+0x119 0+0x8 7620+60x500")
    back |= run("launch_timestamp_seconds", "0+0x119 7200+0x500")
    promtool(*((back, minute, "ArmillaryCheckpointStale", None) for minute in (121, 127, 140)))
    slow = healthy() | ranks("progress_timestamp_seconds", f"0+0x{LONG}")
    slow |= {of("armillary_train_phase", rank, phase="start"): f"1+0x{LONG}" for rank in RANKS}
    promtool((slow, 60, "ArmillaryRankSilent", None))
    promtool((healthy() | {of("DCGM_FI_DEV_XID_ERRORS", GPU): "0+0x60 31+0x60"}, 65, "ArmillaryGpuFault", None))
    once = healthy() | {of("DCGM_FI_DEV_XID_ERRORS", GPU): "0+0x60 79+0x500"}
    promtool((once, 65, "ArmillaryGpuFault", GPU), (once, 200, "ArmillaryGpuFault", None))


def test_a_run_that_begins_or_comes_back_alarms_nobody(promtool):
    """Its ranks are there some time after its driver, and count from 0 again after a restart."""
    fresh = healthy() | states(starting="1+0x4 0+0x600", training="0+0x4 1+0x600")
    fresh |= ranks("steps_total", "_x4 0+10x600") | ranks("progress_timestamp_seconds", "_x4 300+60x600")
    promtool(*((fresh, minute, name, None) for name in CASES for minute in (3, 6, 15)))
    again = healthy() | ranks("steps_total", "0+10x60 0+10x500") | run("restarts_total", "0+0x60 1+0x500")
    promtool(*((again, minute, name, None) for name in CASES for minute in (61, 65, 80)))


def test_no_rank_that_answers_is_too_few_of_them(promtool):
    silent = healthy() | ranks("steps_total", "0+10x60 stale")
    promtool((silent, 70, "ArmillaryRankUnscraped", RUN))
    slow = silent | states(starting=f"1+0x{LONG}", training=f"0+0x{LONG}")
    promtool((slow, 70, "ArmillaryRankUnscraped", None))


def test_what_a_pod_said_before_another_came_does_not_hold(promtool):
    """After a failure the run goes on in a new pod; after the loss of a head it ends there."""

    def of_pod(pod: str, **values: str) -> dict[str, str]:
        return {of("armillary_run_state", RUN, state=state, pod=pod): values.get(state, "_") for state in STATES}

    rest = {series: values for series, values in healthy().items() if "run_state" not in series}
    failed = of_pod("a", training="1+0x60 0 stale", failed="0+0x60 1 stale")
    on = failed | of_pod("b", training="_x64 1+0x500", failed="_x64 0+0x500")
    promtool((rest | failed, 63, "ArmillaryFailed", RUN), (rest | on, 63, "ArmillaryFailed", RUN),
             *((rest | on, minute, "ArmillaryFailed", None) for minute in (66, 70, 85, 100)))  # fmt: skip
    rest |= run("step", "0+10x80 stale")
    lost = of_pod("a", training="1+0x60 stale")
    ended = lost | of_pod("b", training="_x64 1+0x15 0 stale", done="_x64 0+0x15 1 stale")
    promtool(*((rest | ended, minute, "ArmillaryGone", None) for minute in (82, 88, 100)),
             (rest | lost, 88, "ArmillaryGone", RUN))  # fmt: skip


def test_summaries_name_what_the_alert_keeps():
    for alert in ALERTS:
        assert CASES[alert.name][2].keys() >= {word.split()[0] for word in alert.summary.split("$labels.")[1:]}, (
            alert.name
        )
