"""Which linears have one format in ModelOpt's AutoQuantize: those that servers fuse, or load alike.

ModelOpt has rules for modules by their names in Hugging Face, and for experts one by one. Grouped experts match none
(`quant_grouping_rules` of modelopt/torch/quantization/algorithms.py, 0.47), so that fc1 and fc2 of a layer would get
formats of their own; and every server reads all experts of a layer in the format of the first that it finds.
"""

from modelopt.torch.quantization.algorithms import AutoQuantizeSearcher

# A rule takes the name of a module; what its first group matches is the group of the search.
_GROUPS = (
    # All experts of a layer.
    r"^(.*\.experts)\.linear_fc[12]$",
    # The down projections of multi-latent attention, which servers make one linear of.
    r"^(.*\.self_attention)\.linear_(?:q|kv)_down_proj$",
)


def register_search_groups() -> None:
    """Adds the rules to those of all of ModelOpt's searchers, which share one list; twice changes nothing."""
    known = AutoQuantizeSearcher.quant_grouping_rules
    known.extend(rule for rule in _GROUPS if rule not in known)
