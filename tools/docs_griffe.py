"""Signatures on the site of functions that take the fields of a dataclass, as `inspect.signature` shows them."""

from griffe import Decorator, Extension, Function, GriffeLoader, Module, Parameter, ParameterKind, Parameters


class ArgumentsOfDataclass(Extension):
    """Gives a function under `with_arguments_of(Request)` the parameters of `Request`."""

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **kwargs: object) -> None:
        """Once the whole package has been read, so that a dataclass of another file is there too."""
        for module in _modules(pkg):
            for function in module.functions.values():
                if not function.is_alias:
                    for decorator in function.decorators:
                        _replace(function, decorator, loader)


def _modules(module: Module) -> list[Module]:
    below = [each for child in module.modules.values() if not child.is_alias for each in _modules(child)]
    return [module, *below]


def _replace(function: Function, decorator: Decorator, loader: GriffeLoader) -> None:
    name, _, rest = str(decorator.value).partition("(")
    if name.rpartition(".")[2] != "with_arguments_of":
        return
    request = loader.modules_collection[function.parent.resolve(rest.rstrip(")"))]
    kind, parameters = ParameterKind.positional_or_keyword, []
    for each in request.attributes.values():
        if each.name == "_":  # KW_ONLY
            kind = ParameterKind.keyword_only
        elif "property" not in each.labels:
            parameters.append(Parameter(each.name, annotation=each.annotation, kind=kind, default=each.value))
    function.parameters = Parameters(*parameters)
