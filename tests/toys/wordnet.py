"""A few lines of WordNet's files, as in its Debian package."""


def write_wordnet(share):
    """Write them below a folder like /usr/share."""
    (share / "wordnet").mkdir(parents=True)
    for part in ("noun", "verb", "adj", "adv"):
        (share / "wordnet" / f"data.{part}").write_text('1 | a small brown dog; "the dog barked loudly"\n')
