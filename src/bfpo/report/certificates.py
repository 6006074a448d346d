"""What is certified about heads on the hidden states of the runs' models."""

from collections.abc import Sequence
from typing import NamedTuple

from bfpo.core.certificate import SUMMARY_HEADINGS
from bfpo.report.run_files import Run

HEADINGS = ("run", "head", *SUMMARY_HEADINGS)


class CertificateRow(NamedTuple):
    """Boxes of a kind.

    Args:
        run: Name of the run.
        cells: Head, and the cells of `BoxSummary`.
    """

    run: str
    cells: tuple[str, ...]


def certificate_rows(runs: Sequence[Run]) -> list[CertificateRow]:
    """Return the boxes of all runs with a certificate, by kind."""
    return [
        CertificateRow(run.name, (run.certificate.certified_head.in_words(), *summary.cells()))
        for run in runs
        if run.certificate is not None
        for summary in run.certificate.summaries()
    ]


def certificate_notes(runs: Sequence[Run]) -> list[str]:
    """Return what the certificates claim, and what a reader must know before relying on them."""
    certificates = [(run.name, run.certificate) for run in runs if run.certificate is not None]
    claims = dict.fromkeys(certificate.claim for _, certificate in certificates)
    warnings = [f"{name}: {warning}" for name, certificate in certificates for warning in certificate.warnings]
    return [*claims, *warnings]
