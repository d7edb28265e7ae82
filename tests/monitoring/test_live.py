"""A live run under the real Prometheus and Alertmanager: what is wrong with it arrives where somebody is woken."""

import contextlib
import http.server
import json
import os
import signal
import subprocess
import threading
import time
import urllib.parse
import urllib.request

import pytest
import tomli_w
import yaml

from armillary.k8s.alerts import groups
from armillary.launcher import metric_docs
from armillary.launcher.run import Run
from tests.conftest import free_port
from tests.launcher.runs import started, wait_for
from tests.monitoring.tools import tool

PACE = 0.02  # ten minutes are twelve seconds


class Webhook:
    """Takes what Alertmanager sends: (when, status, alert's name, labels)."""

    def __init__(self):
        self.heard: list[tuple[float, str, str, dict]] = []
        hook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                hook.heard += [(time.time(), one["status"], one["labels"]["alertname"], one["labels"])
                               for one in body["alerts"]]  # fmt: skip
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def of(self, status: str, name: str) -> list[dict]:
        return [labels for _, was, alert, labels in self.heard if (was, alert) == (status, name)]


class Monitoring:
    """Prometheus and Alertmanager on loopback, of one run's targets."""

    def __init__(self, folder, run: Run, webhook: str):
        self._processes = []
        ports = self._port, alerts = free_port(), free_port()
        assert len(set(ports)) == 2
        (folder / "rules.yml").write_text(yaml.safe_dump({"groups": groups(PACE)}))
        (folder / "prometheus.yml").write_text(yaml.safe_dump({
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yml"],
            "scrape_configs": [
                {"job_name": "armillary",
                 "file_sd_configs": [{"files": [str(run.targets_file)], "refresh_interval": "1s"}]},
            ],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{alerts}"]}]}]},
        }))  # fmt: skip
        (folder / "alertmanager.yml").write_text(yaml.safe_dump({
            "route": {"receiver": "hook", "group_by": ["alertname"], "group_wait": "0s", "group_interval": "1s"},
            "receivers": [{"name": "hook", "webhook_configs": [{"url": webhook}]}],
        }))  # fmt: skip
        self._start(folder, "prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data",
                    f"--web.listen-address=127.0.0.1:{self._port}")  # fmt: skip
        self._start(folder, "prometheus-alertmanager", "--config.file=alertmanager.yml", "--storage.path=alerts",
                    f"--web.listen-address=127.0.0.1:{alerts}", "--cluster.listen-address=")  # fmt: skip

    def _start(self, folder, name: str, *words: str) -> None:
        with open(folder / f"{name}.log", "w") as log:
            self._processes.append(subprocess.Popen([tool(name), *words], cwd=folder, stdout=log, stderr=log))

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
            process.wait(20)

    def ask(self, query: str) -> dict[tuple, float]:
        """Values by their labels."""
        url = f"http://127.0.0.1:{self._port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                found = json.load(reply)["data"]["result"]
        except OSError:  # it has yet to begin
            return {}
        return {tuple(sorted(one["metric"].items())): float(one["value"][1]) for one in found}

    def number(self, query: str) -> float | None:
        """The one value of a query."""
        found = list(self.ask(query).values())
        return found[0] if len(found) == 1 else None


@pytest.fixture
def webhook():
    with contextlib.closing(Webhook()) as webhook:
        yield webhook


def test_a_run_that_stalls_wakes_somebody_within_a_minute(tables, tmp_path, webhook):
    training = {"steps": 1_000_000, "global_batch": 4, "evaluate": False}
    job = tables | {"parallel": {"data": 2}, "checkpoint": {"every": 20, "keep_last": 2}, "training": training}
    (tmp_path / "job.toml").write_text(tomli_w.dumps(job))
    run = Run(tmp_path / "run")
    tool("prometheus")
    process = started(tmp_path, "train", "job.toml", "--run-dir", "run")
    try:
        wait_for(lambda: len(run.curve()) > 10, process)
        with contextlib.closing(Monitoring(tmp_path, run, webhook.url)) as monitoring:
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
