"""One plain form for answers written in LaTeX, markdown or Unicode: `\\dfrac{1}{2}` is 1/2.

    normal("\\\\left(-\\\\tfrac{\\\\sqrt 3}{2},\\\\ 50\\\\%\\\\right)")  ->  "(-sqrt(3)/2, 50%)"

Fractions become a/b, roots sqrt(a), powers a^b; spaces, sizes, fonts and the marks around
mathematics go. Nothing is worked out here, and a text that is no LaTeX stays as it is.
"""

import re
from collections.abc import Callable, Iterator

# Groups within groups beyond this are read as text: it bounds the recursion.
MAX_NESTING = 40
_TOKEN = re.compile(r"\\[A-Za-z]+\*?|\\.|[{}]|[^\\{}]", re.DOTALL)
# Commands whose group is text or a font's: its content stands as it is.
_FONTS = frozenset(
    "text textbf textit textrm textsf texttt textnormal textup mathrm mathbf mathit mathsf mathtt"
    " mathbb mathcal mathfrak mathnormal operatorname operatorname* mbox hbox emph boldsymbol bm"
    " underline boxed fbox framebox pmb".split()
)
# Commands that set size, style or font of all that follows in their group.
_SWITCHES = frozenset(
    "displaystyle textstyle scriptstyle scriptscriptstyle rm bf it sf tt sl tiny scriptsize small"
    " footnotesize normalsize large Large LARGE huge Huge bfseries itshape rmfamily".split()
)
# Commands that say how to set what follows: their argument is no part of it.
_SETTINGS = frozenset(
    "hspace hskip vspace phantom hphantom vphantom label tag color textcolor colorbox".split()
)
_NOTHING = frozenset(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr limits nolimits mathstrut"
    " ( ) [ ] !".split()
)
_SPACES = frozenset((",", ";", ":", " ", "\n", ">", "quad", "qquad", "thinspace", "enspace", "/"))
_SYMBOLS = {
    "cdot": "*", "times": "*", "ast": "*", "div": "/", "pm": "±", "mp": "∓", "circ": "°",
    "degree": "°", "infty": "inf", "le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=",
    "geq": ">=", "geqslant": ">=", "ne": "!=", "neq": "!=", "lt": "<", "gt": ">", "approx": "≈",
    "simeq": "≈", "cup": " U ", "cap": " cap ", "emptyset": "{}", "varnothing": "{}", "in": " in ",
    "colon": ":", "lbrace": "{", "rbrace": "}", "{": "{", "}": "}", "%": "%", "$": "$", "#": "#",
    "&": "&", "_": "_", "|": "|", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|",
    "ldots": "...", "dots": "...", "cdots": "...", "minus": "-", "varepsilon": "epsilon",
    "varphi": "phi", "land": " and ", "lor": " or ", "dollar": "$", "pounds": "£", "euro": "€",
    "\\": ";", "backslash": "\\", "ohm": "ohm", "Omega": "ohm", "micro": "\u00b5", "prime": "'",
}  # fmt: skip
_UNICODE = {
    **{chr(0xFEE0 + code): chr(code) for code in (*range(0x21, 0x30), *range(0x3A, 0x5B))},
    **dict.fromkeys("−–—‐‑﹣－", "-"), **dict.fromkeys("×⋅·∙∗✕", "*"), "÷": "/", "⁄": "/", "∕": "/",
    **dict.fromkeys("\u00a0\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "), "√": r"\sqrt ",
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""), "π": r"\pi ", "∞": r"\infty ",
    "≤": "<=", "≥": ">=", "≠": "!=", "≃": "≈", "∼": "≈", "∪": r"\cup ", "∩": r"\cap ",
    "∅": r"\emptyset ", "∈": r"\in ", "ℝ": "R", "ℤ": "Z", "ℕ": "N", "º": "°", "℃": "°C", "％": "%",
    **dict.fromkeys("“”„", '"'),
    **dict.fromkeys("‘’′", "'"), "\u03a9": "ohm", "\u2126": "ohm", "\u03bc": "\u00b5",
    "½": r"\frac12 ", "⅓": r"\frac13 ", "⅔": r"\frac23 ", "¼": r"\frac14 ", "¾": r"\frac34 ",
    "⅕": r"\frac15 ", "⅖": r"\frac25 ", "⅗": r"\frac35 ", "⅘": r"\frac45 ", "⅙": r"\frac16 ",
    "⅚": r"\frac56 ", "⅛": r"\frac18 ", "⅜": r"\frac38 ", "⅝": r"\frac58 ", "⅞": r"\frac78 ",
}  # fmt: skip
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n"))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-"))
_RAISED_RUN = re.compile(f"[{''.join(_RAISED)}]+")
_LOWERED_RUN = re.compile(f"[{''.join(_LOWERED)}]+")
_TRANSLATION = str.maketrans(_UNICODE)
# What needs no brackets above a fraction's line, below it, as an exponent, and as an index.
_OVER = re.compile(r"[\w.%°]+|\w+\([^()]*\)|\([^()]*\)", re.ASCII)
_UNDER = re.compile(r"[\d.%]+|[A-Za-z]|[A-Za-z]{4,}|pi|sqrt\([^()]*\)|\([^()]*\)", re.ASCII)
_RAISES = re.compile(r"[-+]?(?:[\d.]+|[A-Za-z])|\u00b0", re.ASCII)
_INDEX = re.compile(r"[-+]?[\w.]+", re.ASCII)


