"""An engine inside the user's own process (``LLM`` without multiprocessing), and engines that must refuse to start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from warm_python import START, run

from areal_vllm_ext.demo.deployment import free_ports
from areal_vllm_ext.demo.model import make_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

UPDATE = (
    START
    + """
from transformers import AutoModelForCausalLM
from areal_vllm_ext import EngineGroup

model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
prompt = [10, 20, 30]

def oracle(tokens=16):
    return model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)[0, len(prompt):].tolist()

def generate(tokens=16, llm=llm):
    options = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return llm.generate(TokensPrompt(prompt_token_ids=prompt), options, use_tqdm=False)[0].outputs[0]

def train():
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)

facts = {"loaded": list(generate().token_ids) == oracle()}
with EngineGroup.connect() as group:
    group.wait_ready(engines=1, timeout=30)
    train()
    core, dropped = llm.llm_engine.engine_core.engine_core, []
    for owner in (core, core.scheduler):
        for name in ("reset_prefix_cache", "reset_encoder_cache", "reset_mm_cache"):
            if original := getattr(owner, name, None):
                def counted(*args, name=name, original=original, **options):
                    dropped.append(name)
                    return original(*args, **options)
                setattr(owner, name, counted)
    with group.update("one", timeout=30) as update:
        update.send(model)
    facts["dropped"] = sorted(set(dropped))
    facts["updated"] = list(generate().token_ids) == oracle()
    # A request in flight: frozen, switched under, and finished with the new weights.
    group.pause("keep")
    thread = threading.Thread(target=lambda: facts.update(output=generate(400)))
    thread.start()
    group.resume()
    while not llm.llm_engine.engine_core.engine_core.scheduler.running:
        pass
    train()
    with group.update("two", timeout=30) as update:
        update.send(model)
    thread.join()
    output = facts.pop("output")
    facts["spans"] = [(span.version if hasattr(span, "version") else str(span)) for span in output.weight_versions]
    facts["versions"] = [state.version for state in group.status()]
    facts["again"] = list(generate().token_ids) == oracle()
    # A pause that aborts ends the request, and with it the user's call.
    thread = threading.Thread(target=lambda: facts.update(aborted=generate(400).finish_reason), daemon=True)
    thread.start()
    while not llm.llm_engine.engine_core.engine_core.scheduler.running:
        pass
    group.pause("abort")
    thread.join(20)
    group.resume()
    # Another engine in this process, which has imported what the first one's digests need.
    second = LLM(folder, **SETTINGS)
    group.wait_ready(engines=2, timeout=30)
    facts["names"] = len({state.replica for state in group.status()})
    train()
    group.update_weights(model, version="three", timeout=60)
    facts["both"] = [state.version for state in group.status()]
    facts["both right"] = [list(generate(llm=one).token_ids) == oracle() for one in (llm, second)]
    facts["equal"] = group.verify().equal
print(json.dumps(facts))
"""
)


def test_engines_in_the_users_process_are_updated_between_their_steps(tmp_path: Path) -> None:
    make_model(tmp_path)
    done = run(UPDATE, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["loaded"]
    assert facts["updated"]
    assert facts["again"]
    assert facts["versions"] == ["two"]
    assert facts.get("aborted") == "abort"
    # Processed inputs do not depend on weights, and vLLM's front end keeps the other half of their cache.
    assert facts["dropped"] == ["reset_encoder_cache", "reset_prefix_cache"]
    assert (facts["names"], facts["both"], facts["both right"], facts["equal"]) == (2, ["three"] * 2, [True] * 2, True)
    assert [text for text in ("one", "two") if any(text in str(span) for span in facts["spans"])] == ["one", "two"]


TORCHRUN = """
import json, os, sys
import torch
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from areal_vllm_ext import EngineGroup

folder = sys.argv[1]
rank = int(os.environ["RANK"])
llm = LLM(folder, enforce_eager=True, max_model_len=512, dtype="float32", tensor_parallel_size=2, seed=0,
          kv_cache_memory_bytes=1 << 26,
          distributed_executor_backend="external_launcher", worker_extension_cls="areal_vllm_ext.worker.WorkerExtension")
prompt = [10, 20, 30]

def generate():
    options = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    return list(llm.generate(TokensPrompt(prompt_token_ids=prompt), options, use_tqdm=False)[0].outputs[0].token_ids)

