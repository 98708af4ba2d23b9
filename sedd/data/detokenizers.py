"""Restore running text from data sets whose words and punctuation are separated by spaces.

Published perplexities of models of running text are computed on data sets that were cleaned by
these rules. Figures can be compared only on equal text. The rules and their order are therefore
those of the published code, mistakes included: for example, a word N of WikiText becomes 1.
"""

import re
from collections.abc import Callable

Detokenizer = Callable[[str], str]


def _replace(text: str, pairs: dict[str, str]) -> str:
    """Replace each key by its value, one key after the other."""
    for old, new in pairs.items():
        text = text.replace(old, new)
    return text


def wikitext(text: str) -> str:
    """WikiText: join ``@-@``, ``@,@`` and ``@.@``, punctuation, brackets, quotes and headings."""
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
    """Penn Treebank: join contractions, write a number N as 1 and a rare word as ``?``."""
    text = _replace(text, {" 's": "'s", "s ' ": "s' ", " n't": "n't", " \n ": "\n", "\\/": "/"})
    while " N " in text:  # in " N N " the words share a space: one pass replaces only the first
        text = text.replace(" N ", " 1 ")
    return _replace(text, {"$ 1": "$1", "# 1": "#1", "<unk>": "?"})


def lm1b(text: str) -> str:
    """One Billion Words: join addresses, contractions, punctuation, brackets and currencies."""
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
    """LAMBADA: write straight quotation marks, and begin each passage on a new line."""
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
"""The detokenizer of each benchmark; other data sets, such as ``ag_news``, need none."""
