"""An invoice or a credit note as a PDF (fpdf2): one column of facts, a table of lines, a foot of sums and tax.

The fonts that every reader has know the letters of Western Europe. What they lack is written without its accents, or as ``?``; a
platform with customers beyond that sets ``invoice_font_file`` to a TrueType font that knows their letters, which is embedded.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from fpdf import FPDF
from fpdf.enums import TableBordersLayout, XPos, YPos
from fpdf.fonts import FontFace

from portico.control.billing import tax
from portico.errors import Problem
from portico.kit.money import decimal_text

_OWN: Final = "own"
_INK, _GREY, _RULE = (24, 24, 27), (113, 113, 122), (228, 228, 231)
_MARGIN: Final = 20.0


class Sheet(FPDF):
    """A4, with page numbers, in the platform's ink."""

    def __init__(self, title: str, made_at: datetime, footer: str, font: Path | None) -> None:
        super().__init__(format="A4")
        self.core_fonts_encoding = "windows-1252"
        self._own, self._footer = font is not None, footer
        if font is not None:
            try:
                self.add_font(_OWN, "", font)
                self.add_font(_OWN, "B", font)
            except Exception as err:
                detail = f"setting invoice_font_file: {font} is no TrueType font"
                raise Problem("config.invalid", detail, key="invoice_font_file") from err
        self.set_title(title)
        self.set_creation_date(made_at.astimezone(UTC))
        self.set_margins(_MARGIN, _MARGIN)
        self.set_auto_page_break(True, 25)
        self.alias_nb_pages()
        self.add_page()

    def style(self, size: float, *, bold: bool = False, grey: bool = False) -> None:
        """Size and ink of what follows."""
        self.set_font(_OWN if self._own else "helvetica", "B" if bold else "", size)
        self.set_text_color(*(_GREY if grey else _INK))

    def words(self, text: str) -> str:
        """``text`` as the font can write it, without what shows as something else than it says."""
        # What fpdf2 takes for the number of pages is a text like any other here.
        plain = without_controls(text).replace("{nb}", "{ nb}")
        return plain if self._own else western(plain)

    def line(self, text: str, size: float = 9.5, *, bold: bool = False, grey: bool = False) -> None:  # type: ignore[override]
        """A line of text, over the whole width."""
        self.style(size, bold=bold, grey=grey)
        self.multi_cell(0, size * 0.52, self.words(text), new_x=XPos.LMARGIN, new_y=YPos.NEXT)

    def footer(self) -> None:
        """On every page."""
        self.set_y(-18)
        self.style(8, grey=True)
        self.multi_cell(0, 4, self.words(self._footer), align="C", new_x=XPos.LMARGIN, new_y=YPos.NEXT)
        self.cell(0, 4, f"{self.page_no()} / {{nb}}", align="C")


def without_controls(text: str) -> str:
    """``text`` without control and format characters: none turns what follows around, or is there and not seen."""
    return "".join(letter for letter in text if letter == "\n" or not unicodedata.category(letter).startswith("C"))


def western(text: str) -> str:
    """``text`` in the letters of windows-1252: without accents that it lacks, ``?`` for what it has not at all."""
    found = []
    for letter in text:
        try:
            letter.encode("windows-1252")
        except UnicodeEncodeError:
            plain = unicodedata.normalize("NFKD", letter).encode("windows-1252", "ignore").decode("windows-1252")
            letter = plain or "?"
        found.append(letter)
    return "".join(found)


def invoice(row: Any, records: Sequence[Any], font: Path | None = None) -> bytes:
    """The PDF of an invoice (a row of ``billing_invoices`` that has a number) with its tax records."""
    sheet = _begin("Invoice", row.number, row.issued_at, row, font)
    facts = [("Invoice number", row.number), ("Date", _day(row.issued_at))]
    if row.period_start is not None and row.period_end is not None:
        facts.append(("Period", f"{_day(row.period_start)} - {_day(row.period_end)}"))
    if row.status == "void":
        facts.append(("Status", f"VOID since {_day(row.voided_at)}"))
    elif row.status == "paid" and row.paid_at is not None and row.gross_minor > 0:
        facts.append(("Paid", _day(row.paid_at)))
    _heads(sheet, row, facts)
    _lines(sheet, row)
    due = 0 if row.status == "void" else max(0, row.gross_minor - row.paid_minor)
    _sums(sheet, row.currency, [
        ("Net", row.net_minor), ("Tax", row.tax_minor), ("Total", row.gross_minor), ("Amount due", due),
    ])  # fmt: skip
    _tax(sheet, row.currency, [each for each in records if each.credit_note_id is None])
    return bytes(sheet.output())


def credit_note(note: Any, row: Any, records: Sequence[Any], font: Path | None = None) -> bytes:
    """The PDF of a credit note about an invoice."""
    sheet = _begin("Credit note", note.number, note.issued_at, row, font)
    facts = [
        ("Credit note number", note.number), ("Date", _day(note.issued_at)),
        ("For invoice", f"{row.number} of {_day(row.issued_at)}"),
    ]  # fmt: skip
    if note.status == "void":
        facts.append(("Status", f"VOID since {_day(note.voided_at)}"))
    _heads(sheet, row, facts)
    _sums(sheet, row.currency, [
        ("Net", -note.net_minor), ("Tax", -note.tax_minor), ("Total", -note.gross_minor),
    ])  # fmt: skip
    _tax(sheet, row.currency, [each for each in records if each.credit_note_id == note.id])
    return bytes(sheet.output())


