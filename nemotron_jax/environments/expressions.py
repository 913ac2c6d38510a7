"""Whether two expressions are the same function, tried at points: x^2 + 1 and 1 + x^2.

Expressions are in the plain form of latex.py. Whole numbers and fractions stay exact; roots, pi and
functions are floats. Sizes are bounded, so that no power or factorial takes long.
"""

import cmath
import hashlib
import math
import re
from collections.abc import Callable
from fractions import Fraction

Value = Fraction | complex
# Tokens of an expression, brackets within brackets, bits of an exact value, and points tried.
MAX_TOKENS, MAX_NESTING, MAX_BITS, POINTS = 200, 40, 4000, 3
MAX_FACTORIAL = 60
# Relative difference of two floats that come from the same value by other ways, and the one of a
# float and an exact value: a rounded decimal is not the root that it stands for.
_ROUNDING, _EXACT_ROUNDING = 1e-11, 1e-14
_TOKEN = re.compile(
    r"\s*(?:(\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})|([A-Za-z]+(?:_\(?\w{1,9}\)?)?'?)|([-+*/^()!|,°]))",
    re.ASCII,
)
_CONSTANTS = {"pi": math.pi, "e": math.e, "i": 1j}
_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "exp": cmath.exp, "ln": cmath.log,
    "log": cmath.log10, "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan,
    "sinh": cmath.sinh, "cosh": cmath.cosh, "tanh": cmath.tanh, "abs": abs,
    "sec": lambda x: 1 / cmath.cos(x), "csc": lambda x: 1 / cmath.sin(x),
    "cot": lambda x: 1 / cmath.tan(x),
}  # fmt: skip
_LETTERS = frozenset(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon"
    " phi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi ohm".split()
)
NAMES = frozenset({*_FUNCTIONS, *_CONSTANTS, *_LETTERS, "sqrt", "root", "binom"})
# Longer runs of letters are words, not products of variables.
_MOST_VARIABLES = 3


def same_function(one: str, other: str) -> bool:
    """Whether two expressions are equal at every point tried; False where one is none."""
    try:
        first, second = _Expression(one), _Expression(other)
        return all(_close(first.at(point), second.at(point)) for point in range(POINTS))
    except (ValueError, ArithmeticError, RecursionError):
        return False


def _close(one: Value, other: Value) -> bool:
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    exact = isinstance(one, Fraction) or isinstance(other, Fraction)
    a, b = complex(one), complex(other)
    return abs(a - b) <= (_EXACT_ROUNDING if exact else _ROUNDING) * max(abs(a), abs(b))


