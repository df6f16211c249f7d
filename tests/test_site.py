"""Tests of the documentation site (docs/mkdocs.yml). They are skipped where MkDocs or chromium is not installed."""

import http.server
import os
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import pytest

import uknowpan

ROOT = Path(__file__).parents[1]
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
SEARCH = """
<iframe src="index.html?q=displacement" width="1200" height="800"></iframe>
<script>
setInterval(() => {
  const page = document.querySelector("iframe").contentDocument;
  const links = [...page.querySelectorAll("a.md-search-result__link")].map(link => link.pathname);
  if (links.length) fetch("results?links=" + encodeURIComponent(links.join(" ")));
}, 200);
</script>
"""


class Page(HTMLParser):
    """Links, assets that a browser loads at once, and anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.assets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        self.assets += [given[name] for name in ("src", "href") if name in given and tag != "a"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    mkdocs = shutil.which("mkdocs", path=TOOLS)
    if mkdocs is None:
        pytest.skip("MkDocs is not installed")
    folder = tmp_path_factory.mktemp("site")
    # --quiet would hide the warnings from --strict, too.
    command = [mkdocs, "build", "--strict", "--config-file", ROOT / "docs/mkdocs.yml", "--site-dir", folder]
    paths = os.pathsep.join([str(Path(uknowpan.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_no_dead_link_and_nothing_from_elsewhere(site: Path) -> None:
    """Dead links and foreign assets: a reader without network sees the whole site."""
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 15
    for path, page in pages.items():
        assert not [asset for asset in page.assets if urlparse(asset).netloc], path
        for link in [*page.links, *page.assets]:
            there = urlparse(link)
            if there.scheme or path.name == "404.html":  # that page has absolute links
                continue
            target = (path.parent / unquote(there.path)).resolve() if there.path else path
            assert target.is_file(), (path, link)
            if there.fragment and target in pages:
                assert unquote(there.fragment) in pages[target].anchors, (path, link)
    for sheet in site.rglob("*.css"):
        assert "url(http" not in sheet.read_text() and "@import" not in sheet.read_text(), sheet


def test_the_api_page_shows_every_public_name(site: Path) -> None:
    text = (site / "api.html").read_text()
    for name in uknowpan.__all__:
        assert f'id="uknowpan.{name}"' in text, name


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed to search in the site")
def test_search_in_a_browser_without_network(site: Path, tmp_path: Path) -> None:
    """Search that needs another server, or finds nothing."""
    (site / "search_test.html").write_text(SEARCH)
    links: list[str] = []
    found = threading.Event()

    class Server(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(site))

        def do_GET(self) -> None:
            if self.path.startswith("/results"):
                links.extend(parse_qs(urlparse(self.path).query)["links"][0].split())
                found.set()
            super().do_GET()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever).start()
        here = f"http://127.0.0.1:{server.server_port}/search_test.html"
        offline = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        browser = subprocess.Popen(
            [CHROMIUM, *FLAGS, offline, f"--user-data-dir={tmp_path}", here], stderr=subprocess.DEVNULL
        )
        try:
            assert found.wait(60)
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
    assert any(link in ("/how-to.html", "/how-it-works.html") for link in links), links
