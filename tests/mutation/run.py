"""Plant one fault after another in a copy of the repository, and see whether the tests notice: `make mutate`.

    python -m tests.mutation.run                        # all of mutations.toml, going on where an earlier call ended
    python -m tests.mutation.run --share 2/4            # the second quarter of it
    python -m tests.mutation.run --only eval/suites     # those whose file or text holds this

Tests run unchanged first: a test that fails anyway notices nothing. Verdicts are kept under `digest` in the results,
and hold until the mutated file or the tests change. Exit code 1 if a fault survived its tests.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.mutation.listing import LIST, ROOT, Mutation, faults, read_list

CAUGHT, SURVIVED, UNTRIED = "caught", "SURVIVED", "not run"
_OURS = ("moe", "trainer", "eval", "benchmarks", "tests")
_HEAVY = ("torch", "torchvision", "matplotlib.figure", "deepspeed", "scipy.linalg", "pytest")  # loaded once for all


def copy_tree(source: Path, target: Path) -> Path:
    """The files that belong to the repository, changed ones as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=source,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)
    return target


def _pytest(tree: Path, tests: Sequence[str], output: Path) -> None:
    """In a process of its own: run these tests of `tree`, and exit as pytest does."""
    os.setsid()  # so that what the tests start can be ended with them
    with output.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    # Nothing of the repository that the program itself has loaded, and no bytecode files: two mutations of one second
    # and one length would share them.
    for name in [name for name in sys.modules if name.partition(".")[0] in _OURS]:
        del sys.modules[name]
    os.chdir(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", str(ROOT)))]
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree), "PYTHONWARNINGS": ""}
    import pytest

    fast = [] if all("::" in test for test in tests) else ["-m", "not slow"]  # a slow test must be named
    code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *fast, *tests])
    sys.stdout.flush()
    os._exit(code)


def run_tests(tree: Path, tests: Sequence[str], seconds: float) -> tuple[str, str]:
    """CAUGHT if a test fails or they do not end in time, else SURVIVED, or UNTRIED if all were skipped; and the end."""
    output = tree.with_name(f"{tree.name}.out")
    process = multiprocessing.get_context("forkserver").Process(target=_pytest, args=(tree, tests, output))
    process.start()
    process.join(seconds)
    ended, code = process.exitcode is not None, process.exitcode
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    said = output.read_text() if output.is_file() else ""
    last = "\n".join(said.splitlines()[-5:])
    if not ended:
        return CAUGHT, f"not ended after {seconds:.0f} s"
    if code == 0:
        return (SURVIVED if re.search(r"\d+ passed", last) else UNTRIED), last
    return CAUGHT, last


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Verdicts by digest; a line that a kill cut off is passed over."""
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["digest"]: row for row in rows}


def chosen(mutations: Sequence[Mutation], only: str, share: str) -> list[Mutation]:
    """Those that hold the text `only`, of them the n-th of m parts for a share of n/m."""
    part, _, parts = share.partition("/")
    kept = [item for item in mutations if only in f"{item.file}\n{item.old}\n{item.new}\n{' '.join(item.tests)}"]
    return kept[int(part) - 1 :: int(parts)]


def check_unchanged(tree: Path, mutations: Sequence[Mutation], seconds: float) -> None:
    """End with a sentence if a test fails without any fault."""
    tests = sorted({test for item in mutations for test in item.tests})
    for part in ([test for test in tests if "::" in test], [test for test in tests if "::" not in test]):
        verdict, last = run_tests(tree, part, seconds) if part else (SURVIVED, "")
        if verdict == CAUGHT:
            sys.exit(f"tests fail without a planted fault, mend them first:\n{last}")


def try_all(root: Path, mutations: Sequence[Mutation], results: Path, workers: int, seconds: float) -> None:
    """Try each mutation in a copy of its own, and append its verdict to the results."""
    trees: queue.Queue[Path] = queue.Queue()

    def attempt(item: Mutation) -> dict[str, Any]:
        tree, start = trees.get(), time.monotonic()
        digest, before = item.digest(tree), item.plant(tree)
        try:
            verdict, last = run_tests(tree, item.tests, seconds)
        finally:
            (tree / item.file).write_text(before)
            trees.put(tree)
        spent = round(time.monotonic() - start, 1)
        return {"digest": digest, "verdict": verdict, "seconds": spent, "title": item.title(), "end": last}

    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        for number in range(workers):
            trees.put(copy_tree(root, Path(folder) / str(number)))
        first = trees.get()
        check_unchanged(first, mutations, 20 * seconds)
        trees.put(first)
        with ThreadPoolExecutor(workers) as pool, results.open("a") as file:
            for number, row in enumerate(pool.map(attempt, mutations), 1):
                print(
                    f"{number}/{len(mutations)} {row['verdict']:8s} {row['seconds']:6.1f} s  {row['title']}", flush=True
                )
                file.write(json.dumps(row) + "\n")
                file.flush()


def table(root: Path, mutations: Sequence[Mutation], known: dict[str, dict[str, Any]]) -> tuple[list[str], bool]:
    """Counts per folder and what no test noticed, and whether anything survived."""
    verdicts = {
        item: "equivalent" if item.equivalent else known.get(item.digest(root), {}).get("verdict", UNTRIED)
        for item in mutations
    }
    columns = (CAUGHT, SURVIVED, "equivalent", UNTRIED)
    lines = [f"{'':24s}" + "".join(f"{name:>12s}" for name in columns)]
    folders = sorted({str(Path(item.file).parent) for item in mutations})
    for folder in [*folders, "all"]:
        found = [v for item, v in verdicts.items() if folder in ("all", str(Path(item.file).parent))]
        lines.append(f"{folder:24s}" + "".join(f"{found.count(name):12d}" for name in columns))
    lines += [f"{v}: {item.title()}" for item, v in verdicts.items() if v in (SURVIVED, UNTRIED)]
    return lines, SURVIVED in verdicts.values()


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="tests.mutation.run", description=__doc__.split("\n")[0])
    parser.add_argument("--list", type=Path, default=LIST, help="file of mutations")
    parser.add_argument("--root", type=Path, default=ROOT, help="repository, a git checkout")
    parser.add_argument("--results", type=Path, help="file of verdicts (default runs/mutation.jsonl)")
    parser.add_argument("--only", default="", help="mutations whose file, text or tests hold this")
    parser.add_argument("--share", default="1/1", help="n/m: the n-th of m parts of the list")
    parser.add_argument("--workers", type=int, default=2, help="mutations at once (default %(default)s)")
    parser.add_argument("--preload", default=",".join(_HEAVY), help="modules that no test needs to load again")
    parser.add_argument("--seconds", type=float, default=180, help="time that tests may take (default %(default)s)")
    given = parser.parse_args(argv)
    if not re.fullmatch(r"[1-9]\d*/[1-9]\d*", given.share):
        parser.error(f"--share is {given.share}: use n/m, as 1/4 for the first quarter")
    mutations = chosen(read_list(given.list), given.only, given.share)
    if broken := [fault for item in mutations for fault in faults(item, given.root)]:
        sys.exit("\n".join(broken))
    results = given.results or given.root / "runs" / "mutation.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    known = read_results(results)
    todo = [item for item in mutations if not item.equivalent and item.digest(given.root) not in known]
    if todo:
        os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # of locks that killed tests leave behind
        multiprocessing.get_context("forkserver").set_forkserver_preload([*filter(None, given.preload.split(","))])
        try_all(given.root, todo, results, given.workers, given.seconds)
    lines, survived = table(given.root, mutations, read_results(results))
    print("\n".join(lines))
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main()
