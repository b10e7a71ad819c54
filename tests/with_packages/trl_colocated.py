"""TRL's colocated generation on a real in-process ``LLM``, run as a program: prints ``exact`` after each sync."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

SETTINGS = {"AREAL_VLLM_ENABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
PROMPTS = [[10, 20, 30], [100, 3, 50, 7]]


def main(folder: Path) -> None:
    os.environ.update({"GLOO_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1", **SETTINGS})
    import torch
    from accelerate import Accelerator
    from trl.generation import vllm_generation

    from areal_vllm_ext.demo.deployment import free_ports
    from areal_vllm_ext.demo.model import greedy_tokens, make_model, make_tokenizer
    from areal_vllm_ext.integrations.trl import use_areal

    os.environ["AREAL_VLLM_DIRECTORY"] = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    model = make_model(folder / "model")
    model.name_or_path = str(folder / "model")
    use_areal(timeout=60)
    # TRL's own arguments compile for minutes on a CPU, and round.
    vllm_generation.LLM = functools.partial(vllm_generation.LLM, enforce_eager=True, dtype="float32")
    generation = vllm_generation.VLLMGeneration(
        model=model,
        accelerator=Accelerator(cpu=True),
        processing_class=make_tokenizer(),
        mode="colocate",
        max_model_length=256,
        max_num_seqs=8,
        temperature=0.0,
        max_completion_length=16,
    )
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.05)
        generation.sync_weights()
        found = generation.generate(PROMPTS, None, 1)[1]
        sys.stdout.write("exact\n" if [list(ids) for ids in found] == greedy_tokens(model, PROMPTS, 16) else "other\n")
    generation._areal_syncs.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
