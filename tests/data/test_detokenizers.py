"""What each data set's rules make of its text; every case is a rule."""

import pytest

from sedd.data.detokenizers import DETOKENIZERS, lambada, lm1b, ptb, scientific_papers, wikitext

CASES = [
    (wikitext, " = Title = \n", " = Title =\n"),
    (wikitext, " = = Part = = \n", " == Part ==\n"),
    (wikitext, " = = = Part = = = \n", " === Part ===\n"),
    (wikitext, " = = = = A = = = = \n", " ==== A ====\n"),
    (wikitext, "a well @-@ known 1 @,@ 000 or 2 @.@ 5", "a well-known 1,000 or 2.5"),
    (
        wikitext,
        "one , two ; three : four . Five ! Six ? Seven",
        "one, two; three: four. Five! Six? Seven",
    ),
    (wikitext, "( a ) [ b ] { c }", "(a) [b] {c}"),
    (wikitext, 'he said " yes " to it', 'he said "yes" to it'),
    (wikitext, "the ' last ' one", "the 'last' one"),
    (wikitext, "the cat 's mat", "the cat's mat"),
    (wikitext, "20 ° C", "20°C"),
    (wikitext, "dogs ' tails", "dogs' tails"),
    (wikitext, "a N b", "a 1 b"),
    (ptb, "mr. <unk> does n't know", "mr. ? doesn't know"),
    (ptb, "the cat 's mat", "the cat's mat"),
    (ptb, "the dogs ' tails", "the dogs' tails"),
    (ptb, "$ N N million or # N , a N N N b", "$1 1 million or #1 , a 1 1 1 b"),
    (ptb, "profit\\/loss", "profit/loss"),
    (ptb, "one \n two", "one\ntwo"),
    (lm1b, "see http : / / a and https : / / b", "see http://a and https://b"),
    (lm1b, "They 're here . And there .", "They're here. And there."),
    (lm1b, "Is it ? Yes ! So ?", "Is it? Yes! So?"),
    (lm1b, "Stop !", "Stop!"),
    (lm1b, "a , b : c ; d / e", "a, b: c; d/e"),
    (lm1b, '( a ) [ b ] " c "', '(a) [b] "c"'),
    (lm1b, "$ 5 and £ 6", "$5 and £6"),
    (lambada, " “yes”, he said ", '\n"yes", he said'),
    (scientific_papers, "a , b @-@ c d .", "a, b-c d."),
]


@pytest.mark.parametrize(("function", "text", "clean"), CASES)
def test_rules(function, text, clean):
    assert function(text) == clean


@pytest.mark.parametrize("function", [wikitext, ptb, lm1b, scientific_papers])
def test_ordinary_text_is_left_alone(function):
    text = "A cat (and a dog) sat: there.\n\nIt's well-known, isn't it?"
    assert function(text) == text


def test_by_data_set():
    assert DETOKENIZERS["wikitext2"] is DETOKENIZERS["wikitext103"] is wikitext
    assert "ag_news" not in DETOKENIZERS
