"""A real browser without a window, for pages that people open, and the mark of tests that need one."""

import json
import re
import shutil
import subprocess

import pytest


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium, chromium-browser, google-chrome or chrome here"
)

_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


def opened(page, folder, *arguments):
    """Return the page's text once opened, and the console's lines; no name resolves to an address."""
    result = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--disable-background-networking", "--disable-extensions"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--virtual-time-budget=2000"),
            *(f"--user-data-dir={folder / 'profile'}", *arguments, "--dump-dom", page.resolve().as_uri()),
        ],
        capture_output=True,
        timeout=120,
        check=True,
    )
    said = [line for line in result.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line]
    return result.stdout.decode(), said


def asked(page, folder, script):
    """What a script finds in a copy of the page that lets it run; `script` is the body of an asynchronous function."""
    text = _POLICY.sub("", page.read_text(encoding="utf-8"))
    code = f"(async () => {{ {script} }})().then(found => document.title = 'found:' + JSON.stringify(found));"
    copy = folder / "asked.html"
    copy.write_text(text.replace("</body>", f"<script>{code}</script></body>"), encoding="utf-8")
    dom, _ = opened(copy, folder)
    found = re.search(r"<title>found:(.*?)</title>", dom, re.DOTALL)
    return json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
