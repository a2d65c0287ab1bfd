"""HTML pages from the templates of a package."""

from typing import Any


def render(package: str, template: str, **values: Any) -> str:
    """A page, in which every value is escaped and none may be missing.

    Args:
        package: Whose folder ``templates`` has the template.
        template: Its name.
        **values: What it shows.

    Returns:
        The page.

    Raises:
        ImportError: Without Jinja.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("a report needs Jinja: pip install 'anybatch[tools]'") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
