"""A dataset as one HTML page: what the model will see, and what it will be trained on."""

from phi3v.view.page import Wishes, write_view

__all__ = ["Wishes", "write_view"]
