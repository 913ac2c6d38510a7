"""Compiles grammars one by one for `trials`, whose process this is; a costly one ends it.

It is run as a file and imports nothing of the package, so that it starts soon and stays small.
What comes in are pickles: first an object with the tokens and limits, then grammars. For each of
these its error goes out, or an empty text, and the seconds of CPU that it took.
"""

import contextlib
import pickle
import resource
import signal
import sys
import time

import llguidance


class View:
    """A tokenizer as llguidance asks for one; here any spelling of a text does."""

    def __init__(self, tokens: list[bytes], special: list[int], end: int) -> None:
        self.tokens, self.special_token_ids = tokens, special
        self.eos_token_id, self.bos_token_id = end, None
        others = set(range(len(tokens))) - set(special)
        ids = {tokens[number]: number for number in sorted(others)}
        self._bytes = [ids.get(bytes([byte]), end) for byte in range(256)]

    def __call__(self, text: bytes) -> list[int]:
        """The ids of a text byte by byte."""
        return [self._bytes[byte] for byte in text]


def main() -> None:
    """Answer until nothing more comes in."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server's own, which lets what runs end
    said = pickle.load(sys.stdin.buffer)
    for limit, most in ((resource.RLIMIT_AS, said["most_bytes"]), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # macOS bounds no addresses
            resource.setrlimit(limit, (most, most))
    view = View(said["tokens"], said["special"], said["end"])
    library = llguidance.LLTokenizer(llguidance.TokenizerWrapper(view))
    timers = {signal.ITIMER_PROF: said["most_cpu_s"], signal.ITIMER_REAL: said["most_s"]}
    while True:
        try:
            source = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        began = time.process_time()
        for timer, seconds in timers.items():
            signal.setitimer(timer, seconds)  # the system ends the process then, whatever it is in
        matcher = llguidance.LLMatcher(library, source, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # what is too large for a first token is too large
        for timer in timers:
            signal.setitimer(timer, 0)
        error = matcher.get_error() if matcher.is_error() else ""
        pickle.dump((error, time.process_time() - began), sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
