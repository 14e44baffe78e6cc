"""A griffe extension: where docstrings say ``:func:`name```, the reference page has a link."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(func|class|meth|attr|mod):`~?([\w.]+)`")


def _identifier(name: str, scope: griffe.Object | griffe.Alias) -> str:
    """Full path of ``name`` as seen from ``scope``: a member of it, of what is around it, or an absolute path."""
    around: Any = scope
    while around is not None:
        head = name.split(".")[0]
        if head in around.members:
            return f"{around.path}.{name}"
        around = around.parent
    return name


class Roles(griffe.Extension):
    """Turns roles into references that may stay unresolved: not everything that is mentioned is on the page."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        self._visit(pkg)

    def _visit(self, scope: griffe.Object) -> None:
        def link(match: re.Match[str]) -> str:
            kind, name = match.groups()
            path = _identifier(name, scope)
            text = name.rsplit(".", 1)[-1] if path == name and kind != "mod" else name
            return f'<autoref optional identifier="{path}"><code>{text}</code></autoref>'

        if scope.docstring is not None:
            scope.docstring.value = _ROLE.sub(link, scope.docstring.value)
        for member in scope.members.values():
            if not member.is_alias:
                self._visit(member)
