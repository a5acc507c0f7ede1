"""serving.engine decodes many prompts at a time: policy in scheduler, memory in kv_cache, draws in sampler."""
