"""A training checkpoint of Megatron-Core as a source of an export."""
