"""Words that tasks are made of."""

from nemotron_jax.environments.draws import Draws

FIRST = tuple(
    "Ana Ben Chloe Dmitri Elif Farid Grace Hiro Ines Jonas Keiko Liam Mara Nils Olga Pablo Qing"
    " Rosa Sven Tara Umar Vera Wim Ximena Yusuf Zoe".split()
)
LAST = tuple(
    "Adler Bauer Costa Dahl Evans Fischer Garcia Haas Ito Jensen Kaya Lopez Moreau Novak Okafor"
    " Park Quinn Rossi Sato Tanaka Ueda Vogel Wagner Xu Young Zhang".split()
)
CITIES = tuple(
    "Accra Bergen Cairo Dublin Essen Florence Geneva Hanoi Izmir Jakarta Kyoto Lima Malmo Nairobi"
    " Oslo Porto Quito Riga Seoul Turin Utrecht Vienna Warsaw Zagreb".split()
)
THINGS = tuple(
    "apple basket candle drum engine feather guitar hammer island jacket kettle ladder mirror"
    " needle orange pencil quilt ribbon saddle ticket umbrella violin wagon zipper".split()
)
COLOURS = tuple("amber black blue brown green grey orange pink purple red white yellow".split())
FILLER = tuple(
    "after along always bright calm clear deep every fine gentle glad green happy high inside keen"
    " light long many mild near new often old open plain quick quiet round simple small soft still"
    " strong sunny tall under very warm wide young".split()
)
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def coined(draws: Draws, syllables: int = 2) -> str:
    """A pronounceable word that means nothing."""
    pairs = range(syllables)
    return "".join(draws.choice(_CONSONANTS) + draws.choice(_VOWELS) for _ in pairs)


def coined_names(draws: Draws, count: int, syllables: int = 3) -> list[str]:
    """Different coined words with a capital."""
    names: list[str] = []
    while len(names) < count:
        name = coined(draws, syllables).capitalize()
        if name not in names:
            names.append(name)
    return names


def ask(text: str) -> list[dict]:
    """The opening of a task that is one user message."""
    return [{"role": "user", "content": text}]
