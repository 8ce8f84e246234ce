"""Count the tokens of a completion that say something: not blank, and no repetition of others.

A length that is rewarded must not be earned by white space or by a word said over and over. It is
about repetition and not about sense: random words, labels in ever another order or base64 count as
text does.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import groupby

COPY = 16  # tokens: so much said again word for word is a repetition wherever it stands
# They write nothing although Unicode counts them as letters, marks or symbols: fillers of Hangul
# and Khmer, Mongolian and other variation selectors, the grapheme joiner, the blank Braille cell.
_BLANK = {
    *map(chr, (0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0)),
    *map(chr, range(0x180B, 0x1810)),
    *map(chr, range(0xFE00, 0xFE10)),
    *map(chr, range(0xE0100, 0xE01F0)),
}


def text_length(pieces: Sequence[str]) -> int:
    """Count the tokens that are neither blank nor filler. A last "", the stop token, counts too.

    A token is blank where it writes nothing that can be seen: white space, control and other
    invisible characters. Tokens are filler where they repeat those that stand d tokens before them
    (blank ones left out, in any case) over at least min(2 d, COPY) tokens: the third and every
    later copy in a row of a word or phrase, with its second, and any COPY tokens said again. The
    first copy always counts. "no, no" is no filler, and neither are phrases that recur between
    others.

    pieces [C]: what each token of a completion writes, "" for a control token.
    """
    said = [key for piece in pieces if (key := _folded(piece))]
    stop = len(pieces) > 0 and pieces[-1] == ""
    return len(said) - sum(_repeats(said)) + stop


def _repeats(said: Sequence[str]) -> list[bool]:
    """Mark the tokens that repeat earlier ones. Takes linear time."""
    marked = [False] * len(said)
    for distance in range(1, COPY // 2):
        run = 0  # tokens up to this one that equal those `distance` before
        for i in range(distance, len(said)):
            run = run + 1 if said[i] == said[i - distance] else 0
            if run >= 2 * distance:
                marked[i - 2 * distance + 1 : i + 1] = [True] * (2 * distance)
    earlier: set[tuple[str, ...]] = set()
    for end in range(COPY, len(said) + 1):
        sequence = tuple(said[end - COPY : end])
        if sequence in earlier:
            marked[end - COPY : end] = [True] * COPY
        earlier.add(sequence)
    return marked


@lru_cache(maxsize=1 << 18)
def _folded(piece: str) -> str:
    """Keep what can be seen of a token, in lower case and each run of a character once."""
    seen: Iterable[str] = (
        character
        for character in unicodedata.normalize("NFKC", piece)
        if unicodedata.category(character)[0] not in "ZC" and character not in _BLANK
    )
    return "".join(character for character, _ in groupby("".join(seen).casefold()))
