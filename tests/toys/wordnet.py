"""A few lines of WordNet's files, as its Debian package has them."""


def write_wordnet(share):
    """Below a folder like /usr/share."""
    (share / "wordnet").mkdir(parents=True)
    for part in ("noun", "verb", "adj", "adv"):
        (share / "wordnet" / f"data.{part}").write_text('1 | a small brown dog; "the dog barked loudly"\n')
