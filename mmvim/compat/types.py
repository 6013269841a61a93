"""The `type` of a part of a config: a name, a name behind a scope or module, or the class itself."""

from mmengine.registry import DATASETS


def kind_of(part: dict) -> str:
    """The plain name of a part's type, such as 'BaseSegDataset'; empty if it has none."""
    kind = part.get('type') or ''
    return kind.split('.')[-1] if isinstance(kind, str) else getattr(kind, '__name__', str(kind))


def dataset_class(part: dict) -> type | None:
    """The class of a data set, for a name without scope that of the default scope's host; None if it is unknown."""
    kind = part.get('type')
    with DATASETS.switch_scope_and_registry(None) as registry:
        return registry.get(kind) if isinstance(kind, str) else kind
