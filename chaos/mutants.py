"""Prove that the simulation can fail: remove one guard after the other from a copy of the package, and play rounds.

    python -m chaos.mutants [--rounds 6000] [--ignore overrun] [--check]

Each mutant must break a promise within ``--rounds`` rounds. Where random rounds seldom meet its guard, it must fail the test
that ``TESTS`` names; so must each of ``guards.txt``. ``--check`` only says whether each guard is found in the code.
Exits with 1 where a mutant survives.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
DRIVER, TRANSACTION = "client/driver.py", "client/transaction.py"
PARTICIPANT, COORDINATOR = "engine_core/participant.py", "client/coordinator.py"
FOREIGN = "engine_core/foreign_calls.py"
RECOVERY, COMMAND = "control/recovery.py", "control/command.py"
RETURNING, OFFERS = "engine_core/returning.py", "engine_core/offers.py"
DIRECTORY, LEASE = "control/directory.py", "control/lease.py"

# A guard's text is compared with the code token by token, so line breaks and indentation do not matter.
ADVANCE = "return {} if self._awaited else self._advance(timeout) def silent"
FIRST_PAUSE = (
    COORDINATOR,
    ADVANCE,
    'return {} if self._awaited and self.phase != "pause" else self._advance(timeout)\n\n    def silent',
)
FIRST_VOTE = (
    COORDINATOR,
    ADVANCE,
    'return {} if self._awaited and self.phase != "prepare" else self._advance(timeout)\n\n    def silent',
)
COMMIT_ANYWHERE = (PARTICIPANT, 'if self.update_phase != "prepared" or self.generation != "paused":', "if False:")
PAUSE_ANYWHERE = (PARTICIPANT, "if message.update and message.update != prepared:", "if False:")

# By guard, the edits that remove it: file, text, replacement. There are several edits where one guard backs another.
MUTANTS: dict[str, list[tuple[str, str, str]]] = {
    "a lower epoch is refused": [("engine_core/epochs.py", "if epoch < highest:", "if False:")],
    "commit comes after every pause": [FIRST_PAUSE],
    "commit comes after every pause, on either side": [FIRST_PAUSE, COMMIT_ANYWHERE],
    "pause comes after every vote": [FIRST_VOTE, PAUSE_ANYWHERE, COMMIT_ANYWHERE],
    "an engine pauses only for a prepared update": [PAUSE_ANYWHERE],
    "an engine says why it gave an update up": [
        (PARTICIPANT, "return (update == self._given_up and self.error) or problem", "return problem"),
    ],
    "an engine says why it cannot go on with an update": [
        (PARTICIPANT, "return self.update.failure or problem", "return problem"),
    ],
    "an engine in doubt waits": [
        (
            PARTICIPANT,
            'undecided = self.update_phase == "committing" or self.in_doubt',
            'undecided = self.update_phase == "committing"',
        )
    ],
    "an update ends at its deadline": [(PARTICIPANT, "and not undecided and now >= self.update.ends", "and False")],
    "tainted weights are not resumed": [
        (PARTICIPANT, "if self.tainted: return self._refuse(", "if False:\n            return self._refuse(")
    ],
    "every worker votes": [
        (
            "engine_core/in_flight.py",
            "self._finished.get(step, set()) >= self._step_workers.get(step, self._workers)",
            "bool(self._finished.get(step))",
        )
    ],
    "a refused pause ends the update": [
        (
            COORDINATOR,
            'if problem and self.phase in ("begin", "prepare", "pause"):',
            'if problem and self.phase in ("begin", "prepare"):',
        )
    ],
    "an unanswered pause ends the update": [
        (
            COORDINATOR,
            'if self.phase in ("begin", "prepare", "pause"): return self.give_up(f"{name}: {cause}")',
            'if self.phase in ("begin", "prepare"):\n            return self.give_up(f"{name}: {cause}")',
        )
    ],
    "if one has committed, all do": [
        (RECOVERY, 'if status.update_phase == "prepared" and status.update in committed:', "if False:"),
    ],
    "if one is committing, all do": [
        (
            RECOVERY,
            'committed |= {status.update for status in statuses.values() if status.update_phase == "committing"}',
            "",
        )
    ],
    "if none has committed, none does": [
        (RECOVERY, 'elif status.update_phase in ("receiving", "prepared"):', "elif False:")
    ],
    "a successor resumes": [(RECOVERY, 'if name in current and status.generation != "running"', "if False")],
    "a successor resumes no stale engine": [(RECOVERY, "if name in current", "if True")],
    "a healed engine resumes": [(COMMAND, "or bool(self.status.paused_for)", "")],
    "a group goes on without lost engines only if all have agreed": [
        (COMMAND, "raise EnginesMissing(missing) engines", "pass\n                    engines"),
        (COMMAND, "raise EnginesMissing(missing) await asyncio", "return\n            await asyncio"),
    ],
    "an engine that is behind pauses": [(PARTICIPANT, "if committed_epoch > self.committed_epoch:", "if False:")],
    "a joining engine hears of the last update": [(DIRECTORY, "heard >= heard_again or _is_lost", "True or _is_lost")],
    "an engine that is behind pauses within an update, too": [
        (
            PARTICIPANT,
            'if committed_epoch < self.group_epoch or self.update_phase == "committing" or self.in_doubt:',
            'if committed_epoch < self.group_epoch or self.update_phase != "idle":',
        )
    ],
    "no engine that is behind is resumed by a user": [
        (COMMAND, "for name, target in targets.items() if not target.behind}", "for name, target in targets.items()}")
    ],
    "no engine that is behind is resumed after an abort": [
        (COORDINATOR, 'and not (phase == "abort" and self.members[name].behind)', "")
    ],
    "a group does not go on without an engine that may run": [
        (
            TRANSACTION,
            "for name in coordinator.lost if name not in coordinator.committed",
            "for name in coordinator.lost",
        )
    ],
    "a group goes on without a dropped engine only if the directory has lost it, too": [
        (COMMAND, "return not alive and key in self._silent_since_dropped(found)", "return True")
    ],
    "a group goes on without a dropped engine only until that is heard again": [
        (COMMAND, "if heard.get(key, dropped) <= dropped", "")
    ],
    "a group does not go on without an engine that was back": [
        (COMMAND, "self._dropped.pop((target.engine.replica, target.engine.dp_rank), None)", "pass")
    ],
    "time stands still for a directory that is stopped": [
        ("control/awake_clock.py", "min(read - self._read, LONGEST_STEP_SECONDS)", "read - self._read")
    ],
    "an update that is committed does not begin again": [
        (
            PARTICIPANT,
            "if message.update in (self.last_update, self._given_up):",
            "if message.update == self._given_up:",
        )
    ],
    "an engine that has not joined takes part in no update": [
        (PARTICIPANT, "if not self.joined and isinstance(message, Begin | Pause):", "if False:")
    ],
    "recovery waits for engines that are joining": [
        (COMMAND, "if missing and (found.joining or not without_lost):", "if missing and not without_lost:")
    ],
    "a pause that is over its time stands where weights are unfit": [
        (PARTICIPANT, "self.pauses.tick(now, stands=unfit)", "self.pauses.tick(now)")
    ],
    "a tainted engine does not run when no engine is ahead": [
        (
            PARTICIPANT,
            "if pauses.paused_for == STALE and not self.tainted else []",
            "if pauses.paused_for == STALE else []",
        )
    ],
    "a late renewal does not bring a released lease back": [
        (LEASE, "if message.epoch != self.epoch or message.epoch == self._released:", "if message.epoch != self.epoch:")
    ],
    "a user's pause that ended while weights were stale ends with the update": [
        (
            "engine_core/generation.py",
            "CallResume(self._call, lifts or self._hold_ended, asked=lifts)",
            "CallResume(self._call, lifts, asked=lifts)",
        ),
        ("engine_core/generation.py", " or (self._hold_ended and not last.lifts)", ""),
    ],
    "an update's resume leaves an engine asleep": [
        ("engine_core/generation.py", "asked=lifts)", "asked=lifts or self._hold_ended)")
    ],
    "a client that was stopped asks for its lease before it commits": [
        (DRIVER, "return await self._commander.holds_lease(min(max(self._context.left, 0.05), 1.0))", "return True")
    ],
    "the directory recovers": [(DIRECTORY, "return needs_recovery and", "return False and")],
    "other users wait for an update": [("engine_core/status.py", "return Guard(update, ", 'return Guard("", ')],
    "other users resume no stale weights": [
        (FOREIGN, "if self._unfit: self._report", "if False:\n                self._report"),
        ("engine_core/elsewhere.py", "unfit = (p.tainted or p.stale) and", "unfit = False and"),
    ],
    "what is fetched is of the group's last update": [
        (RETURNING, '== (self._epoch, "idle", "awake")', '== (status.committed_epoch, "idle", "awake")'),
        (OFFERS, "p.joined and p.committed_epoch == epoch", "True"),
    ],
    "an engine that has fetched serves only when nothing newer can be committed": [
        (PARTICIPANT, "if not self.stale or not settled or self.update_phase", "if not self.stale or self.update_phase")
    ],
    "what is fetched does not become live within an update": [
        (RETURNING, "if engine is None or not self._may_fetch:", "if engine is None:")
    ],
    "all workers have fetched": [
        (RETURNING, "if self._participant.workers - set(self._fetched):", "if False:"),
        (RETURNING, "if ended.manifests != self._fetched:", "if False:"),
    ],
    "the group's adapters are fetched": [
        (RETURNING, "adapters=manifests_of(self._adapters)", "adapters={}"),
        (RETURNING, "!= wanted for worker in", "!= {} for worker in"),
        (OFFERS, "if message.adapters != manifests_of(self._participant.adapters):", "if False:"),
    ],
    "a stale engine asks for its group's weights": [(RETURNING, "return [AskDirectory(Discover())]", "return []")],
    "unfit base weights are not healed by an adapter": [
        (PARTICIPANT, "self.tainted or self.stale or self.foreign) and not message.units.weights", '"") and True'),
        (PARTICIPANT, "if update.units.weights:", "if True:"),
    ],
    "an engine that lacks an adapter gets it": [
        (TRANSACTION, "changes.bring_to(self._differing, self._sinks.adapters)", "pass"),
    ],
    "an engine that serves an adapter has it": [
        (PARTICIPANT, "update.adapters_after(self.adapters)", "dict(self.adapters)"),
    ],
    "a new lease has a new epoch": [(LEASE, "self.epoch += 1", "self.epoch += 0")],
    "a heartbeat brings the epoch back": [
        (DIRECTORY, "self._leases.epoch = max(self._leases.epoch, message.epoch)", "pass")
    ],
}

# Mutants that random rounds seldom reveal, and the test that does.
TESTS = {
    "a group does not go on without an engine that was back": "test_command.py",
    "every worker votes": "test_participant.py::test_every_worker_must_finish_a_step",
    "an engine pauses only for a prepared update": "test_participant.py::test_a_pause_for_an_update_is_a_second_vote",
    "if none has committed, none does": "test_recovery.py::test_an_update_that_nobody_committed_is_aborted_everywhere",
    "if one has committed, all do": "test_recovery.py::test_an_update_that_one_engine_committed_is_committed_everywhere",
    "if one is committing, all do": (
        "test_recovery.py::test_an_update_that_one_engine_is_switching_to_is_not_aborted_elsewhere"
    ),
    "a group goes on without lost engines only if all have agreed": "test_command.py",
    "a joining engine hears of the last update": (
        "test_directory.py::test_nobody_joins_while_a_client_is_at_work_nor_before_all_have_told_what_it_did"
    ),
    "no engine that is behind is resumed by a user": "test_scenarios.py",
    "a healed engine resumes": "test_command.py",
    "an engine that is behind pauses within an update, too": (
        "test_participant.py::test_a_pause_that_times_out_does_not_set_stale_weights_running"
    ),
    "no engine that is behind is resumed after an abort": (
        "test_coordinator.py::test_an_engine_that_is_behind_runs_only_after_a_commit"
    ),
    "a group does not go on without an engine that may run": "test_scenarios.py",
    "a group goes on without a dropped engine only if the directory has lost it, too": "test_command.py",
    "a group goes on without a dropped engine only until that is heard again": "test_scenarios.py",
    "an engine that has not joined takes part in no update": (
        "test_participant.py::test_an_engine_takes_part_in_nothing_before_it_has_joined"
    ),
    "time stands still for a directory that is stopped": (
        "test_directory.py::test_a_directory_that_was_stopped_settles_before_an_engine_joins"
    ),
    "recovery waits for engines that are joining": "test_command.py",
    "a pause that is over its time stands where weights are unfit": (
        "test_participant.py::test_a_pause_that_times_out_does_not_set_stale_weights_running"
    ),
    "a tainted engine does not run when no engine is ahead": (
        "test_participant.py::test_a_tainted_engine_does_not_run_again_when_no_engine_is_ahead_any_more"
    ),
    "a late renewal does not bring a released lease back": (
        "test_lease.py::test_a_renewal_that_comes_after_the_release_does_not_bring_the_lease_back"
    ),
    "a user's pause that ended while weights were stale ends with the update": (
        "test_participant.py::test_a_users_pause_that_ended_while_the_weights_were_stale_ends_with_the_next_update"
    ),
    "a client that was stopped asks for its lease before it commits": "test_scenarios.py",
    "an engine that has fetched serves only when nothing newer can be committed": "test_scenarios.py",
    "what is fetched does not become live within an update": "test_returning.py::test_an_update_ends_a_fetch",
    "an update's resume leaves an engine asleep": (
        "test_participant.py::test_a_users_pause_that_ended_while_the_weights_were_stale_ends_with_the_next_update"
    ),
    "a heartbeat brings the epoch back": "test_directory.py::test_the_epoch_exceeds_what_the_engines_have_seen",
}
GUARDS = Path(__file__).with_name("guards.txt")


def read_guards() -> None:
    """Add the mutants of ``guards.txt``, each with its test."""
    file = ""
    for block in GUARDS.read_text().split("\n\n"):
        name, *lines = block.strip("\n").split("\n")
        if name.startswith("== "):
            file = name.removeprefix("== ")
        elif not name.startswith("#"):
            test, guard, *added = lines
            replacement = "\n".join(line.removeprefix("+ ") for line in added)
            TESTS[name], MUTANTS[name] = test.strip(), [(file, guard.removeprefix("- "), replacement)]


read_guards()
# Mutants that take many updates, or faults of the swarm.
SWARM = {
    "an engine says why it gave an update up",
    "what is fetched is of the group's last update",
    "all workers have fetched",
    "the group's adapters are fetched",
    "a stale engine asks for its group's weights",
    "an engine that lacks an adapter gets it",
    "an update that is committed does not begin again",
}


def pattern(guard: str) -> re.Pattern[str]:
    """Return the pattern of the guard's tokens, with any white space between them."""
    return re.compile(r"\s*".join(re.escape(token) for token in re.findall(r"\w+|[^\w\s]", guard)))


