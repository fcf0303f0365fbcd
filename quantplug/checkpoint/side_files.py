"""The files beside the weights that go into what is made of a checkpoint: chosen by kind, and said."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from quantplug.checkpoint.adapter import ADAPTER_FILES
from quantplug.checkpoint.config.file import CONFIG_FILE
from quantplug.checkpoint.reader import INDEX_FILE, weight_files
from quantplug.checkpoint.untrusted.files import OUTSIDE, file_problem
from quantplug.errors import Offender, SourceError

QUANT_CONFIG_FILE = "hf_quant_config.json"
# The one directory that belongs to a tokenizer (transformers.utils.CHAT_TEMPLATE_DIR).
_TEMPLATES = "additional_chat_templates"

# Tokenizers and their vocabularies, settings of generation and processors, chat templates, and what is there to read.
_SUFFIXES = {".json", ".jinja", ".txt", ".md", ".model", ".tiktoken", ".vocab", ".bpe"}
_TEXTS = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "README", "USE_POLICY")
_CODE = ".py"
# What is written anew for every export.
_OURS = {CONFIG_FILE, QUANT_CONFIG_FILE, INDEX_FILE}


@dataclass(frozen=True)
class SideFiles:
    """What an export does with everything beside the weights of its source.

    Attributes:
        carried: Paths below the source of the files that it copies as they are.
        left_out: Path of every other entry, to the reason why it stays behind.
    """

    carried: tuple[str, ...]
    left_out: Mapping[str, str]

    def said(self) -> Iterator[str]:
        """A line for what is copied, and one for each reason to leave others out."""
        if self.carried:
            yield f"Copied from the source: {', '.join(self.carried)}"
        for reason in dict.fromkeys(self.left_out.values()):
            names = [name for name, its_reason in self.left_out.items() if its_reason == reason]
            yield f"Left out ({reason}): {', '.join(names)}"


def choose_side_files(directory: Path, *, code: bool) -> SideFiles:
    """Chooses by kind, not by what is excluded: a file that no reader of a checkpoint looks for stays where it is.

    Args:
        code: Whether the checkpoint's own code is trusted, and so carried for its readers to run.

    Raises:
        SourceError: A file that should be carried cannot be read; names all of them.
    """
    carried, left_out, offenders = [], {}, []
    for name in _entries(directory):
        reason = _reason_against(directory, name, code)
        problem = None if reason else file_problem(directory, name)
        if reason or problem == OUTSIDE:
            left_out[name] = reason or OUTSIDE
        elif problem:
            offenders.append(Offender(str(directory / name), problem))
        else:
            carried.append(name)
    if offenders:
        raise SourceError(
            "Files beside the weights cannot be carried over.",
            offenders,
            "Make them readable, or remove them from the source.",
        )
    return SideFiles(tuple(carried), left_out)


def _entries(directory: Path) -> Iterator[str]:
    """Everything at the top of a checkpoint, and its chat templates, but for its weights and what describes them."""
    weights = {name.partition("/")[0] for name in weight_files(directory)}
    for path in sorted(directory.iterdir()):
        if path.name == _TEMPLATES and path.is_dir() and not path.is_symlink():
            yield from (f"{_TEMPLATES}/{template.name}" for template in sorted(path.iterdir()))
        elif path.name not in weights | _OURS:
            yield path.name


def _reason_against(directory: Path, name: str, code: bool) -> str | None:
    """Why a file is of no kind that is carried; None where it is of one."""
    path = Path(name)
    if (directory / name).is_dir():
        return "is a directory"
    if path.match(ADAPTER_FILES):
        return "is an adapter's, which readers would add to the weights"
    if path.suffix == _CODE and path.parent == Path():
        return None if code else "is code, which is carried where it is trusted"
    if path.name.startswith("."):
        return "is hidden"
    if not path.name.isprintable():
        return "has control codes in its name"
    if path.name.endswith(".index.json"):
        return "is an index of weights that are not carried"
    if path.suffix in _SUFFIXES or path.name.upper().startswith(_TEXTS):
        return None
    return "is of no kind that readers of a checkpoint look for"
