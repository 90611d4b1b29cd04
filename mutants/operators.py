"""The bugs that are planted: one changed operator, number, condition or call at a time."""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

Rewrite = Callable[[ast.AST], ast.AST | None]

OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip

METHODS = {
    "sum": "mean", "mean": "sum", "max": "min", "min": "max", "std": "var", "var": "std", "softmax": "log_softmax",
    "cumsum": "cumprod", "argmax": "argmin", "argsort": "sort",
}  # fmt: skip
"""A call of a method becomes one of another."""

DROPPED = {"detach", "abs", "sqrt", "exp", "log", "clamp", "square", "log1p", "expm1"}
"""A call of a method without arguments (and of ``clamp``) is left out."""


@dataclass(frozen=True)
class Mutant:
    """One planted bug.

    Args:
        module: dotted name of the module.
        line: the line of its source, counted from 1.
        before: the source of the expression.
        after: the source of the expression that replaces it.
        index: its number among the mutants of the module.
    """

    module: str
    line: int
    before: str
    after: str
    index: int

    def __str__(self) -> str:
        return f"{self.module}:{self.line}  {self.before}  →  {self.after}"


def _operator(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS and not _is_type(node):
        return ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        return ast.Compare(node.left, [OPERATORS[type(node.ops[0])](), *node.ops[1:]], node.comparators)
    if isinstance(node, ast.BoolOp):
        return ast.BoolOp(OPERATORS[type(node.op)](), node.values)
    return None


def _is_type(node: ast.BinOp) -> bool:
    """A union of types, as in ``isinstance(x, float | int)``, rather than arithmetic."""
    names = (side for side in (node.left, node.right) if isinstance(side, ast.Name))
    return isinstance(node.op, ast.BitOr) and any(n.id in {"int", "float", "str", "Tensor", "list"} for n in names)


def _sign(node: ast.AST) -> ast.AST | None:
    return node.operand if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else None


def _number(node: ast.AST) -> ast.AST | None:
    if not isinstance(node, ast.Constant) or type(node.value) not in (int, float, bool):
        return None
    if isinstance(node.value, bool):
        return ast.Constant(not node.value)
    return ast.Constant(node.value + 1 if abs(node.value) < 10 and isinstance(node.value, int) else node.value * 2 + 1)


def _condition(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.IfExp):
        return ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    return None


def _method(node: ast.AST) -> ast.AST | None:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return None
    name = node.func.attr
    if name in METHODS:
        return ast.Call(ast.Attribute(node.func.value, METHODS[name], ast.Load()), node.args, node.keywords)
    if name in DROPPED and not node.args and not _is_module(node.func.value):
        return node.func.value
    return None


def _is_module(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in {"torch", "np", "math", "F"}


REWRITES: tuple[Rewrite, ...] = (_operator, _sign, _number, _condition, _method)


def _places(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.AST, str, int | None]]:
    """Every expression that runs: parent, node, field, position in that field; none in messages or annotations."""
    skipped = (ast.Raise, ast.Assert, ast.JoinedStr, ast.arg, ast.Import, ast.ImportFrom)
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list", "slice") and not isinstance(tree, ast.Subscript):
            continue
        for position, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not isinstance(child, skipped):
                yield tree, child, field, position
                yield from _places(child)


def mutants(module: str, source: str) -> list[Mutant]:
    """All mutants of a module, in the order of its source."""
    return [
        Mutant(module, node.lineno, ast.unparse(node), ast.unparse(changed), index)  # type: ignore[attr-defined]
        for index, (_, node, _, _, changed) in enumerate(_changes(ast.parse(source)))
    ]


def planted(source: str, index: int) -> ast.Module:
    """The tree of a module with one of its mutants planted."""
    tree = ast.parse(source)
    parent, node, field, position, changed = next(islice(_changes(tree), index, None))
    changed = ast.copy_location(changed, node)
    if position is None:
        setattr(parent, field, changed)
    else:
        getattr(parent, field)[position] = changed
    return ast.fix_missing_locations(tree)


def _changes(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.AST, str, int | None, ast.AST]]:
    for parent, node, field, position in _places(tree):
        for rewrite in REWRITES:
            changed = rewrite(node)
            if changed is not None and hasattr(node, "lineno"):
                yield parent, node, field, position, changed
