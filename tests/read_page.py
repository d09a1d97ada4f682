"""A page as a browser would take it."""

import base64
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

SVG = "{http://www.w3.org/2000/svg}"


class Page(HTMLParser):
    """What a browser makes of a page: tags with attributes, and the text outside of style and svg."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)
        self.close()
        self.text = " ".join(" ".join(self.words).split())
        self.svgs = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        self.images = [base64.b64decode(source.partition("base64,")[2], validate=True) for source in sources]
        self.kinds = [source.partition(";")[0] for source in sources]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "tags are closed in order"

    def handle_data(self, data):
        if not {"style", "svg"} & set(self.open):
            self.words.append(data)
