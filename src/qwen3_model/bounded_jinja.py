"""Jinja for programs that nobody here has written: a template ends, and fits into memory.

jinja's sandbox keeps a template away from Python's insides, not from looping for ever or from doubling a
string until the memory is full. Here every loop, call and filter looks at the clock; what could make
something large (operators, `~`, slices, literals, filters, methods, formats) first says how large, and is
counted. Templates within these bounds render as in the plain sandbox.

An environment is made for one rendering, which needs nothing of another thread's; code is compiled once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping, ValuesView
from functools import reduce, wraps
from itertools import chain
from time import thread_time
from types import BuiltinMethodType, CodeType, MethodType
from typing import Any

from jinja2 import Template, TemplateRuntimeError, nodes, pass_context, pass_environment, pass_eval_context
from jinja2.ext import loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.runtime import markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

SECONDS = 2.0  # of processor time of a rendering; 10 000 messages take 0.5
LARGEST = 2**22  # characters of a text: what four contexts of a quarter million tokens hold
MADE = 2**26  # characters that a rendering may make in all
LONGEST_SOURCE = 100_000  # characters of a template; jinja compiles about 30 000 a second
DEEPEST = 100  # containers in containers
ELEMENT = 16  # what an element of a container counts beside its value
MOST_BITS = 2**14  # of a whole number; Python writes out 14 284
WIDEST = 4  # digits of a width or a precision in a format
SLOWEST = 2**31  # steps of a search whose time is the product of two lengths

MOST_ROUNDED = 1000  # digits

# Filters and methods by how their result grows: with a number, by what each counts; with the number of lines
# or tabs; with the length of a text for every character of another. The last take the time of such a product.
PADDING = dict.fromkeys(("center", "ljust", "rjust", "zfill", "to_bytes"), 1) | {
    "batch": ELEMENT,
    "slice": ELEMENT,
}
INDENTING = {"indent": "\n", "expandtabs": "\t"}
REPEATING = {"wordwrap", "urlize", "xmlattr", "translate"}
SLOW = {"rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip", "trim"}
CONTAINERS = (list, tuple, set, frozenset, KeysView, ItemsView, ValuesView)
_PERCENT = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?")


class TooMuch(TemplateRuntimeError):
    """A template asks for more than a rendering may have."""


def weight(value: Any, depth: int = 0) -> int:
    """About how many characters a value is, written out. Raises TooMuch past the limits of one value."""
    if isinstance(value, (str, bytes)):
        total = len(value)
    elif isinstance(value, int):
        if value.bit_length() > MOST_BITS:
            raise TooMuch(f"it makes a whole number of more than {MOST_BITS} bits")
        total = 1
    elif isinstance(value, (Mapping, *CONTAINERS)):
        if depth == DEEPEST:
            raise TooMuch(f"it nests lists deeper than {DEEPEST}")
        total = 0
        for element in chain(value.keys(), value.values()) if isinstance(value, Mapping) else value:
            total += ELEMENT + (len(element) if type(element) is str else weight(element, depth + 1))
            fits(total)
    else:
        total = 1
    return fits(total)


def fits(size: int) -> int:
    """The size of a value. Raises TooMuch where it is too large."""
    if size > LARGEST:
        raise TooMuch(f"it makes a text or list of more than {LARGEST} characters")
    return size


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja's sandbox with bounds, for one rendering (or one compilation)."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, extensions: tuple = ()) -> None:
        # Nothing is evaluated at compilation: not optimised, and the output's function needs the context.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, finalize=_finalize,
            extensions=[loopcontrols, *extensions],
        )  # fmt: skip
        self._made, self._deadline = 0, thread_time() + SECONDS
        del self.globals["lipsum"]
        self.filters |= {"tojson": _to_json, "sum": _sum}
        self.filters = {name: self._bounded(name, function) for name, function in self.filters.items()}
        self.filters |= {" spend": self.spend, " made": self.made, " slice": self._slice, " join": _join}

    def bounded_code(self, source: str) -> CodeType:
        """Compile a template. Raises what jinja and Python raise: nearly anything."""
        if len(source) > LONGEST_SOURCE:
            raise TooMuch(f"it has {len(source)} characters, more than the {LONGEST_SOURCE} that are read")
        return self.compile(_Watched().visit(self.parse(source)))

    def bounded_text(self, code: CodeType, names: Mapping[str, Any]) -> str:
        """Run a compiled template. Raises whatever it raises, TooMuch where it asks for too much."""
        parts, size = [], 0
        for part in Template.from_code(self, code, self.globals).generate(names):
            size = fits(size + len(part))
            parts.append(part)
        return "".join(parts)

    def spend(self, size: int = 0) -> None:
        """Count characters that were made, and look at the clock. Raises TooMuch."""
        self._made += size
        if self._made > MADE:
            raise TooMuch(f"it makes more than {MADE} characters in all")
        if thread_time() > self._deadline:
            raise TooMuch(f"it takes longer than {SECONDS:.0f} seconds")

    def made(self, value: Any) -> Any:
        """Count a value that was made, and give it back. Raises TooMuch."""
        self.spend(weight(value))
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator whose result may be large."""
        check_operator(operator, left, right)
        return self.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, N805
        """A function, macro or method."""
        __self.spend()
        if isinstance(__obj, (BuiltinMethodType, MethodType)) and isinstance(
            __obj.__self__, (str, bytes, int)
        ):
            if __obj.__name__ == "join" and len(args) == 1 and not isinstance(args[0], str):
                args = ([*args[0]],)  # of a generator; as long as what it is made of
            check_growth(__obj.__name__, __obj.__self__, (*args, *kwargs.values()))
        return __self.made(super().call(__context, __obj, *args, **kwargs))

    def call_test(self, *args: Any, **kwargs: Any) -> Any:
        """A test, by filters that try it on every element."""
        self.spend()
        return super().call_test(*args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format`, its widths and its result bounded."""
        if super().wrap_str_format(value) is None:
            return None
        if isinstance(value.__self__, Markup):
            raise TooMuch("it formats an escaped text")

        def formatted(*args: Any, **kwargs: Any) -> str:
            if value.__name__ == "format_map":
                (kwargs,), args = args, ()
            return str(_Formatter(self).vformat(value.__self__, args, kwargs))

        return formatted

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        first = int(hasattr(function, "jinja_pass_arg"))  # the filter's value comes behind the context

        @wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.spend()
            before, (value, *given) = args[:first], args[first:]
            if name == "join" and not isinstance(value, (str, Mapping)):
                value = [*value]
            check_growth(name, value, (*given, *kwargs.values()))
            return self.made(function(*before, value, *given, **kwargs))

        return bounded

    def _slice(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        return self.made(value[start:stop:step])


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Raises TooMuch before an operator makes something too large."""
    if isinstance(left, int) and isinstance(right, int) and abs(left) > 1:
        bits = left.bit_length()
        made = {"*": bits + right.bit_length(), "**": bits * max(right, 0)}.get(operator, 0)
        if made > MOST_BITS:
            raise TooMuch(f"it makes a whole number of more than {MOST_BITS} bits")
    elif operator == "*":
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, (str, bytes, list, tuple)) and isinstance(times, int):
                fits(weight(sequence) * times)
    elif operator == "%" and isinstance(left, (str, bytes)):
        check_percent(str(left), right)


def check_percent(template: str, values: Any, by_name: bool = False) -> None:
    """Raises TooMuch before `template % values` becomes too large; by name a value can be taken again."""
    widths = [width for found in _PERCENT.findall(template) for width in found if width]
    if any(width == "*" or len(width) > WIDEST for width in widths):
        raise TooMuch(f"it formats with a width or a precision of more than {WIDEST} digits")
    times = template.count("%") if by_name or isinstance(values, Mapping) else 1
    fits(len(template) + sum(map(int, widths)) + times * weight(values))


def check_growth(name: str, value: Any, given: tuple) -> None:
    """Raises TooMuch before a filter or a method makes something too large, or takes too long. given: what
    it is called with."""
    size = fits(len(value)) if isinstance(value, (str, bytes, list)) else 1
    widest = max((abs(number) for number in given if isinstance(number, int)), default=0)
    longest = max((len(text) for text in given if isinstance(text, (str, bytes))), default=0)
    if name == "wordwrap" and size * size // (widest or 79) > SLOWEST:  # copies what is left for every line
        raise TooMuch("it wraps a long text into short lines")
    if name in PADDING:
        fits(widest * PADDING[name])
    elif name in INDENTING and isinstance(value, str):
        fits(size + (value.count(INDENTING[name]) + 1) * (longest + widest))
    elif name in REPEATING:
        fits(size * (1 + longest + sum(weight(part) for part in given if isinstance(part, Mapping))))
    elif name == "replace" and len(given) >= 2 and all(isinstance(text, str) for text in (value, *given[:2])):
        fits(size + value.count(given[0]) * len(given[1]))
    elif name == "join":  # the filter is called on the parts, the method with them
        parts, between = (value, longest) if isinstance(value, list) else (given[0] if given else (), size)
        fits(weight(parts) + len(parts) * between if isinstance(parts, list) else 0)
    elif name == "format" and isinstance(value, (str, bytes)):
        check_percent(str(value), given, by_name=True)
    elif name == "round" and widest > MOST_ROUNDED:
        raise TooMuch(f"it rounds to more than {MOST_ROUNDED} digits")
    elif name in SLOW and size * longest > SLOWEST:
        raise TooMuch("it searches a long text for a long text")


class _Formatter(SandboxedFormatter):
    _env: BoundedEnvironment

    def format_field(self, value: Any, format_spec: str) -> str:
        if re.search(rf"\d{{{WIDEST + 1}}}", format_spec):
            raise TooMuch(f"it formats with a width or a precision of more than {WIDEST} digits")
        weight(value)
        text = super().format_field(value, format_spec)
        self._env.spend(fits(len(text)))
        return text


@pass_context
def _finalize(context: Any, value: Any) -> str:
    """What `{{ value }}` puts out."""
    if not isinstance(value, str):
        weight(value)
        value = str(value)
    context.environment.spend(fits(len(value)))
    return value


@pass_eval_context
def _join(eval_ctx: Any, *parts: Any) -> str:
    """`a ~ b ~ c`."""
    fits(sum(map(weight, parts)))
    return eval_ctx.environment.made((markup_join if eval_ctx.autoescape else str_join)(parts))


@pass_environment
def _to_json(environment: Any, value: Any, ensure_ascii: bool = False, indent: int | str | None = None,
             separators: Any = None, sort_keys: bool = False) -> str:  # fmt: skip
    """JSON without jinja's HTML escapes, which models have not seen, piece by piece."""
    weight(value)
    if isinstance(indent, int) and indent >= 10**WIDEST:
        raise TooMuch(f"it indents by a number of more than {WIDEST} digits")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    parts, size = [], 0
    for part in encoder.iterencode(value):
        size = fits(size + len(part))
        parts.append(part)
    return "".join(parts)


@pass_environment
def _sum(environment: Any, iterable: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    """jinja's sum; of lists, each step counted."""
    if attribute is not None:
        iterable = map(make_attrgetter(environment, attribute), iterable)
    if not isinstance(start, (list, tuple)):
        return sum(iterable, start)
    return reduce(lambda total, value: environment.call_binop(None, "+", total, value), iterable, start)


class _Watched(NodeTransformer):
    """Puts the environment's counters into a template: into every loop, before text that a loop may repeat,
    around what makes lists and joins texts without a function that could count."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.body.insert(0, _statement(node, 0))
        return node

    def visit_Output(self, node: nodes.Output) -> Any:  # noqa: N802
        self.generic_visit(node)
        size = sum(len(part.data) for part in node.nodes if isinstance(part, nodes.TemplateData))
        return [_statement(node, size), node] if size else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(node, " join", node.nodes)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        ends = (node.arg.start, node.arg.stop, node.arg.step)
        return _filter(
            node, " slice", [node.node, *(nodes.Const(None) if end is None else end for end in ends)]
        )

    def visit_List(self, node: Any) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        parts = node.items if hasattr(node, "items") else ()
        known = all(isinstance(part, nodes.Const) for part in parts)  # as long as the template's own text
        return node if known or getattr(node, "ctx", "load") != "load" else _filter(node, " made", [node])

    visit_Tuple = visit_Dict = visit_List


def _filter(at: nodes.Node, name: str, values: list[nodes.Expr]) -> nodes.Filter:
    place = {"lineno": at.lineno, "environment": at.environment}
    return nodes.Filter(values[0], name, values[1:], [], None, None, **place)


def _statement(at: nodes.Node, size: int) -> nodes.ExprStmt:
    return nodes.ExprStmt(_filter(at, " spend", [nodes.Const(size)]), lineno=at.lineno)
