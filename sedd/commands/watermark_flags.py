"""The flags of ``sample`` that watermark texts, and the file of the secret."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

from sedd.commands.cli import unset
from sedd.errors import FieldError, UserError
from sedd.watermark.scheme import Kind, Scheme, is_readable_by_all, read_secret

SHORT = 16  # bytes of a secret below which it may be guessed


@dataclass(frozen=True, kw_only=True)
class WatermarkFlags:
    """Whether texts are watermarked, and how."""

    watermark: Annotated[Kind | None, unset("gumbel|green")] = None
    """Watermark the texts, so that sedd detect recognises them by the secret. gumbel draws tokens
    with noise that is a function of the secret and of the seed, which leaves the distribution of a
    text as it is; green makes the tokens of secret lists likelier, which changes it, and survives
    insertions."""
    watermark_key: Annotated[Path | None, unset("FILE")] = None
    """The file of the secret. The secret is never printed nor saved with the samples."""
    watermark_delta: float = 2.0
    """Strength of the watermark green, in nats."""
    watermark_gamma: float = 0.5
    """Share of the vocabulary in a list of the watermark green: a multiple of 1/256 in (0, 1)."""

    @cached_property
    def scheme(self) -> Scheme | None:
        """The scheme; None without a watermark. The file is read once: it may be a pipe.

        Raises:
            UserError: --watermark and --watermark-key do not come together, or the file cannot be
                read or is empty.
            FieldError: a number is out of its range.
        """
        if self.watermark is None:
            if self.watermark_key is not None:
                raise UserError(
                    f"--watermark-key {self.watermark_key}: say which watermark, --watermark "
                    "gumbel or green"
                )
            return None
        if self.watermark_key is None:
            raise UserError(
                f"--watermark {self.watermark} needs --watermark-key FILE, a file with a secret"
            )
        try:
            return Scheme(
                secret=secret_of(self.watermark_key),
                kind=self.watermark,
                delta=self.watermark_delta,
                gamma=self.watermark_gamma,
            )
        except FieldError as error:
            raise FieldError(f"watermark_{error.field}", error.problem) from error


def secret_of(path: Path) -> bytes:
    """Read the secret of ``--watermark-key``.

    Raises:
        UserError: the file cannot be read, or is empty.
    """
    try:
        return read_secret(path)
    except UserError as error:
        raise UserError(f"--watermark-key {error}") from error


def notes_on_secret(path: Path, secret: bytes) -> Iterator[str]:
    """Yield warnings about a secret and its file."""
    if is_readable_by_all(path):
        yield (
            f"--watermark-key {path}: every user of this machine can read the secret (chmod 600 "
            "the file)"
        )
    if len(secret) < SHORT:
        yield (
            f"--watermark-key {path}: a secret of fewer than {SHORT} bytes can be guessed "
            "(openssl rand -hex 32 makes one)"
        )
