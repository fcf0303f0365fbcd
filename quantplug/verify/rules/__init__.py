"""What readers and servers demand of a checkpoint, one file a kind of rule."""

from quantplug.verify.rules import (
    architecture,
    compressed,
    config,
    excludes,
    groups,
    model,
    modules,
    server_configs,
    servers,
    side_files,
)

RULES = (
    *config.RULES,
    *groups.RULES,
    *compressed.RULES,
    *excludes.RULES,
    *modules.RULES,
    *model.RULES,
    *architecture.RULES,
    *servers.RULES,
    *server_configs.RULES,
    *side_files.RULES,
)
"""All that ask an inventory alone."""
