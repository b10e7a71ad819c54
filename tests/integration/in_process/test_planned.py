"""Shadows and load plans on real vLLM, in this test's own process: the first update is loaded beside generation. Weights that
lie as they were loaded are copied from then on, those of linear layers packed before the commit, those of experts loaded again.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file
from warm_python import START, run

from areal_vllm_ext.demo.model import make_model

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

# As on GPUs: vLLM for CPU would pack the weights, and has no setting against it.
UNPACKED = """
import torch
from vllm.model_executor.layers import utils

def dispatch(layer, remove_weight):
    layer.cpu_linear = torch.nn.functional.linear

utils.dispatch_cpu_unquantized_gemm = dispatch
"""

UPDATES = (
    START
    + """
import time
from transformers import AutoModelForCausalLM
from areal_vllm_ext import EngineGroup
from areal_vllm_ext.worker.load import loader

model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
reload_weights, reloads = worker.reload_weights, []
worker.reload_weights = lambda **options: (reloads.append(1), reload_weights(**options))
build, shadows = loader.build, []
loader.build = lambda *arguments: (shadows.append(1), build(*arguments))[1]
prompt = [10, 20, 30]
facts = {"exact": [], "commit_ms": []}

def exact():
    options = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    said = llm.generate(TokensPrompt(prompt_token_ids=prompt), options, use_tqdm=False)[0].outputs[0].token_ids
    return list(said) == model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, 3:].tolist()

with EngineGroup.connect() as group:
    group.wait_ready(engines=1, timeout=30)
    for version in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        with group.update(version, timeout=60) as update:
            update.send(model)
        facts["exact"].append(exact())
        facts["commit_ms"].append(round(update.result.commit_ms, 1))
    time.sleep(1)  # after a commit, workers look at what they have
    with torch.no_grad():
        model.model.norm.weight.mul_(torch.linspace(-2, 2, model.config.hidden_size))
    with group.update("norm", timeout=60) as update:
        update.send(model)
    facts["kept"] = update.result.kept
    facts["exact"].append(exact())
    facts["verified"] = group.verify().equal
print(json.dumps(facts | {"reloads": len(reloads), "shadows": len(shadows)}))
"""
)


@pytest.mark.parametrize(
    ("tied", "moe", "prepare", "shadows"),
    [
        (False, False, UNPACKED, 1),
        (True, False, "", 1),
        (True, True, UNPACKED, 2),  # they prove the tape of the load
    ],
    ids=["untied", "tied, packed linears", "packed experts"],
)
def test_updates_are_copied_where_weights_lie_as_they_were_loaded(
    tmp_path: Path, tied: bool, moe: bool, prepare: str, shadows: int
) -> None:
    make_model(tmp_path, moe=moe, tie_word_embeddings=tied)
    done = run(prepare + UPDATES, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["exact"] == [True] * 5, facts
    assert facts["verified"]
    tensors = len(load_file(tmp_path / "model.safetensors"))
    # Of what is packed nobody can see later whether it still is what it was.
    assert facts["kept"] == (tensors - 1 if prepare and not moe else 0)
    assert (facts["shadows"], facts["reloads"]) == (shadows, 0), done.stderr[-3000:]