def mutate(package: Path, edits: list[tuple[str, str, str]]) -> str:
    """Remove a guard from the package; returns the problem, if its text is not there exactly once."""
    for file, guard, replacement in edits:
        source = package / file
        text = source.read_text()
        if (count := len(pattern(guard).findall(text))) != 1:
            return f"{file} has {guard!r} {count} times"
        source.write_text(pattern(guard).sub(lambda _, new=replacement: new, text))
    return ""


def play(name: str, edits: list[tuple[str, str, str]], options: argparse.Namespace) -> tuple[bool, str]:
    """Play rounds with a mutant; returns whether it was found, and how."""
    with tempfile.TemporaryDirectory() as folder:
        for package in ("areal_vllm_ext", "chaos", "harness", "tests"):
            shutil.copytree(ROOT / package, Path(folder, package), ignore=shutil.ignore_patterns("__pycache__"))
        if problem := mutate(Path(folder, "areal_vllm_ext"), edits):
            return False, problem
        if options.check:
            return True, "is there"
        environment = {**os.environ, "PYTHONPATH": folder}
        if test := TESTS.get(name):
            shutil.copy(ROOT / "pyproject.toml", folder)
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/unit/{test}"]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
            return done.returncode == 1 and bool(failed), (failed or ["SURVIVES"])[0][:200]
        which = "--swarm" if name in SWARM else "--simulated"
        command = [sys.executable, "-m", "chaos", which, "--first", "--rounds", options.rounds]
        for kind in options.ignore:
            command += ["--ignore", kind]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return False, "SURVIVES"
    found = [line for line in done.stdout.splitlines() if ", seed " in line]
    # A mutant that does not run at all proves nothing.
    return bool(found), (found or done.stderr.splitlines()[-1:] or ["no output"])[0][:200]


def main() -> int:
    parser = argparse.ArgumentParser(description="Remove one guard after the other, and see the simulation fail.")
    parser.add_argument("--rounds", default="6000", help="at most, for each guard")
    parser.add_argument("--ignore", action="append", default=[], help="a kind of violation that does not count")
    parser.add_argument("--only", default="", help="only guards with this in their name")
    parser.add_argument("--tests", action="store_true", help="only guards that a test shows")
    parser.add_argument("--check", action="store_true", help="only check that each guard is in the code")
    options = parser.parse_args()
    survived = 0
    chosen = {
        name: edits for name, edits in MUTANTS.items() if options.only in name and (name in TESTS or not options.tests)
    }
    for name, edits in chosen.items():
        found, how = play(name, edits, options)
        survived += not found
        print(f"{name:44s} {how}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} were found")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
