"""Write docs/api.md from the docstrings of `nqkv_rs.__all__`; with --check, only compare.

Needs the installed package and the extra [transformers] (for `NqkvCache`), nothing else.
"""

import argparse
import difflib
import enum
import inspect
import re
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent / "api.md"
HEAD = """# API reference

<!-- Written by docs/build_api.py from the docstrings: edit those, then run `make docs`. -->
"""


class Text(str):
    """Prints without quotes, as an annotation stands in the source."""

    def __repr__(self) -> str:
        return str(self)


def plain(annotation: Any) -> Any:
    """Annotations of `from __future__ import annotations` are strings; everything else stays."""
    return Text(annotation) if isinstance(annotation, str) else annotation


def signature(name: str, obj: Any) -> str:
    """The call as one types it; without arguments where the object tells none."""
    try:
        sig = inspect.signature(obj)
    except (TypeError, ValueError):
        return f"{name}(...)"
    sig = sig.replace(
        parameters=[p.replace(annotation=plain(p.annotation)) for p in sig.parameters.values()],
        return_annotation=plain(sig.return_annotation),
    )
    # The address of an object that serves as a default differs from run to run.
    sig_text = re.sub(r" at 0x[0-9a-f]+", "", str(sig))
    line = f"{name}{sig_text}"
    if len(line) <= 100:
        return line
    # `*` and `/` are no parameters of their own: split the printed form at outer commas.
    printed, tail = sig_text, ""
    if " -> " in printed:
        printed, tail = printed.rsplit(" -> ", 1)
        tail = f" -> {tail}"
    parts, depth, start, inner = [], 0, 0, printed[1:-1]
    for i, char in enumerate(inner):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append(inner[start:i].strip())
            start = i + 1
    parts.append(inner[start:].strip())
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){tail}"])


def doc(name: str, obj: Any) -> str:
    """The object's own docstring; a class that only inherits one has none."""
    text = obj.__doc__ if isinstance(obj, type) else inspect.getdoc(obj)
    if not text or not text.strip():
        raise SystemExit(f"docs/build_api.py: expected a docstring on {name}, found none")
    text = inspect.cleandoc(text)
    if re.search(r"(?m)^#", text):
        # A heading of a docstring would break the outline of the page.
        text = re.sub(r"(?m)^#+ *(.+)$", r"**\1**", text)
    return text


def methods(cls: type) -> list[tuple[str, Any, str]]:
    """Public members that the class itself defines, in its order: (name, object, kind)."""
    found = []
    for name, raw in vars(cls).items():
        if name.startswith("_"):
            continue
        if isinstance(raw, property) or inspect.isdatadescriptor(raw):
            # Slots of dataclasses and named tuples are told in the class's own docstring.
            if inspect.ismemberdescriptor(raw) or type(raw).__name__ == "_tuplegetter":
                continue
            found.append((name, raw, "property"))
        elif isinstance(raw, (classmethod, staticmethod)) or inspect.isroutine(raw):
            kind = "classmethod" if isinstance(raw, classmethod) else "method"
            found.append((name, getattr(cls, name), kind))
    return found


def overrides(cls: type, name: str, obj: Any) -> bool:
    """True for a method without words of its own that only fulfils a base class's contract."""
    own = vars(cls)[name]
    text = getattr(getattr(own, "__func__", own), "__doc__", None)
    return not text and any(name in vars(base) for base in cls.__mro__[1:])


def entry(name: str, obj: Any) -> list[str]:
    """The lines of one public name."""
    if inspect.ismodule(obj):
        return [f"## {name}", "", doc(name, obj), ""]
    if not isinstance(obj, type) and not inspect.isroutine(obj):
        return [f"## {name}", "", f"```python\n{name} = {obj!r}\n```", ""]
    lines = [f"## {name}", ""]
    is_exception = isinstance(obj, type) and issubclass(obj, BaseException)
    if isinstance(obj, type) and (is_exception or issubclass(obj, enum.Enum)):
        lines += [
            f"```python\nclass {name}({obj.__mro__[1].__name__})\n```",
            "",
            doc(name, obj),
            "",
        ]
        if issubclass(obj, enum.Enum):
            lines += [f"- `{name}.{item.name}` = `{item.value!r}`" for item in obj] + [""]
        return lines
    lines += [f"```python\n{signature(name, obj)}\n```", "", doc(name, obj), ""]
    if isinstance(obj, type):
        for member, value, kind in methods(obj):
            if overrides(obj, member, value):
                continue
            call = member if kind == "property" else signature(member, value)
            lines += [f"### {name}.{member}", ""]
            lines += [
                f"```python\n{call}  # {kind}\n```"
                if kind != "method"
                else f"```python\n{call}\n```"
            ]
            lines += ["", doc(f"{name}.{member}", value), ""]
    return lines


def build() -> str:
    """The whole page."""
    import nqkv_rs
    from nqkv_rs import cuda_cache, evaluation, ops

    # What is imported from the package, then what its modules have.
    public = {n: getattr(nqkv_rs, n) for n in nqkv_rs.__all__ if not n.startswith("__")}
    for module in (cuda_cache, ops, evaluation):
        prefix = module.__name__.removeprefix("nqkv_rs.")
        public |= {f"{prefix}.{n}": getattr(module, n) for n in module.__all__}
    lines = [HEAD, doc("nqkv_rs", nqkv_rs), ""]
    lines += [f"- [`{n}`](#{n.lower().replace('.', '')})" for n in public] + [""]
    for name, value in public.items():
        lines += entry(name, value)
    return "\n".join(line.rstrip() for line in "\n".join(lines).splitlines()).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="compare with docs/api.md, write nothing"
    )
    page = build()
    if not parser.parse_args().check:
        PAGE.write_text(page, encoding="utf-8")
        print(f"wrote {PAGE.name}: {len(page.splitlines())} lines")
        return 0
    old = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if old == page:
        print(f"{PAGE.name} is up to date")
        return 0
    diff = difflib.unified_diff(
        old.splitlines(), page.splitlines(), "docs/api.md", "docstrings", "", "", 1
    )
    print("\n".join(list(diff)[:40]))
    print(
        "docs/api.md: expected the page of the current docstrings; run `make docs`", file=sys.stderr
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
