"""Text as a reader sees it: one Unicode form, without characters that show nothing. For judges that look for words."""

from __future__ import annotations

import unicodedata

# without a glyph, and in no category of their own: joiners, Hangul and Khmer fillers, variation selectors
_IGNORED = frozenset(
    map(chr, (0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810), 0x3164, 0xFFA0, *range(0xFE00, 0xFE10)))
)
_SUPPLEMENT = range(0xE0100, 0xE01F0)  # more variation selectors
_OVERLAY = 1  # combining class of strokes through a letter


def visible_text(text: str) -> str:
    """
    NFKC without format, control and filler characters and strokes through letters. Letters that look like others of
    another script stay what they are.
    """
    kept = []
    for character in unicodedata.normalize("NFKC", text):
        unseen = unicodedata.category(character) in ("Cf", "Cc") and not character.isspace()
        unseen = unseen or character in _IGNORED or ord(character) in _SUPPLEMENT
        if not unseen and unicodedata.combining(character) != _OVERLAY:
            kept.append(character)
    return unicodedata.normalize("NFKC", "".join(kept))
