import pytest

from offload.budget import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        (0, 0),
        (4097, 4097),
        ("512", 512),
        ("512 B", 512),
        ("900MiB", 900 * 2**20),
        ("2.4GiB", int(2.4 * 2**30)),
        ("20 GB", 20 * 10**9),
        ("1tib", 2**40),
        (" 0.5 KiB ", 512),
    ],
)
def test_sizes_are_read_as_written(text: str | int, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1.GiB", "1e9", "20G", "2,4GiB", "٣MiB", "nan", "1 GiB 2"])
def test_text_that_is_no_size_is_refused_with_the_field_and_the_text(text: str) -> None:
    with pytest.raises(ValueError, match=r"Budget.host: expected bytes as an int or text such as .* got '"):
        parse_bytes(text, field="Budget.host")


def test_numbers_that_are_no_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="size: -1 bytes is negative"):
        parse_bytes(-1)
    for other in (True, 1.5, None):
        with pytest.raises(ValueError, match="size: expected bytes"):
            parse_bytes(other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (int(1.21 * 2**30), "1.21 GiB"),
        (2**30 - 1, "1.00 GiB"),
        (3 * 2**50, "3072.00 TiB"),
    ],
)
def test_sizes_are_written_for_people(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text
