"""A page as a reader of its source sees it: tags, attributes, text."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Tags, attributes and text of a page; checks that every tag is closed."""

    VOID = {"meta", "img", "br", "wbr", "path", "polyline", "circle"}

    def __init__(self, source: str):
        super().__init__()
        self.source, self.open, self.tags, self.words = source, [], [], []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]
