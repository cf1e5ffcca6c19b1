"""What was not written here becomes text, whatever it holds."""

import html
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from drama.html_page import columns, grid, text, write_html


class Heard(HTMLParser):
    """The text in one element and its attribute."""

    def __init__(self, markup):
        super().__init__()
        self.tags, self.said, self.attribute = [], "", ""
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attribute = dict(attributes)["id"]

    def handle_data(self, data):
        self.said += data


@given(st.text() | st.text("<>&\"'/!-=;script"))
def test_any_text_comes_back_as_text(value):
    heard = Heard(f'<p id="{text(value)}">{text(value)}</p>')
    assert heard.tags == ["p"]
    assert heard.said == heard.attribute == html.unescape(text(value))
    text(value).encode()
    kept = [c for c in value if c.isprintable()]
    assert all(c in heard.said for c in kept)


def test_what_no_page_may_hold():
    assert text("a\x00b\x1b\r\x9b\u202e\ud800\ufffe") == "a\ufffdb" + 6 * "\ufffd"
    assert text("a\tb\nc\u200fd") == "a\tb\nc\u200fd"
    assert text(7) == "7"


def test_nothing_around_nothing(tmp_path):
    assert grid([]) == columns(iter(())) == ""
    page = write_html(tmp_path / "x.html", "</title><b>", ["", "<p>here</p>"]).read_text()
    assert "<title>&lt;/title&gt;&lt;b&gt;</title>" in page
    assert "<h1>&lt;/title&gt;&lt;b&gt;</h1>\n<p>here</p>\n</body>" in page
