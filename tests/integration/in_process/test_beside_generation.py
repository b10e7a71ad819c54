"""Shadow loads beside generation, on real vLLM in this test's own process: generation keeps its tokens while new weights are
built, a load that fails leaves the old weights serving, and the next update works.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from warm_python import START, run

from areal_vllm_ext.demo.model import make_model

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

BESIDE = (
    START
    + """
import time
from transformers import AutoModelForCausalLM
from areal_vllm_ext import EngineGroup, UpdateAborted
from areal_vllm_ext.observability import fault_points
from areal_vllm_ext.worker.load import loader, shadow

model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
prompt, facts = [10, 20, 30], {"reasons": []}
build, built = loader.build, []

def tokens(count=16):
    options = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    return list(llm.generate(TokensPrompt(prompt_token_ids=prompt), options, use_tqdm=False)[0].outputs[0].token_ids)

def oracle(count=16):
    return model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)[0, len(prompt):].tolist()

def train():
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)

def refused(*arguments):
    began = time.perf_counter()
    one = build(*arguments)
    built.append((began, time.perf_counter()))
    one.free()
    raise shadow.Refused("for a test")

reached = []

def failing(nbytes):
    reached.append(nbytes)
    if len(reached) == 9:  # not yet where the room is compared, and not before the load
        raise MemoryError("for a test")
    return nbytes

def update(version):
    try:
        with group.update(version, timeout=60) as running:
            running.send(model)
    except UpdateAborted as error:
        facts["reasons"].append(str(error))

with EngineGroup.connect() as group:
    group.wait_ready(engines=1, timeout=30)
    old = oracle(400)
    train()
    # Built as a whole while requests are served, then given up.
    loader.build = refused
    ended = threading.Event()
    thread = threading.Thread(target=lambda: (time.sleep(0.3), update("refused"), update("refused"), ended.set()))
    thread.start()
    answers = []
    while not ended.is_set():
        began = time.perf_counter()
        answers.append((began, tokens(400), time.perf_counter()))
    thread.join()
    facts["answers"] = [said == old for _, said, _ in answers]
    facts["beside"] = sum(start < stop and begin < end for start, stop in built for begin, _, end in answers)
    loader.build = build
    with fault_points.injected("shadow", failing):
        update("no memory")
    facts["kept"] = tokens(16) == old[:16]
    update("one")
    facts["exact"] = tokens() == oracle()
    (state,) = group.status()
    facts["status"] = [state.version, state.loaded, state.update_phase]
    facts["default"] = str(torch.get_default_dtype())
print(json.dumps(facts))
"""
)


@pytest.mark.parametrize("moe", [False, True])
def test_generation_keeps_its_tokens_while_new_weights_are_built(tmp_path: Path, moe: bool) -> None:
    make_model(tmp_path, moe=moe)
    done = run(BESIDE, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    reasons = facts.pop("reasons")
    assert len(reasons) == 3
    assert all("nothing was applied: for a test" in reason for reason in reasons[:2])
    assert "the host's memory for the new weights ran out: for a test" in reasons[2]
    assert all(facts.pop("answers"))
    assert facts.pop("beside") > 0, "no request was served while the shadow was built"
    assert facts == {
        "kept": True,
        "exact": True,
        "status": ["one", "shadow", "idle"],
        "default": "torch.float32",
    }
