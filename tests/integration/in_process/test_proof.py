"""The loader's proof, on real vLLM in this test's own process: wrong reloads are found and named, right ones pass."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
from warm_python import START, run

from areal_vllm_ext.demo.model import make_model

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

EXPERTS = "model.layers.0.mlp.experts.routed_experts.w13_weight"

BROKEN = {
    "none": "",
    "experts": """
from areal_vllm_ext.worker import hooks
hooks.WORKER_PATCHES = tuple(one for one in hooks.WORKER_PATCHES if one is not hooks.repack_cpu_experts_on_reload)
""",
    "tied": """
from areal_vllm_ext.worker.load import loader
loader.repack_tied_layers = lambda model: None
""",
}

# As where there is no room for a shadow: the commit reloads.
RELOAD = """
from areal_vllm_ext.worker.load import shadow
shadow.obstacle = lambda *_: "switched off"
"""

UPDATE = (
    RELOAD
    + START
    + """
from transformers import AutoModelForCausalLM
from areal_vllm_ext import EngineGroup
from areal_vllm_ext.worker.load import proof

model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
facts = {"built": 0}
fresh_model = proof.fresh_model

def counted(*arguments):
    facts["built"] += 1
    return fresh_model(*arguments)

proof.fresh_model = counted
prompt = [10, 20, 30]
registers = len(llm.llm_engine.vllm_config.compilation_config.static_forward_context)
with EngineGroup.connect() as group:
    group.wait_ready(engines=1, timeout=30)
    try:
        for version in (1, 2):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
            with group.update(version, timeout=60) as update:
                update.send(model)
        facts["verified"] = group.verify().equal
    except Exception as error:
        facts["error"] = f"{type(error).__name__}: {error}"
    (state,) = group.status()
    facts |= {"phase": state.update_phase, "state": state.generation, "version": state.version, "unproven": state.unproven}
facts["registers"] = len(llm.llm_engine.vllm_config.compilation_config.static_forward_context) == registers
if state.generation == "running":
    options = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    said = llm.generate(TokensPrompt(prompt_token_ids=prompt), options, use_tqdm=False)[0].outputs[0].token_ids
    oracle = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt):].tolist()
    facts["exact"] = list(said) == oracle
print(json.dumps(facts))
"""
)


@pytest.mark.parametrize(
    ("moe", "broken", "named"),
    [(True, "experts", re.escape(EXPERTS)), (False, "tied", r"lm_head \(packed\)")],
)
def test_a_reload_that_is_wrong_taints_the_engine_and_names_the_layers(
    tmp_path: Path, moe: bool, broken: str, named: str
) -> None:
    make_model(tmp_path, moe=moe)
    done = run(BROKEN[broken] + UPDATE, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert re.search(rf"WeightsTainted: .*ProofFailed: \d+ tensors are not what a fresh load .*{named}", facts["error"])
    assert (facts["phase"], facts["state"], facts["version"]) == ("tainted", "paused", "default")


@pytest.mark.parametrize("moe", [False, True])
def test_a_right_reload_is_proven_once_and_serves_exact_tokens(tmp_path: Path, moe: bool) -> None:
    make_model(tmp_path, moe=moe)
    done = run(BROKEN["none"] + UPDATE, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts == {
        "built": 1,
        "verified": True,
        "phase": "idle",
        "state": "running",
        "version": 2,
        "unproven": "",
        "registers": True,
        "exact": True,
    }
