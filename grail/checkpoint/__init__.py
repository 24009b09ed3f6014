"""Checkpoints in and out: safetensors read one tensor at a time, shards written beside and renamed."""
