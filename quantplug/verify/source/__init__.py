"""A checkpoint beside the one that it was made from."""
