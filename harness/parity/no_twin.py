"""No twin: why a model has no small Hugging Face counterpart."""


class NoTwin(Exception):
    """The reason, in words that a user understands, why no small Hugging Face model can be made."""
