"""train_q0.py reads like a paper: its size in tokens, its density, and what golfs a line. The tests
are held to their size, density and width.

Comments and docstrings cost nothing. Each rule is also shown a piece of code that breaks it.
"""
import ast
import io
import tokenize
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
SCRIPT = TESTS.parent / "train_q0.py"
MAX_TEST_LINES = 6_000
MAX_TOKENS = 19_840  # of 20,000; it grows only for what is measured to be better
MAX_TOKENS_A_LINE = 11  # on average; the models of the field have 7 to 11
MAX_COLUMNS = 100
MAX_FUNCTION_LINES = 60
MAX_DEPTH = 4  # blocks inside one another in a function
MAX_WALRUSES = 1  # of a function
MAX_UNPACKED = 3  # by position; a dataclass names more

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.Match, *FUNCTIONS)
SEQUENCES = (ast.Tuple, ast.List)

# Size --------------------------------------------------------------------------------------------


def code_tokens(source):
    """The tokens of a file, without comments, docstrings and layout."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and is_text(node.value):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    kinds = {tokenize.OP, tokenize.NAME, tokenize.NUMBER, tokenize.STRING}
    start = getattr(tokenize, "FSTRING_START", None)  # an f-string is one token before Python 3.12
    end = getattr(tokenize, "FSTRING_END", None)
    inside = 0
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_start = token.type == start
        counts = is_start or token.type in kinds
        if not inside and counts and token.start[0] not in docstrings:
            found.append(token)
        inside += int(is_start) - int(token.type == end)
    return found


def too_many_tokens(source):
    count = len(code_tokens(source))
    if count > MAX_TOKENS:
        yield f"{count} tokens, more than {MAX_TOKENS}"


def too_dense(source):
    tokens = code_tokens(source)
    density = len(tokens) / len({t.start[0] for t in tokens})
    if density > MAX_TOKENS_A_LINE:
        yield f"{density:.2f} tokens a line, more than {MAX_TOKENS_A_LINE}"


def too_wide(source):
    for number, line in enumerate(source.splitlines(), 1):
        if len(line) > MAX_COLUMNS:
            yield f"line {number} has {len(line)} columns"


def depth(node):
    """Levels of blocks inside `node`; an `elif` is no deeper than its `if`."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        level = 1 if isinstance(child, BLOCKS) and not is_elif else 0
        deepest = max(deepest, level + depth(child))
    return deepest


def too_long_or_deep(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, FUNCTIONS):
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{node.name} has {lines} lines"
            if depth(node) > MAX_DEPTH:
                yield f"{node.name} is {depth(node)} levels deep"


# Golf --------------------------------------------------------------------------------------------


def is_text(node):
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str))


def is_condition(node):
    """Whether `node` is True or False and nothing else."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in ("bool", "isinstance")
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def is_product_of_condition(node):
    """Comparisons of tensors are masks and `a or 1` is a number: those count beside literals."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult):
        return False
    sides = (node.left, node.right)
    if any(map(is_condition, sides)):
        return True
    literal = any(isinstance(x, (ast.Constant, ast.JoinedStr, *SEQUENCES)) for x in sides)
    return literal and any(isinstance(x, (ast.Compare, ast.BoolOp)) for x in sides)


def products_of_conditions(source):
    for node in ast.walk(ast.parse(source)):
        if is_product_of_condition(node):
            yield f"line {node.lineno}: {ast.unparse(node)}"


def names_in(node):
    return {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}


def root(node):
    """The name that attributes, subscripts and methods are of, or None."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def tuple_assignments(source):
    """`a, b = x, y`, except where old values make new ones (a swap) or all are parts of one."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            continue
        for target in node.targets:
            if not isinstance(target, ast.Tuple) or names_in(target) & names_in(node.value):
                continue
            roots = set(map(root, node.value.elts))
            if None in roots or len(roots) > 1:
                yield f"line {node.lineno}: {ast.unparse(node)}"


