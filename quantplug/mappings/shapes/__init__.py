"""Shapes that a config asks for, by what a tensor's name says: for those who write checkpoints and for their judge."""
