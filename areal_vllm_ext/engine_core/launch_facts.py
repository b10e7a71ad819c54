"""What only the process that launches EngineCores knows; it travels to them in an environment variable."""

from __future__ import annotations

import json
import os
from typing import NamedTuple

LAUNCH_FACTS_VARIABLE = "_AREAL_VLLM_LAUNCH_FACTS"


class LaunchFacts(NamedTuple):
    """Facts about an EngineCore that the EngineCore itself cannot see."""

    headless: bool = False
    data_parallel_size: int = 1


def leave_launch_facts(facts: LaunchFacts) -> None:
    """Leave ``facts`` for the EngineCore processes and actors that this process starts."""
    os.environ[LAUNCH_FACTS_VARIABLE] = json.dumps(facts._asdict())


def launch_facts() -> LaunchFacts:
    """Return what the launching process left for this one."""
    return LaunchFacts(**json.loads(os.environ.get(LAUNCH_FACTS_VARIABLE, "{}")))