def named_lambdas(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            if any(isinstance(value, ast.Lambda) for value in values):
                yield f"line {node.lineno}: {ast.unparse(node)}"


def own_nodes(function):
    """The nodes of a function or module, without those of functions inside it."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, FUNCTIONS):
            yield child
            yield from own_nodes(child)


def walruses(source):
    tree = ast.parse(source)
    for function in [tree, *ast.walk(tree)]:
        if isinstance(function, (ast.Module, *FUNCTIONS)):
            found = [x for x in own_nodes(function) if isinstance(x, ast.NamedExpr)]
            if len(found) > MAX_WALRUSES:
                name = getattr(function, "name", "the module")
                yield f"line {found[-1].lineno}: {name} has {len(found)} walruses"


def starred(node):
    """What `node` unpacks with a star or two."""
    if isinstance(node, ast.Starred) or isinstance(node, ast.keyword) and node.arg is None:
        return [node.value]
    if isinstance(node, ast.Dict):
        return [value for key, value in zip(node.keys, node.values) if key is None]
    return []


def starred_conditionals(source):
    for node in ast.walk(ast.parse(source)):
        for value in starred(node):
            if isinstance(value, (ast.IfExp, ast.BoolOp)) or is_product_of_condition(value):
                yield f"line {value.lineno}: *({ast.unparse(value)})"


def unpackings(node):
    """[(target, value or None), ...] of an assignment or a loop."""
    if isinstance(node, ast.Assign):
        return [(target, node.value) for target in node.targets]
    return [(node.target, None)] if isinstance(node, (ast.For, ast.comprehension)) else []


def long_unpackings(source):
    """Sizes are exempt: a tensor's shape is read by position everywhere."""
    for node in ast.walk(ast.parse(source)):
        for target, value in unpackings(node):
            sizes = isinstance(value, ast.Attribute) and value.attr == "shape"
            for part in ast.walk(target):
                if isinstance(part, SEQUENCES) and len(part.elts) > MAX_UNPACKED and not sizes:
                    yield f"line {part.lineno}: {ast.unparse(part)}"


# The script, and code that breaks each rule ------------------------------------------------------

FLAT = "def f(x):\n" + "    x += 1\n" * 70
DEEP = "def f(x):\n" + "".join(4 * (i + 1) * " " + "if x:\n" for i in range(5)) + 24 * " " + "pass"

BREAKS = {  # rule: code that it finds fault with
    too_many_tokens: ["x = 1\n" * MAX_TOKENS],
    too_dense: ["x = f(1, 2, 3, 4, 5)\n", "x = f(1, 2, 3, 4)[0]  # 13\n# and a line of comment\n"],
    too_wide: ["x = 1  # " + "o" * 100],
    too_long_or_deep: [FLAT, DEEP],
    products_of_conditions: ["x = 'text' * (a > b)", "x = y * bool(z)", "x = (a or b) * 'c'"],
    tuple_assignments: ["a, b = x, y", "a, self.b = x.c, y.c", "a, b = x[0], f(x)"],
    named_lambdas: ["f = lambda x: x", "f: object = lambda: 0", "a, f = 1, lambda: 0"],
    walruses: ["def f():\n    return (a := 1) + (b := 2)", "if (a := 1) > (b := 2): pass"],
    starred_conditionals: ["f(*(x if y else []))", "[*a, *(b and c)]", "{**a, **(b if c else {})}"],
    long_unpackings: ["a, b, c, d = f()", "for i, (a, b, c, d) in x: pass", "a, *b, c, d = x"]}


@pytest.mark.parametrize("rule", BREAKS, ids=lambda rule: rule.__name__)
def test_script(rule):
    found = list(rule(SCRIPT.read_text(encoding="utf-8")))
    assert not found, "\n".join(found)
    assert all(list(rule(code)) for code in BREAKS[rule])


def test_tests():
    """Together: a file may be denser where another is less so."""
    sources = [path.read_text(encoding="utf-8") for path in TESTS.glob("*.py")]
    everything = "".join(sources)
    assert everything.count("\n") <= MAX_TEST_LINES
    assert not list(too_dense(everything))
    assert not list(too_wide(everything))
