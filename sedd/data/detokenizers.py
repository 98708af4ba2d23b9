"""Text as its authors wrote it, from data sets that come as separated words.

Published perplexities of models of running text are on data sets cleaned by these rules, whose
order matters. Where they do something odd (wikitext's stand-alone N becomes 1) it is kept: figures
are compared on the same text.
"""

import re
from collections.abc import Callable

Detokenizer = Callable[[str], str]


def _replace(text: str, pairs: dict[str, str]) -> str:
    for old, new in pairs.items():
        text = text.replace(old, new)
    return text


def wikitext(text: str) -> str:
    """WikiText: ``@-@`` and its like, spaces before punctuation and within brackets and quotes."""
    text = _replace(text, {"s '": "s'", " @-@ ": "-", " @,@ ": ",", " @.@ ": "."})
    text = _replace(text, {f" {mark} ": f"{mark} " for mark in ":;.!?,"})
    for begin, end in ("()", "[]", "{}", '""', "''"):
        inside = rf"{re.escape(begin)}\s*([^{re.escape(end)}]*?)\s*{re.escape(end)}"
        text = re.sub(inside, lambda m, b=begin, e=end: f"{b}{m[1]}{e}", text)
    headings = {"= = = =": "====", "= = =": "===", "= =": "=="}
    return _replace(
        text, headings | {" ° ": "°", " \n": "\n", "\n ": "\n", " N ": " 1 ", " 's": "'s"}
    )


def ptb(text: str) -> str:
    """Penn Treebank: contractions joined, the number N as 1, a rare word as a question mark."""
    text = _replace(text, {" 's": "'s", "s ' ": "s' ", " n't": "n't", " \n ": "\n", "\\/": "/"})
    while " N " in text:  # neighbours share a space: "N N" takes two rounds
        text = text.replace(" N ", " 1 ")
    return _replace(text, {"$ 1": "$1", "# 1": "#1", "<unk>": "?"})


def lm1b(text: str) -> str:
    """One Billion Words: addresses, contractions, punctuation, brackets, quotes and currencies."""
    text = _replace(text, {"http : / / ": "http://", "https : / / ": "https://"})
    text = re.sub(r" '(\w+)", r"'\1", text)
    text = re.sub(r" (\w+) \. ", r" \1. ", text)
    text = re.sub(r" (\w+) \.$", r" \1.", text)
    for mark in "?!":
        text = re.sub(rf" \{mark}$", mark, text.replace(f" {mark} ", f"{mark} "))
    text = _replace(text, {" , ": ", ", " : ": ": ", " ; ": "; ", " / ": "/"})
    for begin, end in ('""', "''", "()", "[]"):
        inside = rf"\{begin} ([^\{begin}\{end}]+) \{end}"
        text = re.sub(inside, lambda m, b=begin, e=end: f"{b}{m[1]}{e}", text)
    return _replace(text, {"$ ": "$", "£ ": "£"})


def lambada(text: str) -> str:
    """LAMBADA: straight quotation marks; a passage begins a line."""
    return "\n" + _replace(text, {"“": '"', "”": '"'}).strip()


def scientific_papers(text: str) -> str:
    """PubMed and arXiv articles: the rules of WikiText, then those of One Billion Words."""
    return lm1b(wikitext(text))


DETOKENIZERS: dict[str, Detokenizer] = {
    "wikitext2": wikitext,
    "wikitext103": wikitext,
    "ptb": ptb,
    "lm1b": lm1b,
    "lambada": lambada,
    "pubmed": scientific_papers,
    "arxiv": scientific_papers,
}
"""By data set; ``ag_news`` and the others are written as they are read."""
