"""How a badge is drawn: a label and a number side by side, as SVG."""

import unicodedata
from html import escape

# The names and colours that badges elsewhere have.
PALETTE = {
    "brightgreen": "44cc11",
    "green": "97ca00",
    "yellowgreen": "a4a61d",
    "yellow": "dfb317",
    "orange": "fe7d37",
    "red": "e05d44",
    "blue": "007ec6",
    "grey": "555555",
    "lightgrey": "9f9f9f",
}

_HEIGHT = 20  # pixels
_PADDING = 6
_SIZE = 11  # of the letters
_FONTS = "Verdana,Geneva,DejaVu Sans,sans-serif"
_LABEL_COLOUR = "555555"

# The widths of Verdana's characters, which the others share or come near, in thousandths of the letters' size.
_WIDTHS = {
    character: width
    for width, characters in {
        269: "'",
        274: "il",
        344: "j",
        352: " f",
        364: ",.",
        394: "t",
        421: "I",
        427: "r",
        454: "()-/:;[\\]|J",
        459: '"',
        521: "cs",
        525: "z",
        545: "?",
        557: "L",
        575: "F",
        592: "kvxy",
        596: "e",
        601: "a",
        607: "o",
        616: "TY",
        623: "bdgpq",
        632: "E",
        633: "hnu",
        636: "$*0123456789_`{}",
        684: "AVSBXZ",
        695: "CKPR",
        727: "&",
        732: "U",
        751: "HN",
        771: "DG",
        787: "OQ",
        818: "#+<=>^w~",
        843: "M",
        973: "m",
        989: "W",
        1000: "@",
        1076: "%",
    }.items()
    for character in characters
}
_OTHER = 700
_WIDE = 1000  # Chinese, Japanese, Korean, and most pictures


def draw(label: str, message: str, colour: str) -> str:
    """A badge.

    :param colour: of the message's ground, as three or six hexadecimal digits.
    """
    label, message = _printable(label), _printable(message)
    left, right = _width(label), _width(message)
    width = left + right + 4 * _PADDING
    split = left + 2 * _PADDING
    whole = f"{label}: {message}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_HEIGHT}" role="img"'
        f' aria-label="{escape(whole)}">'
        f"<title>{escape(whole)}</title>"
        f'<path fill="#{_LABEL_COLOUR}" d="M3 0H{split}V{_HEIGHT}H3a3 3 0 0 1-3-3V3a3 3 0 0 1 3-3z"/>'
        f'<path fill="#{colour}" d="M{split} 0H{width - 3}a3 3 0 0 1 3 3v14a3 3 0 0 1-3 3H{split}z"/>'
        f'<g font-family="{_FONTS}" font-size="{_SIZE}" text-anchor="middle">'
        f"{_text(label, left, split / 2, _LABEL_COLOUR)}"
        f"{_text(message, right, (split + width) / 2, colour)}"
        "</g></svg>"
    )


def _text(text: str, width: int, middle: float, ground: str) -> str:
    # Whatever font is there, the words are as wide as the ground that was made for them.
    return (
        f'<text x="{middle:g}" y="14" textLength="{width}" lengthAdjust="spacingAndGlyphs"'
        f' fill="#{_ink(ground)}">{escape(text)}</text>'
    )


def _printable(text: str) -> str:
    """The text without the characters that XML cannot hold, and that names can."""
    return "".join("\ufffd" if character in "\ufffe\uffff" else character for character in text)


def _width(text: str) -> int:
    """In pixels, at least 1."""
    return max(1, round(sum(map(_advance, text)) * _SIZE / 1000))


def _advance(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return _WIDTHS.get(character, _WIDE if unicodedata.east_asian_width(character) in "WF" else _OTHER)


def _ink(ground: str) -> str:
    """White or black, whichever stands out more on `ground` (the contrast of WCAG 2)."""
    digits = ground if len(ground) == 6 else "".join(2 * digit for digit in ground)
    channels = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "ffffff" if 1.05 / (luminance + 0.05) >= (luminance + 0.05) / 0.05 else "000000"
