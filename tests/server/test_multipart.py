from __future__ import annotations

import pytest

from server import multipart
from server.errors import ServeError

HEAD = b'--xyz\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'


def part(content: bytes, disposition: str = 'name="image"; filename="a.jpg"') -> bytes:
    return b"--xyz\r\nContent-Disposition: form-data; " + disposition.encode() + b"\r\n\r\n" + content + b"\r\n"


def test_files_come_in_their_order_to_the_byte() -> None:
    contents = [b"", b"\r\n", b"--xy\r\n--", bytes(range(256)) * 9]
    body = b"".join(map(part, contents)) + b"--xyz--\r\n"
    assert multipart.is_form(body)
    assert multipart.files(body, "image") == contents


def test_what_curl_and_browsers_write_is_read() -> None:
    body = HEAD + b"picture\r\n" + part(b"other", "filename=b.png; name=image") + b"--xyz--"
    assert multipart.files(body, "image") == [b"picture", b"other"]
    assert multipart.files(part(b"\xff", 'name="image"') + b"--xyz--", "image") == [b"\xff"]
    assert multipart.files(part(b"a", 'name="image"; filename="x; name=y"') + b"--xyz--", "image") == [b"a"]


def test_a_content_type_may_have_a_name_of_its_own() -> None:
    head = b'--xyz\r\nContent-Type: image/png; name="a.png"\r\nContent-Disposition: FORM-DATA; Name="image"\r\n\r\n'
    assert multipart.files(head + b"\xff\xd8\r\n--xyz--", "image") == [b"\xff\xd8"]


@pytest.mark.parametrize(
    ("content", "disposition"),
    [
        (b"cat.jpg", 'name="image"; filename="a.txt"'),
        (b"cat.jpg", "name=image; filename*=utf-8''a.txt"),
        (b"", 'name="image"'),
        (b"GIF89a\0", 'name="image"'),
        (b"\xff\xd8", 'name="image"'),
        (b"a" * 4097, 'name="image"'),
    ],
)
def test_what_is_no_file_name_goes_to_the_decoder(content: bytes, disposition: str) -> None:
    assert multipart.files(part(content, disposition) + b"--xyz--", "image") == [content]


def test_a_file_name_without_its_at_sign_is_refused_but_where_words_are_taken() -> None:
    body = part(b"my cat.jpg", 'name="image"') + b"--xyz--"
    message = r"'image' is the text 'my cat.jpg', no file; curl sends one .*: -F image=@my cat.jpg$"
    with pytest.raises(ServeError, match=message):
        multipart.files(body, "image")
    assert multipart.files(body, "image", texts=True) == [b"my cat.jpg"]


@pytest.mark.parametrize(
    "body", [b"\xff\xd8\xff", b"--", b"--\r\n", b"--xyz\r\n\r\nContent-Disposition: form-data", b"{}"]
)
def test_what_is_no_form(body: bytes) -> None:
    assert not multipart.is_form(body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (HEAD + b"picture", "cut off: its closing boundary is missing"),
        (HEAD + b"picture\r\n", "cut off"),
        (HEAD + b"picture\r\n--xyz\r\n--xyz--", "no header of its own"),
        (part(b"5", 'name="slo_ms"') + b"--xyz--", "'slo_ms' is not the model's input; .* 'image' only"),
        (part(b"") + part(b"", 'name="img"; filename="image"') + b"--xyz--", "field 'img' is not the model's input"),
        (part(b"", 'filename="image"') + b"--xyz--", "field '' is not the model's input"),
        (part(b"") * 2000 + b"--xyz--", "more than 1024 parts"),
    ],
)
def test_forms_that_are_broken(body: bytes, message: str) -> None:
    assert multipart.is_form(body)
    with pytest.raises(ServeError, match=message):
        multipart.files(body, "image")
