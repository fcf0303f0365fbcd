"""Models: how they are built, and what Megatron-Core's own modules lack where there is no GPU."""