def _begin(title: str, number: str, at: datetime, row: Any, font: Path | None) -> Sheet:
    sheet = Sheet(f"{title} {number}", at, row.seller["footer"], font)
    sheet.set_author(row.seller["name"])
    sheet.line(title, 22, bold=True)
    sheet.ln(4)
    return sheet


def _heads(sheet: Sheet, row: Any, facts: Sequence[tuple[str, str]]) -> None:
    """Facts, who sells, who buys."""
    for name, value in facts:
        sheet.style(9.5, grey=True)
        sheet.cell(42, 5.2, name)
        sheet.style(9.5, bold=True)
        sheet.cell(0, 5.2, sheet.words(value), new_x=XPos.LMARGIN, new_y=YPos.NEXT)
    sheet.ln(6)
    top, half = sheet.get_y(), (sheet.epw - 10) / 2
    ends = []
    for at, (head, party) in enumerate((("From", row.seller), ("Bill to", row.customer))):
        sheet.set_xy(_MARGIN + at * (half + 10), top)
        sheet.style(8.5, grey=True)
        sheet.cell(half, 5, head, new_x=XPos.LEFT, new_y=YPos.NEXT)
        for part, bold in _party(party):
            sheet.style(9.5, bold=bold)
            sheet.multi_cell(half, 5, sheet.words(part), new_x=XPos.LEFT, new_y=YPos.NEXT)
        ends.append(sheet.get_y())
    sheet.set_y(max(ends) + 8)


def _party(party: Mapping[str, Any]) -> list[tuple[str, bool]]:
    ids = party.get("tax_ids") or ([party["tax_id"]] if party.get("tax_id") else [])
    parts = [
        (party["name"] or "(no billing details)", True),
        (party["address"], False),
        (party["country"] or "", False),
    ]
    parts += [(party["email"] or "", False), *((f"Tax id {value}", False) for value in ids)]
    return [(text, bold) for text, bold in parts if text]


def _lines(sheet: Sheet, row: Any) -> None:
    sheet.style(9)
    sheet.set_draw_color(*_RULE)
    head = FontFace(emphasis="BOLD", color=_GREY, size_pt=8.5)
    table = sheet.table(
        col_widths=(74, 16, 28, 18, 26), text_align=("LEFT", "RIGHT", "RIGHT", "RIGHT", "RIGHT"), line_height=5.4,
        borders_layout=TableBordersLayout.HORIZONTAL_LINES, headings_style=head, padding=(1, 1),
    )  # fmt: skip
    with table as rows:
        rows.row(("Description", "Quantity", "Net", "Tax rate", f"Tax ({row.currency})"))
        for line in row.lines:
            about = line["description"]
            if line["period_start"] and line["period_end"]:
                about += f"\n{_short(line['period_start'])} - {_short(line['period_end'])}"
            rate = "" if line["tax_rate_bp"] is None else f"{percent(line['tax_rate_bp'])} %"
            amounts = (
                decimal_text(line["net_minor"], row.currency),
                rate,
                decimal_text(line["tax_minor"], row.currency),
            )
            rows.row([sheet.words(each) for each in (about, str(line["quantity"]), *amounts)])
    sheet.ln(4)


def _sums(sheet: Sheet, currency: str, sums: Sequence[tuple[str, int]]) -> None:
    for name, amount in sums:
        bold = name in ("Total", "Amount due")
        sheet.style(10, bold=bold, grey=not bold)
        sheet.cell(sheet.epw - 45, 6, name, align="R")
        sheet.style(10, bold=bold)
        sheet.cell(
            45, 6, f"{decimal_text(amount, currency)} {currency}", align="R", new_x=XPos.LMARGIN, new_y=YPos.NEXT
        )
    sheet.ln(6)


def _tax(sheet: Sheet, currency: str, records: Sequence[Any]) -> None:
    """Base and tax by treatment, and what must be said with it."""
    lines = [
        tax.TaxedLine(
            each.line,
            each.base_minor,
            each.tax_minor,
            tax.Assessment(each.treatment, each.jurisdiction, each.rate_bp),
            0,
        )
        for each in records
    ]
    for each in tax.summary(lines):
        place = f" {each['jurisdiction']}" if each["jurisdiction"] else ""
        name = {"standard": f"Tax{place} {percent(each['rate_bp'])} %", "zero": f"Tax{place} 0 %"}.get(
            each["treatment"], tax.REMARKS.get(each["treatment"], "")
        )
        base, due = decimal_text(each["base_minor"], currency), decimal_text(each["tax_minor"], currency)
        sheet.line(f"{name}  on {base} {currency}: {due} {currency}", 8.5, grey=True)


def percent(rate_bp: int) -> str:
    """Basis points as a percentage: 19, 8.1, 5.25."""
    whole, rest = divmod(rate_bp, 100)
    return str(whole) if not rest else f"{whole}.{rest:02d}".rstrip("0")


def _day(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%d")


def _short(text: str) -> str:
    return text[:10]
