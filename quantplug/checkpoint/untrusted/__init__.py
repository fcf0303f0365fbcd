"""Directories by others' hands: what of them is read at all, and how much."""
