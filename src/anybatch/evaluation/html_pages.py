"""HTML pages from the templates of a package."""

from collections.abc import Sequence
from typing import Any


def render(packages: str | Sequence[str], template: str, **values: Any) -> str:
    """A page, in which every value is escaped and none may be missing.

    Args:
        packages: Package whose folder ``templates`` holds the template, or several: the first
            that has a template provides it.
        template: Name of the template.
        **values: What it shows.

    Raises:
        ImportError: Without Jinja.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("a report needs Jinja: pip install 'anybatch[tools]'") from error
    names = [packages] if isinstance(packages, str) else packages
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name) for name in names]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
