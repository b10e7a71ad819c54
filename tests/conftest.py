"""How the tests are spread over the workers of pytest-xdist, and what a run says that it left out."""

from __future__ import annotations

import collections
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CI = os.environ.get("CI") == "true"

# For torch in tests and in what they start. OpenMP's threads wait for each other in busy loops, so where engines or other tests
# need the cores too, small models take ten times as long with two threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts background jobs with Ctrl-C ignored, and their children inherit that. The tests of Ctrl-C need the default.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Files whose tests run one after another in one worker of pytest-xdist.
_SCOPES = {
    # They import vLLM, which takes 5 s of CPU.
    "vllm": (
        *("checkpoint", "dry_load", "int8_on_cpu", "intake", "packing", "partial"),
        *("plan", "residency", "shadow", "shards", "unchanged"),
    ),
    "transformers": ("adapters", "real_history", "trainer_models", "weights"),
    # They fork processes from a server, which imports torch's distributed tensors.
    "forked": ("areal_routes", "broadcast", "interrupt", "joint", "senders", "shared_memory", "torch_group"),
}
# The other files that take longest: one of them that began last would run alone in the end.
_LONG = (
    "group",
    "cli",
    "strange_connections",
    "lost_trainer",
    "supervised",
    "fuzz",
    "forgotten_groups",
    "digest_kernel",
)
SCOPE_OF = {f"tests/unit/test_{name}.py": scope for scope, names in _SCOPES.items() for name in names}
# The tests with real engines, the longest scopes first. Those of a folder share what they start.
_ENGINES = "tests/integration/"
# How many workers run them at a time: two engines of a group take 6 GB, and their start takes both cores.
_MOST_WITH_ENGINES = 2
_LONGEST = ("launcher", "dense", "in_process", "test_moe.py", "test_load_balancing.py")

# Each process of a run collects all tests, and these take seconds of CPU to import.
_LARGE = {"transformers", "vllm"}

_deselected: collections.Counter[str] = collections.Counter()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker one file at a time, or one folder of tests with real engines."""
    from xdist.scheduler import LoadScopeScheduling

    class FileScheduling(LoadScopeScheduling):  # type: ignore[misc, no-any-unimported]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return _engines_of(file) or SCOPE_OF.get(file, file)

        def _assign_work_unit(self, node: Any) -> None:
            """Give the next scope to a worker; end the worker instead if the scope needs engines and two others are left."""
            first_test = next(iter(next(iter(self.workqueue.values()))))
            others = [one for one in self.nodes if one is not node and not one.shutting_down]
            if _engines_of(first_test.partition("::")[0]) and len(others) >= _MOST_WITH_ENGINES:
                node.shutdown()
            else:
                super()._assign_work_unit(node)

    config.option.loadscopereorder = False  # the order is that of pytest_collection_modifyitems
    return FileScheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest scopes; the tests that start real engines come last, because they need both cores."""

    def order(item: pytest.Item) -> tuple[int, int]:
        file = item.nodeid.partition("::")[0]
        if engines := _engines_of(file):
            return 2, _LONGEST.index(engines) if engines in _LONGEST else len(_LONGEST)
        if file in SCOPE_OF:
            return 0, 0
        name = file.removeprefix("tests/unit/test_").removesuffix(".py")
        return 1, _LONG.index(name) if name in _LONG else len(_LONG)

    items.sort(key=order)


def _engines_of(file: str) -> str:
    """Return the folder below that of the tests with real engines, or the file there; empty for other tests."""
    return file.removeprefix(_ENGINES).partition("/")[0] if file.startswith(_ENGINES) else ""


# What a run leaves out


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Fail a test that is skipped in CI, unless it needs a GPU."""
    report = yield
    # pytest-xdist ends the whole run when it cannot encode what a test has logged.
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    if CI and report.skipped and not hasattr(report, "wasxfail") and not item.get_closest_marker("gpu"):
        _fail(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Fail a file that is skipped as a whole in CI, or that imports a large module when it is collected.

    Tests with a real vLLM and with other packages run apart, and import what they need.
    """
    before = _LARGE & sys.modules.keys()
    report = yield
    if CI and report.skipped:
        _fail(report)
    imported = (_LARGE & sys.modules.keys()) - before
    if imported and "unit" in collector.nodeid:
        report.outcome = "failed"
        report.longrepr = f"imports {', '.join(sorted(imported))} when it is collected: use lazily.Lazily"
    return report


def _fail(report: pytest.TestReport | pytest.CollectReport) -> None:
    report.outcome = "failed"
    report.longrepr = f"skipped in CI, where only tests that need a GPU may be: {_reason(report)}"


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        _deselected[item.nodeid.partition("::")[0]] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["deselected"] = dict(_deselected)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker of pytest-xdist left out; each of them collects all tests."""
    for file, count in getattr(node, "workeroutput", {}).get("deselected", {}).items():
        _deselected[file] = max(count, _deselected[file])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say in the last lines how many tests did not run, and why."""
    reasons = collections.Counter(_reason(report) for report in terminalreporter.stats.get("skipped", ()))
    left_out = [f"{_tests(count)}: {reason}" for reason, count in reasons.most_common()]
    if deselected := sum(_deselected.values()):
        options = {"-m": config.option.markexpr, "-k": config.option.keyword, "--deselect": config.option.deselect}
        given = ", ".join(f"{name} {value}" for name, value in options.items() if value)
        left_out.append(f"{_tests(deselected)}: not selected by {given or 'the command line'}")
    left_out += [f"all of {folder}: not named on the command line" for folder in _not_named(config)]
    terminalreporter.section("left out")
    for line in left_out or ["nothing"]:
        terminalreporter.write_line(f"left out: {line}")


def _not_named(config: pytest.Config) -> list[str]:
    """The folders of tests of which nothing was asked for."""
    named = [(config.invocation_params.dir / argument.partition("::")[0]).resolve() for argument in config.args]
    folders = {name: config.rootpath / name for name in config.getini("testpaths")}
    return [
        name
        for name, folder in folders.items()
        if not any(asked in (folder, *folder.parents) or folder in asked.parents for asked in named)
    ]


def _tests(count: int) -> str:
    return "1 test" if count == 1 else f"{count} tests"


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")