def normal(text: str) -> str:
    """The plain form of an answer, spaces made one."""
    text = _RAISED_RUN.sub(lambda run: f"^{{{''.join(map(_RAISED.get, run[0]))}}}", text)
    text = _LOWERED_RUN.sub(lambda run: f"_{{{''.join(map(_LOWERED.get, run[0]))}}}", text)
    text = text.translate(_TRANSLATION).replace("{,}", ",")
    tokens = _Tokens(match[0] for match in _TOKEN.finditer(text))
    plain = " ".join(tokens.group(0).split())
    plain = re.sub(r" ?([\^_]) ?", r"\1", plain)
    plain = re.sub(r"(?<=[(\[{]) | (?=[)\]},;%°!])", "", plain)
    return plain.replace("^°", "°").strip()


class _Tokens:
    """Reads groups from the left; each token once."""

    def __init__(self, tokens: Iterator[str]) -> None:
        self._tokens = list(tokens)
        self._place = 0

    def _peek(self) -> str:
        return self._tokens[self._place] if self._place < len(self._tokens) else ""

    def _next(self) -> str:
        token = self._peek()
        self._place += 1
        return token

    def group(self, depth: int) -> str:
        """The plain form up to the end of the group that is being read."""
        parts: list[str] = []
        while token := self._next():
            if token == "}":
                if depth:
                    break
                continue  # an end without a beginning
            if token == r"\over" and depth:
                over, under = "".join(parts).strip(), self.group(depth).strip()
                return _fraction(over, under)
            parts.append(self._plain(token, depth, parts))
        return "".join(parts)

    def _argument(self, depth: int) -> str:
        """The group or the one token that a command takes."""
        while self._peek().isspace():
            self._next()
        token = self._next()
        return self._plain(token, depth, []).strip() if token and token != "}" else ""

    def _plain(self, token: str, depth: int, before: list[str]) -> str:
        if depth > MAX_NESTING:
            return token
        if token == "{":
            return self.group(depth + 1)
        if token == "$":
            return ""
        if token in ("^", "_"):
            if self._peek() in ("-", "+"):  # s^-2, as it is written outside LaTeX
                return token + self._next()
            index = self._argument(depth + 1)
            plain = (_RAISES if token == "^" else _INDEX).fullmatch(index)
            return token + (index if plain else f"({index})")
        if not token.startswith("\\") or len(token) == 1:
            return " " if token in "~\t\n" else token
        return self._command(token[1:], depth + 1, before)

    def _command(self, name: str, depth: int, before: list[str]) -> str:
        if name in ("frac", "dfrac", "tfrac", "cfrac", "sfrac", "nicefrac"):
            over, under = self._argument(depth), self._argument(depth)
            # A whole number before it makes a mixed number: 2 1/2.
            return _space(before, str.isalnum) + _fraction(over, under)
        if name in ("binom", "dbinom", "tbinom"):
            return f"binom({self._argument(depth)}, {self._argument(depth)})"
        if name == "sqrt":
            return _space(before, str.isalpha) + self._root(depth)
        if name in ("overline", "bar", "vec", "hat"):
            return f"{name}({self._argument(depth)})"
        if name in ("begin", "end"):
            self._argument(depth)
            return "[" if name == "begin" else "]"
        if name in _SETTINGS:
            self._argument(depth)
            return " "
        if name in _SWITCHES:
            return " "
        if name in _FONTS:
            return f" {self._argument(depth)} " if self._peek() in ("{", " ") else " "
        if name in _NOTHING:
            if name in ("left", "right") and self._peek() == ".":
                self._next()
            return ""
        if name in _SPACES:
            return " "
        if name in _SYMBOLS:
            return _SYMBOLS[name]
        return f" {name} " if name[0].isalpha() else name

    def _root(self, depth: int) -> str:
        while self._peek().isspace():
            self._next()
        degree = ""
        if self._peek() == "[":
            self._next()
            while self._peek() not in ("]", ""):
                degree += self._next()
            self._next()
        inner = self._argument(depth)
        return f"root({degree.strip()}, {inner})" if degree.strip() else f"sqrt({inner})"


def _fraction(over: str, under: str) -> str:
    over = over if _OVER.fullmatch(over) else f"({over})"
    return f"{over}/{under if _UNDER.fullmatch(under) else f'({under})'}"


def _space(before: list[str], joins: Callable[[str], bool]) -> str:
    """A space where the text so far ends in what would become one with what follows."""
    return " " if before and joins(before[-1][-1:]) else ""
