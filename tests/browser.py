"""A real headless browser, for pages that must be readable at the width of a phone and of a desk."""

import re
import shutil
import subprocess
from pathlib import Path

PHONE, DESK = 390, 1280
_MEASURE = """<body><output>none</output><iframe src="{page}" width="{width}" height="800" style="border:0"></iframe>
<script>
addEventListener("load", () => {{
  const inside = document.querySelector("iframe").contentDocument.documentElement;
  document.querySelector("output").textContent = "wide " + inside.scrollWidth;
}});
</script></body>"""


def find_browser() -> str | None:
    """Path of a Chromium, if one is installed."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


def width_in_browser(page: Path, width: int, scratch: Path) -> int:
    """Pixels that a page takes in a frame of `width`; AssertionError with what the console said, if anything."""
    browser, frame = find_browser(), scratch / f"frame_{width}.html"
    assert browser is not None
    frame.write_text(_MEASURE.format(page=page.resolve().as_uri(), width=width))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--allow-file-access-from-files", "--enable-logging=stderr", "--virtual-time-budget=5000",
             f"--user-data-dir={scratch / 'profile'}", "--window-size=1600,1000", "--dump-dom"]  # fmt: skip
    command = [browser, *flags, frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not said, said
    found = re.search(r"<output>wide (\d+)</output>", done.stdout)
    assert found, done.stdout[-500:]
    return int(found[1])
