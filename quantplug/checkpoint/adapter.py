"""Adapters of PEFT, which readers add to the weights of a model when they load it: no checkpoint to be quantized.

A directory that holds one alone is of no model. One that holds a model too is two to readers: transformers adds the
adapter where PEFT is installed (releases before 5 to the model that the adapter names, whatever lies there), vLLM and
SGLang serve the weights as they are.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from quantplug.checkpoint.untrusted.files import read_json
from quantplug.checkpoint.untrusted.json_reader import as_text
from quantplug.errors import Offender, SourceError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_FILES = "adapter_*"

MERGE_ALONE = (
    "Merge it into its model and take what that writes: AutoPeftModelForCausalLM.from_pretrained(DIR, dtype='auto')"
    ".merge_and_unload().save_pretrained(MERGED), of peft; and save the tokenizer there, too."
)
MERGE_BESIDE = (
    f"Move the adapter ({ADAPTER_FILES}) out of the directory. That is all where the weights have it merged already; "
    "where they have not: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(DIR, dtype='auto'), ADAPTER)"
    ".merge_and_unload().save_pretrained(MERGED), of peft and transformers, and take that."
)


@dataclass(frozen=True)
class Adapter:
    """What the config of an adapter says.

    Attributes:
        kind: PEFT's name for it, as `LORA`; empty where it says none.
        base: Name or path of the model that it was trained for; empty where it says none.
    """

    kind: str
    base: str

    def __str__(self) -> str:
        kind = f"{self.kind} adapter" if self.kind else "adapter"
        return f"{kind} (PEFT) of {self.base or 'a model that it does not name'}"


def adapter_in(directory: Path) -> Adapter | None:
    """The adapter that lies in a directory, by its config; None where there is none.

    Raises:
        SourceError: Its config cannot be read.
    """
    if not os.path.lexists(directory / ADAPTER_CONFIG):
        return None
    config = read_json(directory, ADAPTER_CONFIG)
    return Adapter(as_text(config.get("peft_type")), as_text(config.get("base_model_name_or_path")))


def refuse_adapter_alone(directory: Path) -> None:
    """Refuses a directory without a model's config in which an adapter lies.

    Raises:
        SourceError: There is an adapter; says of which model.
    """
    adapter = adapter_in(directory)
    if adapter is not None:
        raise SourceError(
            "The directory is an adapter, and no model.",
            [Offender(str(directory / ADAPTER_CONFIG), f"is of a {adapter}")],
            MERGE_ALONE,
        )
