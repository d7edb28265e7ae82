"""A live run under the real Prometheus and Alertmanager: what is wrong with it arrives where somebody is woken."""

import contextlib
import os
import signal
import time

import tomli_w

from armillary.launcher import metric_docs
from armillary.launcher.run import Run
from tests.launcher.runs import started, wait_for
from tests.monitoring.tools import tool
from tests.monitoring.watching import Monitoring


def test_a_run_that_stalls_wakes_somebody_within_a_minute(tables, tmp_path, webhook):
    training = {"steps": 1_000_000, "global_batch": 4, "evaluate": False}
    job = tables | {"parallel": {"data": 2}, "checkpoint": {"every": 20, "keep_last": 2}, "training": training}
    (tmp_path / "job.toml").write_text(tomli_w.dumps(job))
    run = Run(tmp_path / "run")
    tool("prometheus")
    process = started(tmp_path, "train", "job.toml", "--run-dir", "run")
    try:
        wait_for(lambda: len(run.curve()) > 10, process)
        with contextlib.closing(Monitoring(tmp_path, run.targets_file, webhook.url)) as monitoring:
            wait_for(lambda: monitoring.number("sum(rate(armillary_train_steps_total[10s]))"), process)
            time.sleep(20)
            assert not webhook.heard, "a healthy run wakes nobody"
            names = {dict(labels)["__name__"] for labels in monitoring.ask('{__name__=~"armillary_.*"}')}
            assert names == metric_docs.names()
            assert monitoring.number("count(armillary_train_steps_total)") == 2
            assert monitoring.number("max(armillary_run_step)") <= run.curve()[-1]["step"]
            places = [dict(labels) for labels in monitoring.ask("armillary_train_steps_total")]
            assert sorted((one["instance"], one["rank"], one["dp"]) for one in places) == [
                ("run/0", "0", "0"), ("run/1", "1", "1"),
            ]  # fmt: skip

            ranks = list(run.events("placed"))[-1]["ranks"]
            os.kill(ranks[1]["pid"], signal.SIGSTOP)
            stopped = time.time()
            wait_for(lambda: webhook.of("firing", "ArmillaryStalled"), process, 60)
            woken = next(at for at, _, name, _ in webhook.heard if name == "ArmillaryStalled")
            print(f"stall to webhook: {woken - stopped:.1f} s")
            (labels,) = webhook.of("firing", "ArmillaryStalled")[:1]
            assert (labels["run"], labels["severity"]) == ("run", "critical")
            os.kill(ranks[1]["pid"], signal.SIGCONT)
            wait_for(lambda: webhook.of("resolved", "ArmillaryStalled"), process, 60)

            os.kill(ranks[0]["pid"], signal.SIGKILL)
            wait_for(lambda: len(list(run.events("placed"))) == 2, process)
            wait_for(lambda: monitoring.number('sum(armillary_train_steps_total{generation="1"})'), process)
            assert monitoring.number("armillary_run_restarts_total") == 1
            assert monitoring.number('armillary_run_verdicts_total{kind="lost process"}') == 1
            assert monitoring.number("resets(armillary_run_launches_total[10m])") == 0
            assert monitoring.number("max(increase(armillary_run_restarts_total[1m]))") > 0
            fallen = monitoring.ask('resets({__name__=~"armillary_.*_total"}[10m]) > 0')
            assert not fallen, "no counter goes back, whatever is started again"
    finally:
        process.terminate()
        process.communicate(timeout=60)
