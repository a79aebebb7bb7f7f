"""What clients come with, each against a service that `s2t up` has started: the pages' commands as
they stand, Prometheus with our settings and the dashboard's queries, and a browser."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from services.launch.cluster_files import CLUSTER_FILES
from tests.helpers.chromium import chromium, needs_chromium, new_page
from tests.helpers.http_page import (
    COMMANDS,
    HTTP,
    SNIPPETS,
    answers_of_buf,
    buf_command,
    check_curl,
    curl_commands,
    needs_buf,
    needs_harness,
    share_right,
)

pytestmark = [pytest.mark.service, pytest.mark.faults, pytest.mark.usefixtures("up")]
MONITORING = CLUSTER_FILES / "k8s/components/monitoring"
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="no prometheus here: apt-get install prometheus"
)


@pytest.mark.parametrize("command", curl_commands(), ids=["models", "chat", "stream"])
def test_curl(command: str) -> None:
    check_curl(command)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["openai", "client", "errors"])
def test_python(snippet: str, capsys: pytest.CaptureFixture[str]) -> None:
    """OpenAI's client and ours."""
    exec(compile(snippet, "README.md", "exec"), {})
    assert "Mia buys 4 and 15" in capsys.readouterr().out


@needs_buf
@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
def test_buf(method: str) -> None:
    messages = answers_of_buf(buf_command(method))
    assert messages[-1]["answer"]["usage"]["completionTokens"] == 8


@needs_harness
def test_lm_eval(tmp_path: Path) -> None:
    [command] = [c for c in COMMANDS if "tokenizer_backend=None" in c]
    assert share_right(command, tmp_path) >= 0.75


# -- Prometheus -----------------------------------------------------------------------------------


@needs_prometheus
def test_prometheus_and_the_dashboard(tmp_path: Path) -> None:
    """With the file we ship, but for the interval: all roles are up, and no panel is empty but the
    one about what is not there yet."""
    with prometheus(tmp_path) as url:
        deadline = time.monotonic() + 60
        while len(values(url, "up == 1")) < 3 and time.monotonic() < deadline:
            time.sleep(0.5)
        for command in curl_commands():
            check_curl(command)
        time.sleep(5)  # a rate needs two scrapes
        empty = [title for title, query in dashboard_queries() if not values(url, query)]
        roles = {found["metric"]["role"] for found in values(url, "s2t_build_info")}
        [asked] = values(url, 'sum(s2t_requests_total{status="OK"})')
    assert roles == {"gateway", "proposer", "selector"}
    assert float(asked["value"][1]) >= 2
    assert empty == ["Age of the live local selector"], "no version is live yet"


def dashboard_queries() -> list[tuple[str, str]]:
    content = json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))
    found = []
    for panel in content["panels"]:
        for target in panel.get("targets", ()):
            found.append((panel["title"], target["expr"].replace("$__rate_interval", "1m")))
    return found


@contextmanager
def prometheus(folder: Path) -> Iterator[str]:
    """Its URL."""
    text = (MONITORING / "prometheus.yml").read_text(encoding="utf-8")
    assert "scrape_interval: 15s" in text
    (folder / "prometheus.yml").write_text(text.replace("15s", "1s"))
    shutil.copy(MONITORING / "rules.yaml", folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = (
        "config.file=prometheus.yml",
        "storage.tsdb.path=data",
        f"web.listen-address={address}",
    )
    process = subprocess.Popen(
        ["prometheus", *(f"--{flag}" for flag in flags)],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(20)


def values(url: str, query: str) -> list[dict[str, Any]]:
    """What a query gives; nothing while Prometheus starts."""
    try:
        with urlopen(f"{url}/api/v1/query?{urlencode({'query': query})}") as reply:
            found = json.loads(reply.read())
    except URLError as error:
        if isinstance(error.reason, ConnectionRefusedError):
            return []
        raise
    assert found["status"] == "success", query
    result: list[dict[str, Any]] = found["data"]["result"]
    return result


# -- a browser ------------------------------------------------------------------------------------


@needs_chromium
def test_a_browser() -> None:
    """The playground's own example, in both modes."""
    with chromium() as browser, new_page(browser) as page:
        page.set_default_timeout(60_000)
        page.goto(f"http://{HTTP}/")
        page.click("#example")
        page.click("#go")
        page.locator("article[aria-busy=false]").nth(1).wait_for()
        slm, s2t = page.locator("article").all()
        assert " coins" in page.input_value("#prompt")
        assert slm.locator(".text").inner_text() and s2t.locator(".text").inner_text()
        token = s2t.locator(".token").first
        token.focus()
        assert page.locator("#tip tbody tr").count() == 8
