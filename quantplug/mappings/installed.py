"""Families that installed packages offer, by the entry point group `quantplug.families`."""

from collections.abc import Set
from functools import cache
from importlib.metadata import entry_points

from quantplug.errors import ArgumentError, Offender
from quantplug.mappings.family_check import problems
from quantplug.mappings.table import Family

GROUP = "quantplug.families"


# Once in a process: packages do not come and go while it runs.
@cache
def installed_families(taken: Set[str]) -> dict[str, Family]:
    """The architectures of all of them, each with its family.

    Args:
        taken: Architectures that are served already.

    Raises:
        ArgumentError: One is no `Family`, has a table with problems, or serves what is served already; names them all.
    """
    found: dict[str, Family] = {}
    offenders = []
    for entry in entry_points(group=GROUP):
        where = f"{entry.name} = {entry.value}"
        try:
            family = entry.load()
        except (ImportError, AttributeError) as error:
            offenders.append(Offender(where, f"cannot be loaded: {error}"))
            continue
        if not isinstance(family, Family):
            offenders.append(Offender(where, f"is a {type(family).__name__}, not a quantplug.mappings.table.Family"))
            continue
        offenders += [Offender(where, str(problem)) for problem in problems(family)]
        twice = sorted(set(family.architectures) & (taken | found.keys()))
        offenders += [Offender(where, f"serves {name}, which is served already") for name in twice]
        found |= dict.fromkeys(family.architectures, family)
    if offenders:
        raise ArgumentError(
            f"An installed package offers families that cannot be used (entry points {GROUP}).",
            offenders,
            "Mend the package, or uninstall it; docs/families.md says what a family is.",
        )
    return found
