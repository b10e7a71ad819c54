"""An engine that starts late, and one that was killed, serve what a peer serves: real engines, each in a process of its own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from warm_python import run

from areal_vllm_ext.demo.model import make_model

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

BACK_SECONDS = 10.0

# Each engine has a process of its own, forked before anything has started a thread. It waits until it is wanted.
RETURN = """
import json, os, signal, sys, time, traceback
import torch
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

folder, prompt = sys.argv[1], [10, 20, 30]

class Process:
    def __init__(self, replica):
        wanted, self.want = os.pipe()
        out, says = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(says)
            self.out = os.fdopen(out)
            return
        try:
            os.read(wanted, 1)
            self.serve(replica, os.fdopen(says, "w"))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def serve(self, replica, out):
        os.environ["AREAL_VLLM_REPLICA"] = replica
        llm = LLM(folder, enforce_eager=True, max_model_len=512, dtype="float32", kv_cache_memory_bytes=1 << 26,
                  worker_extension_cls="areal_vllm_ext.worker.WorkerExtension")
        print("up", file=out, flush=True)
        if replica == "late":  # its first request waits until it may serve
            options = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
            answer = llm.generate(TokensPrompt(prompt_token_ids=prompt), options, use_tqdm=False)[0].outputs[0]
            print(json.dumps(list(answer.token_ids)), file=out, flush=True)
        time.sleep(600)

    def start(self):
        os.write(self.want, b"x")
        assert self.out.readline() == "up\\n"

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

stays, *late = processes = [Process(name) for name in ("stays", "late", "late")]
try:
    stays.start()
    from transformers import AutoModelForCausalLM
    from areal_vllm_ext import EngineGroup

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt):].tolist()
    with EngineGroup.connect() as group:
        group.wait_ready(engines=1, timeout=30)
        group.update_weights(model, version=7, timeout=30)

    facts = {"tokens": [], "seconds": [], "loaded": [], "versions": []}
    for process in late:
        process.start()
        began = time.monotonic()
        facts["tokens"].append(json.loads(process.out.readline()) == expected)
        facts["seconds"].append(time.monotonic() - began)
        with EngineGroup.connect() as group:
            states = {state.replica: state for state in group.status()}
            facts["versions"].append([states[name].version for name in ("stays", "late")])
            facts["loaded"].append(states["late"].loaded)
            facts["equal"] = group.verify(timeout=30).equal
        process.kill()
finally:
    for process in processes:
        try:
            process.kill()
        except OSError:
            pass
print(json.dumps(facts), flush=True)
"""


def test_an_engine_serves_what_a_peer_serves_without_a_trainer(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    done = run(RETURN, tmp_path / "model")
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["tokens"] == [True, True]
    assert facts["versions"] == [[7, 7], [7, 7]]
    assert all(loaded.startswith("peer: DP rank 0 of replica stays") for loaded in facts["loaded"])
    assert facts["equal"]
    assert max(facts["seconds"]) < BACK_SECONDS
