"""What is wrong with a data set, said in one sentence."""


class DataError(ValueError):
    """A data set that cannot be used; the message names the files and the remedy."""
