"""Megatron checkpoints of the format `torch_dist`, read without Megatron: where they are, and what is in them."""
