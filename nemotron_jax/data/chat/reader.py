"""The text of a turn as it comes, read up to tags whose ends may still be missing."""

import re

from nemotron_jax.data.chat.render import ANSWER, CALL, CALL_END, END, THINK
from nemotron_jax.environments.sound import sound_text

FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
_TEXT_TAGS = (ANSWER, CALL, CALL_END, END, PARAMETER_END)  # that end a stretch of text
LONGEST = max(map(len, (*_TEXT_TAGS, PARAMETER, FUNCTION, FUNCTION_END, THINK)))

BLANK = re.compile(r"\s*")


def tags_of(*tags: str) -> re.Pattern[str]:
    """A pattern that finds the first of the tags."""
    return re.compile("|".join(map(re.escape, tags)))


class TextReader:
    """Where a parser stands in its text. Line ends next to tags belong to the tags."""

    def __init__(self) -> None:
        self._text, self._at = "", 0  # what is not yet read: text[at:]
        self._last = False  # no more text will come
        self._skip_newline = False  # the next line end belongs to the tag before it
        self._dropped_newline = False  # whether the last tag had a line end before it
        self._gap: list[str] = []  # a tag and blanks behind it that may turn out to be text
        self._raw: list[str] = []  # the call being read, as written

    def _feed(self, text: str) -> None:
        # What leaves the parser can be written in UTF-8.
        self._text, self._at = self._text[self._at :] + sound_text(text), 0

    def _until(self, tags: re.Pattern[str]) -> tuple[str, str | None]:
        """Text up to the next tag, less one line end before it, and the tag, which is read too.

        Without a tag it is the text that is surely none of one, with None.
        """
        if self._skip_newline and self._at < len(self._text):
            if self._text[self._at] == "\n":
                self._at += 1
                self._raw.append("\n")  # read only while a call is open
            self._skip_newline = False
        start, match = self._at, tags.search(self._text, self._at)
        self._dropped_newline = False
        if match is not None:
            self._at, stop = match.end(), match.start()
            if stop > start and self._text[stop - 1] == "\n" and match.group() != END:
                self._dropped_newline = True
                stop -= 1
            return self._text[start:stop], match.group()
        stop = len(self._text)
        if not self._last:
            # The start of a tag, and the line end before one, wait for what follows.
            sign = self._text.rfind("<", max(start, stop - LONGEST))
            if sign >= 0 and any(tag.startswith(self._text[sign:]) for tag in _TEXT_TAGS):
                stop = sign
            if stop > start and self._text[stop - 1] == "\n":
                stop -= 1
        self._at = stop
        return self._text[start:stop], None

    def _after_blanks(self) -> str:
        """The next few characters behind blanks, which join the gap."""
        end = BLANK.match(self._text, self._at).end()
        if end > self._at:
            self._gap.append(self._text[self._at : end])
            self._at = end
        return self._text[self._at : self._at + LONGEST]

    def _reread_newline(self) -> str:
        """The gap less a last line end, which is read again: it may belong to a tag right here."""
        gap = "".join(self._gap)
        if not gap.endswith("\n"):
            return gap
        if self._at:
            self._at -= 1
        else:  # it came with an earlier piece
            self._text = "\n" + self._text
        return gap[:-1]
