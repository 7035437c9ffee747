"""A sample's digest covers what a run trains on, nothing else, and is the same everywhere."""

from dataclasses import replace

import pytest

from mirage_dist.data.sample import Sample, stream_digest

SAMPLE = Sample("7", "a/b.png", "What’s this?", "A lathe.", True, "tools", "x.json", (("Hello?", "Hello."),))


def test_the_digest_is_a_fixed_function_of_the_content():
    # Pinned: a changed digest would make every run on disk look as if its data had changed.
    assert SAMPLE.digest() == "2810d904bb3802369c80f4572a4de8c5a7fccdf5c605155f832c3a69b49851c4"


@pytest.mark.parametrize(
    "change",
    [
        {"id": "8"},
        {"image": "a/c.png"},
        {"image": None},
        {"question": "What's this?"},
        {"answer": "A lathe"},
        {"safe": False},
        {"category": ""},
        {"history": ()},
        {"history": (("Hello?", "Hello. "),)},
        {"history": (("Hello?Hello.", ""),)},
    ],
    ids=str,
)
def test_what_a_run_trains_on_changes_the_digest(change):
    assert replace(SAMPLE, **change).digest() != SAMPLE.digest()


@pytest.mark.parametrize("change", [{"source": "y.json"}, {"references": ("A lathe.",)}, {"begun": "Sure"}], ids=str)
def test_the_rest_does_not(change):
    assert replace(SAMPLE, **change).digest() == SAMPLE.digest()


def test_text_moved_from_one_field_to_the_next_is_another_sample():
    assert replace(SAMPLE, question="What’s this?A", answer=" lathe.").digest() != SAMPLE.digest()


def test_a_lone_surrogate_has_a_digest_too():
    assert replace(SAMPLE, answer="\ud800").digest() != SAMPLE.digest()  # JSON files can hold one


def test_a_streams_digest_depends_on_its_samples_their_order_and_their_number():
    other = replace(SAMPLE, id="8")
    digests = {stream_digest(s) for s in ([], [SAMPLE], [SAMPLE, SAMPLE], [SAMPLE, other], [other, SAMPLE])}
    assert len(digests) == 5
    assert stream_digest(iter([SAMPLE, other])) == stream_digest([SAMPLE, other])
