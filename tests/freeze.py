"""Imported where everything is imported: the garbage collector then leaves alone what is there by now.

The modules of PyTorch, Transformer Engine, Megatron-Core, ModelOpt and transformers are millions of objects. Every full
collection would visit them, and in a forked process each visit writes to a page that it has shared until then.
"""

import gc

gc.collect()
gc.freeze()
