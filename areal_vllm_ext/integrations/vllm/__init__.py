"""vLLM's own trainer API (``vllm.distributed.weight_transfer``): see docs/vllm-trainer-api.md."""