class _Expression:
    """Reads tokens by descent and works their value out on the way."""

    def __init__(self, text: str) -> None:
        self._tokens: list[str] = []
        place, text = 0, text.strip()
        while place < len(text):
            match = _TOKEN.match(text, place)
            if match is None or len(self._tokens) >= MAX_TOKENS:
                raise ValueError("no expression")
            self._tokens += _parts(match[2]) if match[2] else [match[1] or match[3]]
            place = match.end()
        if not self._tokens:
            raise ValueError("no expression")

    def at(self, point: int) -> Value:
        """The value where each variable has a number of its own, made from its name."""
        self._place, self._depth, self._point = 0, 0, point
        value = self._sum()
        if self._peek():
            raise ValueError(f"{self._peek()!r} is left over")
        return value

    def _peek(self) -> str:
        return self._tokens[self._place] if self._place < len(self._tokens) else ""

    def _take(self, *tokens: str) -> str:
        token = self._peek()
        if token and token in tokens:
            self._place += 1
            return token
        return ""

    def _sum(self) -> Value:
        self._depth += 1
        if self._depth > MAX_NESTING:
            raise ValueError("too many brackets")
        value = self._product()
        while sign := self._take("+", "-"):
            after = self._product()
            value = _bounded(value + after if sign == "+" else value - after)
        self._depth -= 1
        return value

    def _product(self) -> Value:
        value = self._signed()
        while True:
            if self._take("*"):
                value = _bounded(value * self._signed())
            elif self._take("/"):
                value = _bounded(value / self._signed())
            elif self._peek() and self._peek() not in "+-*/^)!|,°":
                value = _bounded(value * self._power())
            else:
                return value

    def _signed(self) -> Value:
        sign = self._take("+", "-")
        if not sign:
            return self._power()
        if self._peek() in ("+", "-"):
            raise ValueError("two signs")
        value = self._power()
        return -value if sign == "-" else value

    def _power(self) -> Value:
        base = self._atom()
        while mark := self._take("!", "°"):
            base = _factorial(base) if mark == "!" else complex(base) * math.pi / 180
        return _power(base, self._signed()) if self._take("^") else base

    def _atom(self) -> Value:
        token = self._peek()
        self._place += 1
        if token == "(":
            value = self._sum()
            self._close(")")
            return value
        if token == "|":
            value = self._sum()
            self._close("|")
            return abs(value)
        if token[:1].isdigit() or token[:1] == ".":
            return Fraction(token)
        if token in ("sqrt", "root", "binom"):
            return self._of_arguments(token)
        if token in _FUNCTIONS or token.startswith("log_"):
            return self._function(token)
        if token in _CONSTANTS:
            return complex(_CONSTANTS[token])
        if token[:1].isalpha():
            digest = hashlib.sha256(f"{token} {self._point}".encode()).digest()
            return 1 + Fraction(int.from_bytes(digest[:2], "big"), 65_537)
        raise ValueError(f"{token!r} stands where a value should")

    def _close(self, mark: str) -> None:
        if not self._take(mark):
            raise ValueError(f"{mark!r} is missing")

    def _of_arguments(self, name: str) -> Value:
        self._close("(")
        first = self._sum()
        if name == "sqrt":
            self._close(")")
            return _power(first, Fraction(1, 2))
        self._close(",")
        second = self._sum()
        self._close(")")
        if name == "root":
            return _power(second, 1 / first)
        whole = all(isinstance(n, Fraction) and n.denominator == 1 for n in (first, second))
        if not whole or not 0 <= second <= first <= MAX_FACTORIAL:
            raise ValueError("binomial coefficients of small whole numbers only")
        return Fraction(math.comb(int(first), int(second)))

    def _argument(self) -> Value:
        """What stands in brackets behind a function, or all that is joined to it: sin 2x."""
        alone = self._peek() in ("(", "|")
        value = self._signed()
        while not alone and (self._peek()[:1].isalnum() and self._peek() not in _FUNCTIONS):
            value = _bounded(value * self._power())
        return value

    def _function(self, name: str) -> Value:
        exponent = self._signed() if self._take("^") else Fraction(1)
        if exponent < 1 if isinstance(exponent, Fraction) else True:
            raise ValueError("an inverse or a power of a function that is not clear")
        argument = complex(self._argument())
        if name.startswith("log_"):
            base = name[4:].strip("()")
            value = cmath.log(argument) / cmath.log(math.e if base == "e" else float(base))
        else:
            value = complex(_FUNCTIONS[name](argument))
        return _power(_bounded(value), exponent)


def _parts(word: str) -> list[str]:
    """A word as one name, or as the variables that it is a product of."""
    head = word.partition("_")[0].rstrip("'")
    if len(head) == 1 or head in NAMES:
        return [word]
    if len(word) <= _MOST_VARIABLES and word.isalpha():
        return list(word)
    raise ValueError(f"{word!r} is a word")


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if exponent.denominator == 1 and bits * abs(exponent.numerator) <= MAX_BITS:
            return base ** int(exponent)
        if exponent == Fraction(1, 2) and base >= 0:
            roots = math.isqrt(base.numerator), math.isqrt(base.denominator)
            if Fraction(*roots) ** 2 == base:
                return Fraction(*roots)
    return _bounded(complex(base) ** complex(exponent))


def _factorial(value: Value) -> Value:
    if not isinstance(value, Fraction) or not 0 <= value <= MAX_FACTORIAL:
        raise ValueError("factorials of small numbers only")
    if value.denominator != 1:  # a variable's number
        return complex(math.gamma(value + 1))
    return Fraction(math.factorial(int(value)))


def _bounded(value: Value) -> Value:
    if isinstance(value, Fraction):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
            raise ValueError("too large")
    elif not cmath.isfinite(value):
        raise ValueError("not finite")
    return value
