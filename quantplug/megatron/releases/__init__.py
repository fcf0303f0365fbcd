"""Where releases of Megatron-Core differ: one small file for each difference, which asks `installed`."""
