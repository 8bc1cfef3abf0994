"""``python -m tests.peers [--torchao FOLDER] [--executorch FOLDER] [--out FILE]``: the peers' tests, run on quant2e.

Nothing is fetched: the folders are checkouts of the peers' repositories. Their tests of the flow are copied, with the
imports of quant2e in place of their own, run, and written down as a page. The exit status is the number of failures
that no difference by design explains (`differences.toml`), at most 100.
"""

from __future__ import annotations

import argparse
import datetime as dt
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from quant2e.files import write_text
from tests.peers.differences import Difference, explained, read
from tests.peers.suites import EXECUTORCH, TORCHAO, Outcome, Suite, check_checkout, copy_suite, run_files

HEAD = """# The peers' own tests, with only the imports changed

torchao's and ExecuTorch's tests of the PT2E flow, run on quant2e by `make peers TORCHAO=folder EXECUTORCH=folder`,
which writes this page. The tests are not part of this repository. What fails, fails for one of the reasons below
(`tests/peers/differences.toml`); a failure that none of them covers makes the target fail.
"""


def revision(peer: str, checkout: Path) -> str:
    """Which version a folder holds, as well as it can be told."""
    found = subprocess.run(
        ["git", "-C", str(checkout), "log", "-1", "--format=%h of %cs"], capture_output=True, text=True, check=False
    )
    commit = found.stdout.strip() if found.returncode == 0 else "a folder without git"
    return f"{peer} {commit} (installed: {metadata.version(peer.lower())})"


def page(
    revisions: Sequence[str],
    outcomes: Sequence[tuple[str, Outcome]],
    found: dict[Difference, list[Outcome]],
    left: Sequence[Outcome],
    today: str,
) -> str:
    """The results as a page. ``outcomes``: each with the name of its peer."""
    files = dict.fromkeys((peer, outcome.file) for peer, outcome in outcomes)
    rows = []
    for peer, file in files:
        kinds = [outcome.kind for owner, outcome in outcomes if (owner, outcome.file) == (peer, file)]
        rows.append(f"| {peer} `{Path(file).name}` | " + " | ".join(str(kinds.count(k)) for k in KINDS) + " |")
    reasons = [
        f"| {difference.what} | {', '.join(_names(failures))} | {difference.why} |"
        for difference, failures in found.items()
    ]
    lines = [
        HEAD,
        f"Run on {today}:\n",
        *(f"- {revision}" for revision in revisions),
        "",
        f"| file | {' | '.join(KINDS)} |\n|---|---|---|---|",
        *rows,
        "",
        "| difference | tests | why |\n|---|---|---|",
        *reasons,
        "",
    ]
    if left:
        lines += ["Failures that nothing explains:\n", *(f"- `{o.test}`: {_first_line(o.message)}" for o in left), ""]
    return "\n".join(lines)


KINDS = ("passed", "failed", "skipped")
SHOWN = 6


def _names(failures: Sequence[Outcome]) -> list[str]:
    """The tests' own names, the first few."""
    names = list(dict.fromkeys(f"`{failure.test.rpartition('::')[2]}`" for failure in failures))
    return names if len(names) <= SHOWN else [*names[:SHOWN], f"{len(names) - SHOWN} more"]


def _first_line(message: str) -> str:
    return (message.strip().splitlines() or [""])[0][:160]


def main() -> int:
    """Run what the user has."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torchao", type=Path, help="a checkout of pytorch/ao")
    parser.add_argument("--executorch", type=Path, help="a checkout of pytorch/executorch")
    parser.add_argument("--out", type=Path, help="where the page is written, as markdown")
    asked = parser.parse_args()
    suites: list[tuple[Suite, Path]] = [(TORCHAO, asked.torchao)] if asked.torchao else []
    suites += [(suite, asked.executorch) for suite in EXECUTORCH if asked.executorch]
    if not suites:
        parser.error("name a checkout: --torchao FOLDER, --executorch FOLDER, or both")
    for suite, checkout in suites:
        check_checkout(suite, checkout)
    outcomes: list[tuple[str, Outcome]] = []
    with tempfile.TemporaryDirectory(prefix="quant2e-peers-") as folder:
        for suite, checkout in suites:
            tests = copy_suite(suite, checkout, Path(folder))
            outcomes += [(suite.peer, o) for o in run_files(tests, Path(folder) / suite.folder, suite.words)]
    found, left = explained([outcome for _, outcome in outcomes], read())
    revisions = dict.fromkeys(revision(suite.peer, checkout) for suite, checkout in suites)
    text = page(list(revisions), outcomes, found, left, dt.datetime.now(dt.UTC).date().isoformat())
    print(text)
    if asked.out is not None:
        write_text(asked.out, text)
    for outcome in left:
        print(f"UNEXPLAINED {outcome.test}: {_first_line(outcome.message)}")
    return min(len(left), 100)


if __name__ == "__main__":
    sys.exit(main())
