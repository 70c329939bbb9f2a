"""The `quantization_config` of a checkpoint: settings read by name, and refused by name where they are not known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lowmem.errors import UnsupportedError

_SHOWN_CHARACTERS = 60


class Settings:
    """Settings of one checkpoint, from a file that may hold anything.

    What is not known is refused rather than ignored: it might change what the stored numbers mean.

    Args:
        quantization: The object in config.json.
    """

    def __init__(self, quantization: Mapping[str, object]) -> None:
        self._quantization = quantization

    @property
    def method(self) -> str:
        """Name of the method, in lower case; "" where there is none."""
        method = self._quantization.get("quant_method")
        # transformers' own enumeration of methods is text too.
        return str(getattr(method, "value", method)).lower() if method is not None else ""

    def get(self, name: str, default: object = None) -> object:
        """A setting, or the default where it is not there."""
        return self._quantization.get(name, default)

    def one_of(self, name: str, usual: str, *others: str) -> str:
        """A setting that is one of some words, in any case.

        Args:
            name: Its name.
            usual: What it is where it is missing or null.
            others: What else it may be.

        Raises:
            UnsupportedError: It is something else.
        """
        value = self.get(name)
        if value is None:
            return usual
        text = str(getattr(value, "value", value)).lower()
        if (not isinstance(value, str) and not hasattr(value, "value")) or text not in (usual, *others):
            raise self.unsupported(name, f"known are {', '.join((usual, *others))}")
        return text

    def whole(self, name: str, default: int | None = None) -> int:
        """A setting that is a whole number.

        Raises:
            UnsupportedError: It is something else, or missing without a default.
        """
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.unsupported(name, "expected a whole number")
        return value

    def refuse_unknown(self, known: Iterable[str]) -> None:
        """Refuse settings that are not known, but for those that are null.

        Raises:
            UnsupportedError: Names the first.
        """
        left = sorted(str(name) for name, value in self._quantization.items() if value is not None)
        for name in left:
            if name not in set(known):
                raise self.unsupported(name, "it is not known what it changes")

    def unsupported(self, name: str, reason: str) -> UnsupportedError:
        """The refusal of one setting, to be raised."""
        value = ascii(self.get(name))
        shown = value if len(value) <= _SHOWN_CHARACTERS else value[: _SHOWN_CHARACTERS - 3] + "..."
        return UnsupportedError(
            f"quantization_config {name}={shown} of a {self.method} checkpoint",
            reason=reason,
            instead="the bf16, fp16 or fp32 checkpoint of the same model, or one in bitsandbytes' format",
        )
