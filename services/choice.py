"""Which model a request means: by its name, or by the languages that it translates."""

from collections.abc import Collection, Iterable, Mapping

from services.errors import not_found

Pair = tuple[str, str]  # (source, target) language, BCP-47


def choose_name(field: str, wanted: str, names: Collection[str]) -> str:
    """`wanted`, or the only name where it is empty. Raises StatusError NOT_FOUND on `field` that lists the names."""
    if wanted in names:
        return wanted
    if not wanted and len(names) == 1:
        return next(iter(names))
    said = f"{wanted!r} is not served here" if wanted else "is empty, and there is more than one"
    raise not_found(field, f"{said}; there are: {', '.join(sorted(names))}")


def choose_translator(wanted: str, source: str, target: str, pairs: Mapping[str, Pair]) -> str:
    """The name of the model that a request for translation means; what is empty leaves the choice open.

    Without a name it is the nearest for the languages, of equally near ones the first by name. Raises StatusError
    NOT_FOUND on the field that no model fits, or whose emptiness leaves more than one pair of languages.
    """
    if wanted or (not (source or target) and len(set(pairs.values())) > 1):
        name = choose_name("model", wanted, pairs)
        pairs = {name: pairs[name]}
    by = f"by {wanted!r}" if wanted else "here"
    from_source = {name: far for name, pair in pairs.items() if (far := distance(source, pair[0])) is not None}
    if not from_source:
        raise not_found("source_language", f"{source!r} is not translated {by}; {_listed(pairs.values())}")
    fits = {name: (f, far) for name, f in from_source.items() if (far := distance(target, pairs[name][1])) is not None}
    if not fits:
        there_are = _listed(pairs[name] for name in from_source)
        raise not_found("target_language", f"nothing is translated into {target!r} {by}; {there_are}")
    nearest = sorted(name for name in fits if fits[name] == min(fits.values()))
    found = {pairs[name] for name in nearest}
    if len(found) > 1 and not (source and target):
        empty = "target_language" if source else "source_language"
        raise not_found(empty, f"is empty, and there is more than one; {_listed(found)}")
    return nearest[0]


def distance(wanted: str, tag: str) -> int | None:
    """How far a model's language is from the wanted one: 0 where they are the same, or none is wanted.

    Else by how many subtags one narrows the other ("de-AT" and "de": 1); None where neither does.
    """
    if not wanted:
        return 0
    one, other = wanted.lower().split("-"), tag.lower().split("-")
    shared = min(len(one), len(other))
    return abs(len(one) - len(other)) if one[:shared] == other[:shared] else None


def _listed(pairs: Iterable[Pair]) -> str:
    return f"there are: {', '.join(sorted({f'{source} to {target}' for source, target in pairs}))}"
