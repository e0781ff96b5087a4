"""The last table of `make test-suites`."""

import re
from collections import Counter

ROWS = {
    r"suite_timm.py": "timm's own tests",
    r"suite_transformers.py": "transformers' own tests",
    r"in_kernels": "restated, kernels interpreted",
    r"-timm ": "restated, timm",
    r"-torchvision ": "restated, torchvision",
    r"-hf ": "restated, transformers",
}


def pytest_terminal_summary(terminalreporter):
    rows = {row: Counter() for row in ROWS.values()}
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            row = next((row for pattern, row in ROWS.items() if re.search(pattern, report.nodeid)), None)
            if row is not None and "test_sources" not in report.nodeid:
                listed = outcome == "skipped" and "exception: " in str(report.longrepr)
                rows[row]["exception" if listed else outcome] += 1
    if not any(rows.values()):
        return
    terminalreporter.section("the libraries' tests")
    write = terminalreporter.write_line
    write(f"{'':<32}{'pass untouched':>15}{'accelerated':>13}{'exceptions':>12}{'not applicable':>16}")
    for row, n in rows.items():
        untouched = n["passed"] + n["failed"] + n["exception"]
        write(f"{row:<32}{untouched:>15}{n['passed']:>13}{n['exception']:>12}{n['skipped']:>16}")
