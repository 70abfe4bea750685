"""Which places references may name: what lies below an allowed root, however it is written."""

import os
import posixpath
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.data.roots import allowed_place
from bridge.errors import DataRefused

ROOTS = ["https://files.example.com/public/", "s3://bucket/prefix/"]

ALLOWED = {
    "https://files.example.com/public/a.png": None,
    "https://files.example.com/public/a/b-c_d.tar.gz": None,
    "https://files.example.com/public/a/../b": "https://files.example.com/public/b",
    "https://files.example.com/public//a": "https://files.example.com/public/a",
    "https://files.example.com/public/./a": "https://files.example.com/public/a",
    "s3://bucket/prefix/a": None,
}
REFUSED = [
    "",
    "a",
    "/etc/passwd",
    "file:///etc/passwd",
    "https://files.example.com/public",  # the root itself
    "https://files.example.com/publicity/a",
    "https://files.example.com/private/a",
    "https://files.example.com/public/../private/a",
    "https://files.example.com/public/a/../../private/a",
    "https://files.example.com/public/%2e%2e/private/a",
    "https://files.example.com/public/%2E%2E%2fprivate/a",
    "https://files.example.com/public/%252e%252e/private/a",
    "https://files.example.com/public/..\\private\\a",
    "https://files.example.com//public/a",
    "https://files.example.com:443/public/a",
    "https://files.example.com.evil.example/public/a",
    "https://user@files.example.com/public/a",
    "https://files.example.com@evil.example/public/a",
    "https://evil.example/https://files.example.com/public/a",
    "https://evil.example#https://files.example.com/public/a",
    "https://files.example.com/public/a?next=http://127.0.0.1/",
    "https://files.example.com/public/a#b",
    "http://files.example.com/public/a",
    "https://169.254.169.254/latest/meta-data/",
    "https://[::1]/public/a",
    "https://[/public/a",
    "s3://bucket/other/a",
    "s3://bucket2/prefix/a",
    "simplecache::https://files.example.com/public/a",
    "zip://a::https://files.example.com/public/a",
    "https://files.example.com/public/a\n",
    "https://files.example.com/public/\0",
    "https://files.example.com/public/\ud800",
    "\thttps://files.example.com/public/a",
    "redis://:password@127.0.0.1/0",
]


@pytest.mark.parametrize("url", ALLOWED)
def test_below_a_root(url):
    assert allowed_place(url, ROOTS) == (ALLOWED[url] or url)


@pytest.mark.parametrize("url", REFUSED)
def test_beside_all_roots(url):
    with pytest.raises(DataRefused, match="is not below an allowed root"):
        allowed_place(url, ROOTS)


def test_without_roots_nothing_is_allowed():
    for url in ALLOWED:
        with pytest.raises(DataRefused):
            allowed_place(url, [])


#: Pieces of URLs that mean something to somebody, and some that do not.
PIECES = st.sampled_from(
    [
        "..",
        ".",
        "/",
        "//",
        "public",
        "a",
        "%2e",
        "%2e%2e",
        "%2f",
        "\\",
        "@",
        ":",
        "::",
        "?",
        "#",
        "[",
        "]",
        ";",
        "ä",
        "https:",
        "file:",
        "files.example.com",
        "//files.example.com",
    ]
) | st.sampled_from(["evil.example", "https://evil.example/", "\n", "\0", " "])
URLS = st.lists(PIECES, max_size=8).map("".join) | st.text(max_size=30)


@given(
    start=st.sampled_from([ROOTS[0], ROOTS[1], "https://files.example.com", "https://", "s3://bucket", ""]), rest=URLS
)
def test_what_is_allowed_is_below_a_root_for_every_reader(start, rest):
    try:
        place = allowed_place(start + rest, ROOTS)
    except DataRefused:
        return
    for read in (place, unquote(place), unquote(unquote(place))):
        parts = urlsplit(read)
        assert ".." not in parts.path.split("/") and not parts.query and not parts.fragment and "@" not in parts.netloc
        plain = f"{parts.scheme}://{parts.netloc}{posixpath.normpath(parts.path)}"
        assert plain == place and any(plain.startswith(root) for root in ROOTS)


@given(rest=st.lists(st.sampled_from(["..", ".", "a", "public", "b", ""]), max_size=5).map("/".join) | URLS)
def test_files_that_are_allowed_are_below_the_root_for_the_kernel(tmp_path_factory, rest):
    root = tmp_path_factory.getbasetemp() / "root"
    root.mkdir(exist_ok=True)
    if not (root / "a").is_symlink():
        (root / "a").symlink_to(root.parent)  # leads out
        (root / "public").symlink_to(root / ".")  # leads in
    try:
        place = allowed_place(f"file://{root}/{rest}", [f"file://{root}/"])
    except DataRefused:
        return
    assert os.path.realpath(place.removeprefix("file://")).startswith(f"{os.path.realpath(root)}/")


def test_the_text_names_no_root_and_repeats_no_secret():
    with pytest.raises(DataRefused) as caught:
        allowed_place("file:///etc/passwd", [*ROOTS, "file:///mnt/secret/"])
    assert "secret" not in str(caught.value) and "bucket" not in str(caught.value)
    with pytest.raises(DataRefused) as caught:
        allowed_place("https://user:geheim@files.example.com/public/a?signature=geheim", ROOTS)
    assert "geheim" not in str(caught.value) and "files.example.com/public/a" in str(caught.value)
    with pytest.raises(DataRefused) as caught:
        allowed_place("x" * 10_000, ROOTS)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("url", ["HTTPS://files.example.com/public/a", " https://files.example.com/public/a"])
def test_what_would_be_read_otherwise_than_it_is_written_is_refused(url):
    """A reader that looks at the first letters would take it for another scheme, and follow its redirects."""
    with pytest.raises(DataRefused):
        allowed_place(url, ROOTS)
