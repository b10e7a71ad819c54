"""Updates of engines that draft with a model: the drafter moves with the base weights, or says that it does not.

Each set of weights is made so that its own drafter proposes what its base model generates. A drafter of another set proposes
something else, so the tokens that are accepted tell which set it has. (A draft model is among ``benchmarks.models``.)
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from warm_python import run

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

UPDATES = """
import json, sys
import torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

from areal_vllm_ext import EngineGroup, InvalidWeights
from areal_vllm_ext.demo.model import make_tokenizer

folder, method = Path(sys.argv[1]), METHOD
WIDTH, DRAFTED = 128, 1 if method == "mtp" else 3
shape = dict(vocab_size=256, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, eos_token_id=None,
             bos_token_id=None, pad_token_id=1)
model = (Qwen2ForCausalLM(Qwen2Config(**shape)) if method == "mtp" else LlamaForCausalLM(LlamaConfig(**shape))).eval()

def layer_of(prefix):
    # A layer that changes nothing: attention and MLP add zero.
    layer = {name: tensor.clone() for name, tensor in model.model.layers[0].state_dict().items()}
    return {prefix + name: tensor for name, tensor in layer.items()}

def make(seed):
    # The next token depends on the last one only, by way of signs that differ from set to set.
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        layer = model.model.layers[0]
        for one in (layer.self_attn.o_proj, layer.mlp.down_proj):
            one.weight.zero_()
        for one in (layer.input_layernorm, layer.post_attention_layernorm):
            one.weight.fill_(1)
        signs = (torch.rand(WIDTH) < 0.5) * 2.0 - 1
        model.model.norm.weight.copy_(signs)
    if method == "eagle":
        inner = {name: one for name, one in layer_of("layers.0.").items() if "input_layernorm" not in name}
        return inner | {"fc.weight": torch.cat([torch.diag(signs), torch.zeros(WIDTH, WIDTH)], 1)}
    at = "model.mtp_layers.0."
    ones = {f"{at}{name}.weight": torch.ones(WIDTH) for name in ("token_layernorm", "hidden_layernorm")}
    project = torch.cat([torch.zeros(WIDTH, WIDTH), torch.eye(WIDTH)], 1)
    return layer_of(at) | ones | {at + "input_proj.weight": project, at + "final_layernorm.weight": signs}

def save(at, config, tensors):
    at.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, at / "model.safetensors", {"format": "pt"})
    (at / "config.json").write_text(json.dumps(config))
    make_tokenizer().save_pretrained(at)

def save_all(at, draft):
    config = model.config.to_dict() | {"dtype": "float32"}
    if method == "mtp":
        save(at, config | {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}, model.state_dict() | draft)
        return
    config["architectures"] = ["LlamaForCausalLM"]
    save(at, config, model.state_dict())
    save(at / "drafter", config, draft)

draft = make(0)
save_all(folder, draft)
speculative = {"method": method, "num_speculative_tokens": DRAFTED}
if method != "mtp":
    speculative["model"] = str(folder / "drafter")
llm = LLM(str(folder), enforce_eager=True, max_model_len=256, dtype="float32", kv_cache_memory_bytes=1 << 26,
          worker_extension_cls="areal_vllm_ext.worker.WorkerExtension", speculative_config=speculative,
          disable_log_stats=False)
PROMPTS = [[10, 20, 30, 100], [5, 6, 7, 8, 9]]

def counted():
    found = {one.name: getattr(one, "value", 0) for one in llm.get_metrics()}
    return [found.get(f"vllm:spec_decode_num_{what}_tokens", 0) for what in ("accepted", "draft")]

def trial():
    before = counted()
    options = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in PROMPTS]
    said = [list(one.outputs[0].token_ids) for one in llm.generate(prompts, options, use_tqdm=False)]
    expected = [
        model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt):].tolist()
        for prompt in PROMPTS
    ]
    return said == expected, [after - one for after, one in zip(counted(), before, strict=True)]
"""

SENDS = """
facts = {"start": trial(), "moved": [], "ways": []}
with EngineGroup.connect() as group:
    group.wait_ready(engines=1, timeout=30)
    for version in (1, 2, 3):
        draft = make(version)
        if method == "mtp":
            result = group.update_weights((model.state_dict() | draft).items(), version=version, timeout=60)
        else:
            result = group.update_weights(model, draft=draft, version=version, timeout=60)
        facts["moved"].append((result.draft, *trial()))
    state = group.status()[0]
    facts["state"] = [state.drafter, state.draft_version, state.version, state.loaded]
    facts["verified"] = group.verify().equal
    first = next(iter(draft))
    wrong = draft | {first: draft[first][:1]}
    try:
        group.update_weights(model, draft=wrong, version="wrong", timeout=60)
    except InvalidWeights as error:
        facts["wrong"] = str(error)
    facts["after_wrong"] = trial()
    # From a directory, with the drafter.
    draft = make(4)
    save_all(folder / "four", draft)
    given = {} if method == "mtp" else {"draft": folder / "four" / "drafter"}
    result = group.update_weights(folder / "four", version=4, timeout=60, **given)
    facts["moved"].append((result.draft, *trial()))
    facts["against_files"] = [str(one) for one in group.verify(folder / "four", **given).differences]
    first = folder if method == "mtp" else folder / "drafter"
    facts["against_others"] = len(group.verify(folder / "four", draft=first).differences)
    make(5)
    result = group.update_weights(model, version=5, timeout=60)
    facts["kept"] = (result.draft, *trial())
    state = group.status()[0]
    facts["versions"] = [state.draft_version, state.version]
    facts["equal"] = [str(one) for one in group.verify().differences]
print(json.dumps(facts))
"""


@pytest.mark.parametrize("method", ["eagle", "mtp"])
def test_drafter_moves_with_the_base_weights(tmp_path: Path, method: str) -> None:
    done = run(UPDATES.replace("METHOD", repr(method)) + SENDS, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    exact, (accepted, drafted) = facts["start"]
    assert exact
    assert accepted > 0.9 * drafted > 0, "a fresh engine's drafter proposes what its base model generates"
    for sent, exact, counts in facts["moved"]:
        assert (sent, exact, counts) == ("sent", True, [accepted, drafted]), facts
    assert facts["state"][:3] == [method, 3, 3]
    assert facts["verified"]
    assert "draft" in facts["wrong"]
    assert facts["after_wrong"] == [True, [accepted, drafted]], "a wrong drafter changed something"
    assert facts["against_files"] == facts["equal"] == []
    assert facts["against_others"] > 0
    kept, exact, (accepted, drafted) = facts["kept"]
    assert (kept, exact, accepted < 0.3 * drafted) == ("kept", True, True), facts
    assert facts["versions"] == [4, 5]
    log = done.stdout + done.stderr
    assert "keeps version 4" in log
    assert "differ from what was received" not in log
