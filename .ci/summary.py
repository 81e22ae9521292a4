"""Says how many tests ran, and how long each part of the ecosystem took, from the reports that `make test`
leaves in a folder.
"""

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

RESULT = re.compile(r"^test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored", re.MULTILINE)


def rust(report: Path) -> tuple[int, int, int]:
    """Passed, failed and skipped tests of a `cargo test` log."""
    counts = [tuple(map(int, found)) for found in RESULT.findall(report.read_text())]
    passed, failed, skipped = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0, 0)
    return passed, failed, skipped


def python(report: Path) -> tuple[int, int, int]:
    """Passed, failed and skipped tests of a JUnit report by pytest."""
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    counts = [
        [int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")] for suite in suites
    ]
    tests, failures, errors, skipped = (sum(column) for column in zip(*counts, strict=True))
    return tests - failures - errors - skipped, failures + errors, skipped


def ecosystem(report: Path) -> list[str]:
    """A line for each library that was run without PEFT: its version, and the seconds of each part."""
    lines = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        noted = {str(one.get("name")): str(one.get("value")) for one in case.iter("property")}
        if library := noted.pop("ecosystem", None):
            parts = [
                f"{name} {value if value == 'skipped' else f'{float(value):.1f} s'}"
                for name, value in noted.items()
            ]
            lines.append(f"{library}, PEFT absent, {float(case.get('time', '0')):.0f} s: {', '.join(parts)}")
    return sorted(lines)


def main(folder: Path) -> int:
    """Prints what ran of the ecosystem, a line per language and the sum; fails unless both ran tests and all
    of them passed.
    """
    results = {"Rust": rust(folder / "cargo.txt"), "Python": python(folder / "pytest.xml")}
    print(*ecosystem(folder / "pytest.xml"), sep="\n")
    for language, (passed, failed, skipped) in results.items():
        print(f"{language}: {passed} passed, {failed} failed, {skipped} skipped")
    passed, failed, skipped = (sum(column) for column in zip(*results.values(), strict=True))
    print(f"Together: {passed} passed, {failed} failed, {skipped} skipped")
    return int(failed > 0 or any(result[0] == 0 for result in results.values()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