facts = {}
before = generate()
torch.distributed.barrier()
if rank == 0:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def oracle():
        return model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt):].tolist()

    facts["loaded"] = before == oracle()
    with EngineGroup.connect() as group:
        group.wait_ready(engines=2, timeout=30)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        group.update_weights(model, version="one", timeout=60)
        facts["engines"] = [(state.dp_rank, state.version) for state in group.status()]
        facts["equal"] = group.verify().equal
torch.distributed.barrier()
after = generate()
if rank == 0:
    facts["updated"] = after == oracle()
    print(json.dumps(facts))
"""


def test_engines_of_an_external_launcher_are_one_replica(tmp_path: Path) -> None:
    """torchrun starts an engine of one worker for each rank of a TP group; the engines run in lockstep."""
    make_model(tmp_path)
    script = tmp_path / "ranks.py"
    script.write_text(TORCHRUN)
    port = str(free_ports(1)[0])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", port, str(script)]
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "AREAL_VLLM_DIRECTORY": f"tcp://127.0.0.1:{free_ports(1)[0]}",
    }
    # vLLM leaves the sockets of a process that ends, and their paths have 107 characters at most.
    with tempfile.TemporaryDirectory() as sockets:
        done = subprocess.run(
            [*command, str(tmp_path)],
            env={**os.environ, **settings, "VLLM_RPC_BASE_PATH": sockets},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts == {"loaded": True, "engines": [[0, "one"], [1, "one"]], "equal": True, "updated": True}


VISION = """
import json, sys
from pathlib import Path

folder = Path(sys.argv[1])
sys.path.insert(0, (folder / "root").read_text())
from areal_vllm_ext import EngineGroup
from benchmarks.models.engine import Engine, distance
from benchmarks.models.families import FAMILIES
from benchmarks.models.trainer import Trainer

family = FAMILIES["blip2"]
trainer = Trainer(family)
trainer.set("zero")
engine = Engine(family, trainer.save(folder / "zero"), updatable=True)
core = engine.llm.llm_engine.engine_core.engine_core
facts = {"loaded": distance(engine.says(), trainer.says()) < 1e-3}
with EngineGroup.connect() as group:
    group.wait_ready(engines=1, timeout=30)
    for weights in ("one", "two"):
        trainer.set(weights)
        group.update_weights(trainer.model, version=weights, timeout=60)
        facts[weights] = distance(engine.says(), trainer.says()) < 1e-3
    facts["equal"] = group.verify().equal
facts["kept in both halves"] = core.mm_receiver_cache is not None
print(json.dumps(facts))
"""


def test_an_image_that_was_seen_before_an_update_is_answered_with_the_new_weights(tmp_path: Path) -> None:
    """vLLM keeps processed images in two halves, front end and engine, which an update leaves alone; not what they became."""
    (tmp_path / "root").write_text(str(Path(__file__).parents[3]))
    done = run(VISION, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts == {"loaded": True, "one": True, "two": True, "equal": True, "kept in both halves": True}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"VLLM_PLUGINS": "another"}, r"VLLM_PLUGINS"),
        ({"AREAL_VLLM_HOST": "0.0.0.0"}, r"AREAL_VLLM_KEY_FILE"),
        ({"AREAL_VLLM_KEY_FILE": "/nowhere/cluster.key"}, r"areal-vllm keygen /nowhere/cluster.key"),
        ({"AREAL_VLLM_PORT": "many"}, r"AREAL_VLLM_PORT: 'many' is not a whole number"),
        ({"_AREAL_TEST_BREAK": "1"}, r"vLLM 0\.\d+.* cannot be hooked: patch start_endpoint_with_busy_loop failed"),
    ],
)
def test_engine_refuses_to_start_without_its_hook_or_key(
    tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    import re

    make_model(tmp_path)
    script = START
    if environment.pop("_AREAL_TEST_BREAK", ""):
        # A vLLM that this package does not know: the method that a patch needs is gone.
        script = "import vllm.v1.engine.core as core\ndel core.EngineCoreProc._handle_client_request\n" + START
    done = run(script, tmp_path, **environment)
    assert done.returncode != 0
    assert re.search(message, done.stderr + done.stdout), done.stderr[-3000:]
    assert "Loading weights took" not in done.stderr + done.stdout, "it refused only after the model was loaded"
