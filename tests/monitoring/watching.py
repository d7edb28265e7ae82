"""Prometheus, Alertmanager, and who is woken by them."""

import http.server
import json
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import yaml

from armillary.k8s.alerts import groups
from tests.conftest import free_port
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
    """Prometheus and Alertmanager on loopback, of the targets in a file."""

    def __init__(self, folder, targets: Path, webhook: str):
        self._processes = []
        ports = self._port, alerts = free_port(), free_port()
        assert len(set(ports)) == 2
        (folder / "rules.yml").write_text(yaml.safe_dump({"groups": groups(PACE)}))
        (folder / "prometheus.yml").write_text(yaml.safe_dump({
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yml"],
            "scrape_configs": [
                {"job_name": "armillary",
                 "file_sd_configs": [{"files": [str(targets)], "refresh_interval": "1s"}]},
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
