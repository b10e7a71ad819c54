"""vLLM's own trainer API on real engines that are switched on without the slot for an extension."""
